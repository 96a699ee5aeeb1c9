"""Products with a sparse matrix [B, F] whose nonzero entries are the active features of a batch.

Shapes: B tokens, D = d_in, F = d_sae, N active entries, which are the active features of all tokens together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_toolkit.steps import feature_kernel


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
        # index_add_ would add in another order each time on a CUDA device, and a resumed run would not be bit-equal.
        return self.t_matmul(values_N, values_N.new_ones(self.n_rows, 1)).squeeze(1)

    def gradients(
        self, values_N: Tensor, grad_BD: Tensor, sae_in_BD: Tensor, W_dec_FD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of W_enc [F, D], b_enc [F] and W_dec [F, D].

        Args:
            values_N: activations of the entries. An activation of 0 passes no gradient on, as behind a ReLU.
            grad_BD: gradient of the reconstruction.
            sae_in_BD: input of the encoder.
            W_dec_FD: decoder.
        """
        if feature_kernel.serves(W_dec_FD):
            order_N, starts_F = self.by_feature
            rows_N = self.rows_N[order_N]
            return feature_kernel.gradients(values_N[order_N], rows_N, starts_F, grad_BD, sae_in_BD, W_dec_FD)
        grad_pre_N = self.gradient_of_values(grad_BD, W_dec_FD).where(values_N > 0, 0.0)
        return (
            self.t_matmul(grad_pre_N, sae_in_BD),
            self.sum_by_feature(grad_pre_N),
            self.t_matmul(values_N, grad_BD),
        )

    def gradient_of_values(self, grad_BD: Tensor, W_dec_FD: Tensor) -> Tensor:
        """Returns the product of each entry's gradient row and decoder vector, [N]."""
        # The operator with which torch differentiates `embedding_bag`; 0 stands for mode="sum".
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad_BD, W_dec_FD, self.features_N, self.row_starts_B, self.rows_N, 0
        )


def _starts(groups_N: Tensor, n_groups: int) -> Tensor:
    """Returns where each group begins once the entries are sorted by group, [n_groups]."""
    ones_N = torch.ones_like(groups_N)
    counts = groups_N.new_zeros(n_groups).scatter_add_(0, groups_N, ones_N)
    return counts.cumsum(0) - counts


class _Reconstruct(torch.autograd.Function):
    """See `reconstruct`. The gradient of every weight is one tensor, and no tensor [B, F] exists."""

    @staticmethod
    def forward(
        ctx: Any, pre_N: Tensor, sae_in_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor, b_dec_D: Tensor | None,
        W_dec_FD: Tensor, active: ActiveFeatures, others_C: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        values_N = pre_N.relu()
        ctx.save_for_backward(values_N, sae_in_BD, W_enc_DF, W_dec_FD, others_C)
        ctx.active = active
        return (
            active.matmul(values_N, W_dec_FD),
            W_enc_DF.t().index_select(0, others_C),
            b_enc_F.index_select(0, others_C),
            W_dec_FD.index_select(0, others_C),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BD: Tensor, grad_enc_CD: Tensor, grad_b_enc_C: Tensor, grad_dec_CD: Tensor) -> Any:
        values_N, sae_in_BD, W_enc_DF, W_dec_FD, others_C = ctx.saved_tensors
        grad_W_enc_FD, grad_b_enc_F, grad_W_dec_FD = ctx.active.gradients(values_N, grad_BD, sae_in_BD, W_dec_FD)
        grad_W_enc_FD.index_add_(0, others_C, grad_enc_CD)
        grad_b_enc_F.index_add_(0, others_C, grad_b_enc_C)
        grad_W_dec_FD.index_add_(0, others_C, grad_dec_CD)
        grad_b_dec_D = -(W_enc_DF @ grad_b_enc_F) if ctx.needs_input_grad[4] else None
        return None, None, grad_W_enc_FD.t(), grad_b_enc_F, grad_b_dec_D, grad_W_dec_FD, None, None


@dataclass(frozen=True)
class Reconstruction:
    """What `reconstruct` returns.

    Args:
        of_active_BD: the sum of each token's decoder vectors, times the features' activations, without b_dec.
        W_enc_CD: encoder vectors of the other features.
        b_enc_C: their biases.
        W_dec_CD: their decoder vectors.
    """

    of_active_BD: Tensor
    W_enc_CD: Tensor
    b_enc_C: Tensor
    W_dec_CD: Tensor


def reconstruct(
    pre_N: Tensor, sae_in_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor, b_dec_D: Tensor | None, W_dec_FD: Tensor,
    active: ActiveFeatures, others_C: Tensor,
) -> Reconstruction:  # fmt: skip
    """Reconstructs activations from the active features, and takes out the weights of other features.

    All weights get gradients: through the reconstruction as if the pre-activations had been computed as
    (x - b_dec) @ W_enc + b_enc, and through the weights that are taken out. Both are added up in the same tensors. If
    the caller uses the weights that are taken out as `sae_in_BD @ W_enc_CD.T + b_enc_C`, b_dec gets its gradient too.

    Args:
        pre_N: pre-activations of the active entries, computed without gradients.
        sae_in_BD: input of the encoder, after b_dec was subtracted; without gradients.
        W_enc_DF, b_enc_F, W_dec_FD: weights.
        b_dec_D: the bias that was subtracted; None if none was.
        active: the active entries.
        others_C: features whose weights are taken out. They may be none, and may occur several times.
    """
    return Reconstruction(*_Reconstruct.apply(pre_N, sae_in_BD, W_enc_DF, b_enc_F, b_dec_D, W_dec_FD, active, others_C))
