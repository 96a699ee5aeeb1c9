"""Products with a sparse matrix [B, F] whose nonzero entries are the active features of a batch.

Shapes: B tokens, D = d_in, F = d_sae, N active entries, which are the active features of all tokens together.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class ActiveFeatures:
    """The positions of the active entries in a matrix [B, F], ordered by row.

    Args:
        features_N: the columns of the entries.
        rows_N: the rows of the entries, ascending.
        shape: B and F.
    """

    def __init__(self, features_N: Tensor, rows_N: Tensor, shape: tuple[int, int]) -> None:
        self.features_N = features_N
        self.rows_N = rows_N
        self.n_rows, self.n_features = shape

    @cached_property
    def row_starts_B(self) -> Tensor:
        """The index of each row's first entry."""
        return _starts(self.rows_N, self.n_rows)

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor]:
        """The permutation [N] that sorts the entries by feature, and each feature's first index in it [F]."""
        return self.features_N.int().argsort(stable=True), _starts(self.features_N, self.n_features)

    def matmul(self, values_N: Tensor, W_FD: Tensor) -> Tensor:
        """Returns the matrix with these values times W, [B, D]."""
        return F.embedding_bag(
            self.features_N, W_FD, self.row_starts_B, mode="sum", per_sample_weights=values_N.to(W_FD.dtype)
        )

    def t_matmul(self, values_N: Tensor, X_BD: Tensor) -> Tensor:
        """Returns the transpose of the matrix with these values times X, [F, D]."""
        order_N, feature_starts_F = self.by_feature
        values_N = values_N[order_N].to(X_BD.dtype)
        return F.embedding_bag(self.rows_N[order_N], X_BD, feature_starts_F, mode="sum", per_sample_weights=values_N)

    def sum_by_feature(self, values_N: Tensor) -> Tensor:
        """Returns the column sums of the matrix with these values, [F]."""
        return values_N.new_zeros(self.n_features).index_add_(0, self.features_N, values_N)


def _starts(groups_N: Tensor, n_groups: int) -> Tensor:
    """Returns where each group begins once the entries are sorted by group, [n_groups]."""
    ones_N = torch.ones_like(groups_N)
    counts = groups_N.new_zeros(n_groups).scatter_add_(0, groups_N, ones_N)
    return counts.cumsum(0) - counts


class _PreActivations(torch.autograd.Function):
    """Computes gradients of the active entries of (x - b_dec) @ W_enc + b_enc. Their values are given."""

    @staticmethod
    def forward(
        ctx: Any, pre_N: Tensor, sae_in_BD: Tensor, W_enc_DF: Tensor, _b_enc_F: Tensor, _b_dec_D: Tensor | None,
        active: ActiveFeatures,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(sae_in_BD, W_enc_DF)
        ctx.active = active
        return pre_N.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> Any:
        sae_in_BD, W_enc_DF = ctx.saved_tensors
        grad_W_enc_FD = ctx.active.t_matmul(grad_N, sae_in_BD)
        grad_b_enc_F = ctx.active.sum_by_feature(grad_N)
        grad_b_dec_D = -(W_enc_DF @ grad_b_enc_F) if ctx.needs_input_grad[4] else None
        return None, None, grad_W_enc_FD.t(), grad_b_enc_F, grad_b_dec_D, None


class _Decode(torch.autograd.Function):
    """The matrix of active features times W_dec."""

    @staticmethod
    def forward(ctx: Any, values_N: Tensor, W_dec_FD: Tensor, active: ActiveFeatures) -> Tensor:
        ctx.save_for_backward(values_N)
        ctx.active = active
        with torch.enable_grad():  # torch computes the gradient of the values; that of W_dec is below
            ctx.values_N = values_N.detach().requires_grad_()
            ctx.out_BD = active.matmul(ctx.values_N, W_dec_FD.detach())
        return ctx.out_BD.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BD: Tensor) -> Any:
        (grad_values_N,) = torch.autograd.grad(ctx.out_BD, ctx.values_N, grad_BD)
        (values_N,) = ctx.saved_tensors
        return grad_values_N, ctx.active.t_matmul(values_N, grad_BD), None


def pre_activations(
    pre_N: Tensor, sae_in_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor, b_dec_D: Tensor | None, active: ActiveFeatures
) -> Tensor:
    """Returns the pre-activations [N] of the active entries, with gradients to the encoder's parameters and b_dec.

    Args:
        pre_N: the pre-activations, which were computed without gradients.
        sae_in_BD: the encoder's input, after b_dec was subtracted.
        b_dec_D: None if it was not subtracted.
        active: the active entries.
    """
    return _PreActivations.apply(pre_N, sae_in_BD, W_enc_DF, b_enc_F, b_dec_D, active)


def decode(values_N: Tensor, W_dec_FD: Tensor, active: ActiveFeatures) -> Tensor:
    """Returns the matrix of active features times W_dec, [B, D], with gradients."""
    return _Decode.apply(values_N, W_dec_FD, active)
