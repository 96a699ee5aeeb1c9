"""Turns an SAE that was loaded for inference into one that is trained, with the same features and reconstruction."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import RUNNER_CFG_FILENAME
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler

from sae_toolkit.saes.weights import read_json

BATCHTOPK_KINDS = ("batchtopk", "matryoshka_batchtopk")  # saved as jumprelu with one threshold for all features
_ALIKE = 1e-3  # relative difference of decoder norms, or thresholds, that count as equal


def trained_architecture(sae: SAE[Any], path: Path, where: str) -> str:
    """Returns the architecture that an SAE was trained as. A BatchTopK SAE is a JumpReLU SAE in inference form.

    Args:
        sae: the SAE in inference form.
        path: its directory or file; a runner_cfg.json there says it where the SAE itself does not.
        where: the flag and its value, for messages.

    Raises:
        UserError: runner_cfg.json cannot be read.
    """
    found = sae.cfg.architecture()
    if found != "jumprelu":
        return found
    trained = sae.cfg.metadata.training_architecture
    if trained is None and (path / RUNNER_CFG_FILENAME).is_file():
        of_sae = read_json(path / RUNNER_CFG_FILENAME, where).get("sae")
        trained = of_sae.get("architecture") if isinstance(of_sae, dict) else None
    return trained if trained in BATCHTOPK_KINDS else found


def training_detail(sae: SAE[Any], name: str) -> Any:
    """Returns a setting that only the training of an SAE had, such as BatchTopK's k; None if it is not recorded."""
    details = sae.cfg.metadata.training_architecture_details
    return details.get(name) if isinstance(details, dict) else None


def threshold_to_begin_with(source: SAE[Any], k: float) -> float | None:
    """Returns the threshold that a BatchTopK SAE goes on with; None if it was trained with another k, which moves it.

    Args:
        source: the BatchTopK SAE in inference form. If the k of its training is not recorded, it counts as the same.
        k: the k to train with.
    """
    trained_with = training_detail(source, "k")
    return source.threshold.double().mean().item() if trained_with in (None, k) else None


def single_value(values_F: torch.Tensor) -> float | None:
    """Returns the mean of values that are all alike, such as the norms of normalized vectors; None if they differ."""
    low, high = values_F.min().item(), values_F.max().item()
    return values_F.double().mean().item() if high - low <= _ALIKE * max(abs(low), abs(high)) else None


@torch.no_grad()
def load_weights(sae: TrainingSAE[Any], source: SAE[Any]) -> None:
    """Copies the weights of an SAE in inference form into an SAE to train, in place.

    The SAE to train then computes what the source does, on the activations that the source takes. Its own configuration
    stays: it may have another k or another weight of the sparsity loss. A BatchTopK SAE takes the source's threshold,
    unless the source is known to have been trained with another k; its running mean then starts at 0.

    Args:
        sae: a new SAE of the architecture that the source was trained as, and of its shape. If it is to multiply
            activations by decoder norms and the source does not, all norms must be alike.
        source: the SAE in inference form, on the same device. It may be changed.
    """
    ours, theirs = sae.cfg, source.cfg
    rescales = getattr(ours, "rescale_acts_by_decoder_norm", False)
    if getattr(theirs, "rescale_acts_by_decoder_norm", False) and not rescales:
        source.fold_W_dec_norm()
    weights = dict(source.state_dict())
    if (sign := ours.apply_b_dec_to_input - theirs.apply_b_dec_to_input) and "W_enc" in weights:
        shift_F = sign * (weights["b_dec"] @ weights["W_enc"])  # (x - b_dec) @ W_enc + shift is x @ W_enc
        for name in {"b_enc", "b_gate", "b_mag"} & weights.keys():
            weights[name] = weights[name] + (shift_F * weights["r_mag"].exp() if name == "b_mag" else shift_F)
    if isinstance(sae, BatchTopKTrainingSAE):
        del weights["threshold"]
        threshold = threshold_to_begin_with(source, ours.k) or 0.0
        if rescales:  # the threshold is compared with activations times norms
            threshold *= weights["W_dec"].norm(dim=-1).double().mean().item()
        weights["topk_threshold"] = torch.tensor(threshold)
    sae.load_state_dict(weights)


@torch.no_grad()
def unfold_normalization(sae: TrainingSAE[Any], scaler: ActivationScaler) -> None:
    """Changes weights for raw activations into weights for normalized ones, in place.

    This is the inverse of what a run does at its end, so the finished SAE takes raw activations again.

    Args:
        sae: the SAE. If the normalization is a whitening, it does not multiply activations by decoder norms.
        scaler: the normalization that the run has measured.
    """
    cfg = copy(sae.cfg)  # folding changes fields that are settings of the run
    if (scale := scaler.scaling_factor) is not None:
        sae.fold_activation_norm_scaling_factor(1 / scale)
    if (whitening := scaler.whitening) is not None:
        # x = z @ M^-1 + mean is (z - mean') @ M^-1 with mean' = -mean @ M
        mean = -whitening.mean @ whitening.matrix
        sae.fold_activation_whitening(mean, whitening.inverse_matrix, whitening.matrix)
    sae.cfg = cfg
    if isinstance(sae, TopKTrainingSAE) and cfg.rescale_acts_by_decoder_norm:
        sae.fold_W_dec_norm()  # a step of Adam then turns every feature alike, whatever the scale
