"""Chooses the features that tell two classes apart, and returns their activations."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sae_lens import SAE

from sae_toolkit.evaluation.metrics import chunk_length

_SMALL = 1e-6
_CHUNK_VALUES = 2**25  # 128 MiB in float32


@torch.no_grad()
def rank_features(sae: SAE[Any], acts_ND: torch.Tensor, y_N: np.ndarray) -> torch.Tensor:
    """Returns all features [F], ordered by how far their means in two classes differ, the farthest first.

    The activations of each feature are divided by their mean over the examples in which it fires. This is the
    selection of sae-probes 0.4.2 (sae_probes/run_sae_evals.py, `get_sorted_indices` and `mean_act_normalization`).
    The features are computed for some examples at a time, and only sums of them are kept.

    Args:
        sae: the SAE.
        acts_ND: activations at its hook. Only those of examples to train on: the choice must not see the others.
        y_N: class of each example, 0 or 1.
    """
    label_N = torch.from_numpy(y_N)
    sum_CF = torch.zeros(2, sae.cfg.d_sae, dtype=torch.double)
    absolute_F, fired_F = torch.zeros_like(sum_CF[0]), torch.zeros_like(sum_CF[0])
    n = _examples_at_once(sae)
    for chunk_ND, chunk_N in zip(acts_ND.split(n), label_N.split(n), strict=True):
        features_NF = sae.encode(chunk_ND.to(sae.device, torch.float32))
        absolute_F += features_NF.abs().sum(0).cpu()
        fired_F += (features_NF != 0).sum(0).cpu()
        for label in (0, 1):
            sum_CF[label] += features_NF[(chunk_N == label).to(features_NF.device)].sum(0).cpu()
    scale_F = absolute_F / (fired_F + _SMALL) + _SMALL
    mean_CF = sum_CF / label_N.bincount(minlength=2)[:, None]
    return ((mean_CF[1] - mean_CF[0]) / scale_F).abs().argsort(descending=True, stable=True)


@torch.no_grad()
def feature_columns(sae: SAE[Any], acts_ND: torch.Tensor, features_K: torch.Tensor) -> np.ndarray:
    """Returns the activations [N, K] of some features in float32, computed for some examples at a time."""
    n = _examples_at_once(sae)
    columns = [
        sae.encode(chunk_ND.to(sae.device, torch.float32))[:, features_K.to(sae.device)].float().cpu()
        for chunk_ND in acts_ND.split(n)
    ]
    return torch.cat(columns).numpy()


def _examples_at_once(sae: SAE[Any]) -> int:
    return chunk_length(4 * sae.cfg.d_sae, _CHUNK_VALUES)  # a few tensors of examples x features exist at a time
