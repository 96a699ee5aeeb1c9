"""Predicts the memory of one training step of an SAE, forward and backward."""

from __future__ import annotations

import copy
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, TrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.util import str_to_dtype

from sae_toolkit.steps.sparse_topk import SparseBatchTopKTrainingSAE, SparseTopKTrainingSAE, sparse_class

# How much a step of SAELens's own classes adds to the peak, forward and backward, in tensors of shape [B, F]. The
# numbers were fitted to runs on a CPU (BENCHMARKS.md, memory).
_DENSE_STEP = {
    "standard": 9.5,
    "topk": 11.0,
    "batchtopk": 10.5,
    "jumprelu": 8.6,
    "gated": 12.7,
    "matryoshka_batchtopk": 13.3,
}
_OTHER_DENSE_STEP = 12.0

# The same on a CUDA device, as (tensors [F, D], tensors [B, F]) that exist at the peak beside weights and moments.
# Gradients are among them, and the auxiliary loss of dead features where there is one. Each architecture has two such
# moments in its backward pass, and the ratio of B and D decides which of them is higher. The numbers were counted on
# fake CUDA tensors (tests/cuda), where memory is known to the byte.
#   [F, D]: W_dec's gradient; until it is added up, its parts through the product and through the decoder norms, and
#           for gated the encoder's two products; for matryoshka one part for each nested dictionary.
#   [B, F]: pre-activations and activations, scaled and unscaled, and the gradients of the last two or three of them.
_DENSE_STEP_ON_CUDA: dict[str, tuple[tuple[float, float], ...]] = {
    "standard": ((3, 4), (2, 5)),
    "topk": ((3, 5), (1, 8)),
    "abstopk": ((3, 5), (1, 8)),
    "batchtopk": ((3, 6), (1, 9)),
    "jumprelu": ((2, 3), (1, 5.25)),
    "jumprelu_to_input": (
        (3, 4.75),
        (1, 6.75),
    ),  # with --target_l0: the gradient of the sparsity loss goes to the encoder
    "gated": ((5, 5), (2, 8)),
    "matryoshka_batchtopk": ((3, 8), (1, 10)),
}
_OTHER_DENSE_STEP_ON_CUDA = ((3.0, 12.0),)  # not counted: matching_pursuit keeps tensors of each of its iterations
_BATCHES_ON_CUDA = 6  # tensors [B, D] at these moments: the batch, scaled, centered, reconstructed, and gradients


def n_parameters_of_sae(cfg: LanguageModelSAERunnerConfig[Any]) -> int:
    """Returns the number of parameters of the SAE of a run."""
    sae_class, _ = get_sae_training_class(cfg.sae.architecture())
    sae_cfg = copy.copy(cfg.sae)
    sae_cfg.device = "meta"
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in sae_class(sae_cfg).parameters())


def step_bytes(cfg: LanguageModelSAERunnerConfig[Any], *, on_cpu: bool) -> int:
    """Returns what a step adds to the peak, on a CPU or a CUDA device, without the SAE's gradients."""
    return _step_bytes_on_cpu(cfg) if on_cpu else _step_bytes_on_cuda(cfg)


def _step_bytes_on_cpu(cfg: LanguageModelSAERunnerConfig[Any]) -> int:
    dtype, architecture = str_to_dtype(cfg.dtype), cfg.sae.architecture()
    pre_activations = cfg.train_batch_size_tokens * cfg.sae.d_sae * dtype.itemsize
    sae_class = _class_of_step(cfg)
    if not issubclass(sae_class, SparseTopKTrainingSAE):
        return int(_DENSE_STEP.get(architecture, _OTHER_DENSE_STEP) * pre_activations)
    copies = 2 if issubclass(sae_class, SparseBatchTopKTrainingSAE) else 1  # BatchTopK's selection makes a copy
    return copies * pre_activations + 6 * cfg.train_batch_size_tokens * cfg.sae.d_in * dtype.itemsize


def _class_of_step(cfg: LanguageModelSAERunnerConfig[Any]) -> type[TrainingSAE[Any]]:
    return sparse_class(get_sae_training_class(cfg.sae.architecture())[0], cfg.sae, compiled=cfg.compile_sae)


def _step_bytes_on_cuda(cfg: LanguageModelSAERunnerConfig[Any]) -> int:
    n_bytes = str_to_dtype(cfg.dtype).itemsize
    gradients = n_parameters_of_sae(cfg) * n_bytes
    batch, d_in, d_sae = cfg.train_batch_size_tokens, cfg.sae.d_in, cfg.sae.d_sae
    weight_FD, acts_BF = d_sae * d_in * n_bytes, batch * d_sae * n_bytes
    if issubclass(_class_of_step(cfg), SparseTopKTrainingSAE):
        moments = _sparse_step_on_cuda(weight_FD, acts_BF)
    else:
        to_input = "_to_input" if getattr(cfg.sae, "jumprelu_ste_to_input", False) else ""
        counts = _DENSE_STEP_ON_CUDA.get(cfg.sae.architecture() + to_input, _OTHER_DENSE_STEP_ON_CUDA)
        moments = [n_weights * weight_FD + n_acts * acts_BF for n_weights, n_acts in counts]
    return int(max(0, max(moments) - gradients)) + _BATCHES_ON_CUDA * batch * d_in * n_bytes


def _sparse_step_on_cuda(weight_FD: int, acts_BF: int) -> list[float]:
    """Returns what exists in a step of `sparse_topk` at its highest moments, gradients included, if all features are
    dead. The auxiliary loss then has all features, for which it takes their weights out: two tensors [F, D].
    """
    return [
        # The selection: pre-activations, with the encoder in bfloat16 for their product, or then with block maxima.
        acts_BF + max(weight_FD / 2, acts_BF / 8),
        # The dead features' loss: their weights; pre-activations, also times norms, and a mask of those to leave out.
        2 * weight_FD + 2.25 * acts_BF,
        # The gradients: both weights', and those of the dead features' weights.
        4 * weight_FD,
    ]
