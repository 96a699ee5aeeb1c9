"""Reads and checks weights of other libraries and of SAELens 5, and makes inference SAEs of SAELens from them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, SAEConfig
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader
from torch import nn

from sae_toolkit.errors import UserError, one_line


def read_json(file: Path, where: str) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UserError: the file cannot be read, or is not a JSON object.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: {file.name} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{where}: {file.name} is not a JSON object")
    return content


def read_state_dict(file: Path, device: str, where: str) -> dict[str, torch.Tensor]:
    """Reads a state dict that torch saved. Nothing but tensors is unpickled.

    Raises:
        UserError: the file is damaged, is not a state dict, or is a pickle of more than tensors.
    """
    try:
        tensors = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{where}: {file.name} is a pickle of more than tensors, which could run any code if it were opened;"
            " save its state_dict() instead"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{where}: {file.name} is damaged: {one_line(error)}; download it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise UserError(f"{where}: {file.name} is not a state dict of tensors")
    return tensors


def read_saelens(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None, *, where: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Reads an SAE as SAELens's own `sae_lens_disk_loader`, and folds the factor of a fine-tuned SAE into W_dec.

    SAELens 3 to 5 could fine-tune a factor for each feature, by which `decode` multiplied the activations. Later
    versions have no such factor.

    Returns:
        The configuration, and the weights by their names.

    Raises:
        UserError: the weights hold such a factor, and cfg.json says that there is none.
    """
    is_finetuned = read_json(Path(path) / SAE_CFG_FILENAME, where).get("finetuning_scaling_factor")
    # With this override SAELens returns the factor, whatever cfg.json says. It leaves out a factor of ones.
    overrides = (cfg_overrides or {}) | {"finetuning_scaling_factor": True}
    cfg, weights = sae_lens_disk_loader(path, device, overrides)
    factor_F = weights.pop("finetuning_scaling_factor", None)
    cfg["finetuning_scaling_factor"] = False
    if factor_F is None:
        return cfg, weights
    if not is_finetuned:
        raise UserError(
            f"{where}: the weights hold a factor for each feature (scaling_factor), and finetuning_scaling_factor in"
            f" cfg.json is {is_finetuned!r:.60}; set it to true if the SAE was fine-tuned, or remove the factor"
        )
    if factor_F.shape != weights["W_dec"].shape[:1]:
        raise UserError(
            f"{where}: damaged: finetuning_scaling_factor has shape {list(factor_F.shape)}, and must have"
            f" {list(weights['W_dec'].shape[:1])}"
        )
    weights["W_dec"] = weights["W_dec"] * factor_F[:, None]
    return cfg, weights


def named_weights(tensors: Mapping[str, torch.Tensor], names: Mapping[str, str], where: str) -> dict[str, torch.Tensor]:
    """Returns float32 weights by SAELens's names: W_enc [D, F], W_dec [F, D], b_dec [D], and others [F] or [].

    Args:
        tensors: the weights by the names that their library gives them.
        names: SAELens's name -> the library's name. A `.weight` is an nn.Linear's, [outputs, inputs]; SAELens's is its
            transpose.
        where: the flag and its value, for messages.

    Raises:
        UserError: a weight is missing, or is not of floats.
    """
    missing = [name for name in names.values() if name not in tensors]
    if missing:
        raise UserError(f"{where}: damaged or of another kind: the weights hold no {' and no '.join(missing)}")
    integer = [name for name in names.values() if not tensors[name].is_floating_point()]
    if integer:
        raise UserError(f"{where}: damaged: {integer[0]} is of {tensors[integer[0]].dtype}, and must be of floats")
    is_linear = {theirs for theirs in names.values() if theirs.endswith(".weight") and tensors[theirs].ndim == 2}
    return {
        ours: (tensors[theirs].mT if theirs in is_linear else tensors[theirs]).float() for ours, theirs in names.items()
    }


def check_k(k: Any, n_features: int, where: str) -> int:
    """Returns k as an int, and raises a `UserError` if it is not a number of features."""
    k = k.item() if isinstance(k, torch.Tensor) and k.numel() == 1 else k
    if not isinstance(k, int) or not 1 <= k <= n_features:
        raise UserError(f"{where}: k is {k}, and must be 1 to the {n_features} features")
    return k


def build_sae(
    sae_class: type[SAE[Any]],
    cfg_class: type[SAEConfig],
    weights: dict[str, torch.Tensor],
    device: str,
    where: str,
    **options: Any,
) -> SAE[Any]:
    """Returns an inference SAE that has the given weights.

    Args:
        sae_class: the class of the SAE.
        cfg_class: the class of its configuration.
        weights: all weights of that class, by SAELens's names.
        device: where to put the SAE.
        where: the flag and its value, for messages.
        **options: further fields of the configuration.

    Raises:
        UserError: the shapes of the weights do not fit together.
    """
    if weights["W_dec"].ndim != 2:
        raise UserError(f"{where}: damaged: W_dec has shape {list(weights['W_dec'].shape)}, and must have two axes")
    d_sae, d_in = weights["W_dec"].shape
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, tensor in weights.items():
        shape = shapes.get(name, (d_sae,))
        if tensor.shape != shape:
            raise UserError(f"{where}: damaged: {name} has shape {list(tensor.shape)}, and must have {list(shape)}")
    sae = sae_class(cfg_class(d_in=d_in, d_sae=d_sae, device="meta", **options))
    sae.load_state_dict({name: nn.Parameter(tensor.contiguous()) for name, tensor in weights.items()}, assign=True)
    return sae.to(device=device).eval()


@torch.no_grad()
def written_directions(sae: SAE[Any]) -> torch.Tensor:
    """Returns what one unit of activation of each feature adds to the reconstruction, [F, D].

    That is its decoder vector, unless the SAE rescales activations by the norms of the decoder vectors, as SAELens's
    TopK SAEs may: it then divides by the norm.
    """
    if not getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        return sae.W_dec.detach()
    return torch.nn.functional.normalize(sae.W_dec.detach(), dim=-1)
