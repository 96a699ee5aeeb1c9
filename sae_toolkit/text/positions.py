"""Which positions an SAE is trained on, stands in at, and is scored on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class PositionFilter:
    """Leaves out special tokens, the first positions of a context, and massive activations.

    The norm of the first position's activation can be hundreds of times the median token's, and a few other
    tokens' as well (Sun et al. 2024, "Massive Activations in Large Language Models"); trained and scored with
    them, mean squared error and explained variance measure little else.

    Args:
        special_token_ids: tokens left out wherever they stand.
        skip_positions: how many positions at the start of a context are left out.
        max_activation_norm: activations with a larger L2 norm are left out; None keeps all.
    """

    special_token_ids: tuple[int, ...] = ()
    skip_positions: int = 0
    max_activation_norm: float | None = None

    def keeps_tokens(self, tokens_BT: np.ndarray) -> np.ndarray:
        """[B, T] booleans: False at special tokens and skipped positions."""
        keep_BT = ~np.isin(tokens_BT, self.special_token_ids)
        keep_BT[:, : self.skip_positions] = False
        return keep_BT

    def keeps_norms(self, acts: torch.Tensor) -> torch.Tensor:
        """Booleans of the shape of `acts` without its last axis: False at massive activations."""
        if self.max_activation_norm is None:
            return torch.ones(acts.shape[:-1], dtype=torch.bool, device=acts.device)
        return acts.float().norm(dim=-1) <= self.max_activation_norm
