"""TopK and BatchTopK whose training step touches the active features only, forward and backward.

SAELens multiplies dense [B, F] activations with the decoder, and its gradients are dense products too, although
k of F activations are not zero. Here one dense product is left, the encoder's, which the selection needs. The
classes are SAELens's own by inheritance: configuration, weights and checkpoints do not differ.

Shapes: B tokens, D = d_in, F = d_sae, K = k, N active features of all tokens together (k x B), C dead features.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sae_lens.saes.batchtopk_sae import BatchTopK, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_toolkit.ranks import Ranks

# Below this many features for each active one, SAELens's dense products are as fast: on a CPU as measured
# (BENCHMARKS.md); on a CUDA device by arithmetic, 4 bytes x k x D gathered against 2 x D x F operations in TF32.
CROSSOVER = {"cpu": 8, "cuda": 256}


class ActiveFeatures:
    """The places in a [B, F] matrix that are active, row after row.

    Args:
        features_N: their columns.
        rows_N: their rows, ascending.
        shape: B and F.
    """

    def __init__(self, features_N: Tensor, rows_N: Tensor, shape: tuple[int, int]) -> None:
        self.features_N = features_N
        self.rows_N = rows_N
        self.n_rows, self.n_features = shape

    @cached_property
    def row_starts_B(self) -> Tensor:
        return _starts(self.rows_N, self.n_rows)

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor]:
        """The order [N] that sorts the places by feature, and where each feature starts in it [F]."""
        return self.features_N.int().argsort(stable=True), _starts(self.features_N, self.n_features)

    def matmul(self, values_N: Tensor, W_FD: Tensor) -> Tensor:
        """The matrix, with these values, times W: [B, D]."""
        return F.embedding_bag(
            self.features_N, W_FD, self.row_starts_B, mode="sum", per_sample_weights=values_N.to(W_FD.dtype)
        )

    def t_matmul(self, values_N: Tensor, X_BD: Tensor) -> Tensor:
        """The matrix's transpose, with these values, times X: [F, D]."""
        order_N, feature_starts_F = self.by_feature
        values_N = values_N[order_N].to(X_BD.dtype)
        return F.embedding_bag(self.rows_N[order_N], X_BD, feature_starts_F, mode="sum", per_sample_weights=values_N)

    def sum_by_feature(self, values_N: Tensor) -> Tensor:
        """The matrix's column sums: [F]."""
        return values_N.new_zeros(self.n_features).index_add_(0, self.features_N, values_N)


def _starts(groups_N: Tensor, n_groups: int) -> Tensor:
    ones_N = torch.ones_like(groups_N)
    counts = groups_N.new_zeros(n_groups).scatter_add_(0, groups_N, ones_N)
    return counts.cumsum(0) - counts


class _PreActivations(torch.autograd.Function):
    """Gradients of (x - b_dec) @ W_enc + b_enc at the active places, whose values are given."""

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
    """The active features' values times W_dec."""

    @staticmethod
    def forward(ctx: Any, values_N: Tensor, W_dec_FD: Tensor, active: ActiveFeatures) -> Tensor:
        ctx.save_for_backward(values_N)
        ctx.active = active
        with torch.enable_grad():  # torch's own backward gives the gradient of the values, not that of W_dec
            ctx.values_N = values_N.detach().requires_grad_()
            ctx.out_BD = active.matmul(ctx.values_N, W_dec_FD.detach())
        return ctx.out_BD.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BD: Tensor) -> Any:
        (grad_values_N,) = torch.autograd.grad(ctx.out_BD, ctx.values_N, grad_BD)
        (values_N,) = ctx.saved_tensors
        return grad_values_N, ctx.active.t_matmul(values_N, grad_BD), None


class SparseTopKTrainingSAE(TopKTrainingSAE):
    """SAELens's TopKTrainingSAE; the step's result is the same but for rounding.

    A feature's activation is its pre-activation times its decoder norm, and decoding divides by the norm, so the
    norm takes part in the selection only and its gradient is zero.

    `W_enc` keeps its shape [D, F], with the features' rows contiguous in memory. `feature_acts` of a step's output
    is a sparse COO tensor; `hidden_pre`, which would be [B, F], is empty.
    """

    # At most how many features are dead, where the caller knows without asking the device; None asks it.
    dead_bound: int | None = None

    def __init__(self, cfg: TopKTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.W_enc.data = self.W_enc.data.t().contiguous().t()

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        with torch.no_grad():
            sae_in_BD = self.process_sae_in(step_input.sae_in)
            pre_BF = F.linear(sae_in_BD, self.W_enc.t(), self.b_enc)
            norm_F = self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None
            if norm_F is None:
                scaled_BF = pre_BF
            else:  # in place, but where autocast made the product bfloat16
                scaled_BF = pre_BF.mul_(norm_F) if pre_BF.dtype == norm_F.dtype else pre_BF * norm_F
            active, scaled_N = self._select(scaled_BF)
            scaled_N = scaled_N.to(sae_in_BD.dtype)  # under autocast the product is in bfloat16
            pre_N = scaled_N if norm_F is None else scaled_N / norm_F[active.features_N]
            del pre_BF, scaled_BF
            feature_acts = torch.sparse_coo_tensor(
                torch.stack((active.rows_N, active.features_N)),
                scaled_N.relu(),
                (active.n_rows, active.n_features),
                check_invariants=False,
            )

        b_dec = self.b_dec if self.cfg.apply_b_dec_to_input else None
        values_N = _PreActivations.apply(pre_N, sae_in_BD, self.W_enc, self.b_enc, b_dec, active).relu()
        sae_out = self.hook_sae_recons(_Decode.apply(values_N, self.W_dec, active) + self.b_dec)
        sae_out = self.reshape_fn_out(self.run_time_activation_norm_fn_out(sae_out), self.d_head)

        mse_loss = self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
        losses = {"mse_loss": mse_loss, "auxiliary_reconstruction_loss": self._auxiliary_loss(step_input, sae_out)}
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            feature_acts=feature_acts,
            hidden_pre=sae_in_BD.new_empty(0),
            loss=sum(losses.values(), start=sae_out.new_zeros(())),
            losses=losses,
        )

    def _select(self, scaled_BF: Tensor) -> tuple[ActiveFeatures, Tensor]:
        """The active places, and the scaled pre-activations there."""
        n_rows, n_features = scaled_BF.shape
        values_BK, features_BK = scaled_BF.topk(int(self.cfg.k), dim=-1, sorted=False)
        rows_BK = torch.arange(n_rows, device=scaled_BF.device)[:, None].expand_as(features_BK)
        return ActiveFeatures(features_BK.flatten(), rows_BK.flatten(), (n_rows, n_features)), values_BK.flatten()

    def _auxiliary_loss(self, step_input: TrainStepInput, sae_out: Tensor) -> Tensor:
        """SAELens's `calculate_topk_aux_loss`, computed on the dead features' rows alone.

        On a device the number of dead features stays there: as many rows as `dead_bound` allows are taken, and
        those beyond the dead are masked.
        """
        dead_F = step_input.dead_neuron_mask
        if dead_F is None:
            return sae_out.new_zeros(())
        bound = int(dead_F.sum()) if self.dead_bound is None else min(self.dead_bound, len(dead_F))
        if bound == 0:
            return sae_out.new_zeros(())
        n_dead = dead_F.sum()
        dead_C = torch.nonzero_static(dead_F, size=bound, fill_value=0).squeeze(1)
        is_dead_C = torch.arange(bound, device=dead_C.device) < n_dead

        W_dec_CD = self.W_dec.index_select(0, dead_C)
        pre_BC = F.linear(
            self.process_sae_in(step_input.sae_in),
            self.W_enc.t().index_select(0, dead_C),
            self.b_enc.index_select(0, dead_C),
        )
        keep_BC = is_dead_C
        half = step_input.sae_in.shape[-1] // 2  # Gao et al. 2024, appendix B.1
        if bound > half:
            with torch.no_grad():
                scaled_BC = pre_BC * W_dec_CD.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else pre_BC
                largest_BC = torch.where(is_dead_C, scaled_BC, -torch.inf).topk(half, dim=-1, sorted=False).indices
                keep_BC = is_dead_C & torch.zeros_like(pre_BC, dtype=torch.bool).scatter_(1, largest_BC, True)
        pre_BC = torch.where(keep_BC, pre_BC, 0.0)
        recons_BD = self.reshape_fn_out(pre_BC @ W_dec_CD, self.d_head)
        residual_BD = (step_input.sae_in - sae_out).detach()
        scale = (n_dead.to(sae_out.dtype) / half).clamp(max=1.0)
        return self.cfg.aux_loss_coefficient * scale * (recons_BD - residual_BD).pow(2).sum(dim=-1).mean()


class SparseBatchTopKTrainingSAE(BatchTopKTrainingSAE, SparseTopKTrainingSAE):
    """SAELens's BatchTopKTrainingSAE; the step's result is the same but for rounding."""

    cfg: BatchTopKTrainingSAEConfig
    topk_threshold: Tensor

    def _select(self, scaled_BF: Tensor) -> tuple[ActiveFeatures, Tensor]:
        flat = scaled_BF.flatten()
        if isinstance(self.activation_fn, GlobalBatchTopK):
            chosen_N = self.activation_fn.choose(flat)
        else:
            chosen_N = _largest(flat, int(self.cfg.k * len(scaled_BF)))
        rows_N = chosen_N // scaled_BF.shape[1]
        features_N = chosen_N - rows_N * scaled_BF.shape[1]
        return ActiveFeatures(features_N, rows_N, (scaled_BF.shape[0], scaled_BF.shape[1])), flat[chosen_N]

    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: Tensor) -> None:
        """SAELens's running mean of the smallest activation, without waiting for the device."""
        values_N = acts_topk._values()
        smallest = torch.where(values_N > 0, values_N, torch.inf).min().to(self.topk_threshold.dtype)
        moved = torch.lerp(self.topk_threshold, smallest, self.cfg.topk_threshold_lr)
        usable = smallest.isfinite() & values_N.isfinite().all()
        self.topk_threshold = torch.where(usable, moved, self.topk_threshold)


class GlobalBatchTopK(BatchTopK):
    """SAELens's BatchTopK over a batch that several ranks share.

    Args:
        k: active features a token, on average.
        n_tokens: tokens in the whole batch.
        ranks: who share it.
    """

    def __init__(self, k: float, n_tokens: int, ranks: Ranks) -> None:
        super().__init__(k)
        self.n_active = int(k * n_tokens)
        self.ranks = ranks

    def choose(self, flat: Tensor) -> Tensor:
        """Indices, ascending, of this rank's values [N] that are among the largest of all."""
        mine_N = _largest(flat, min(self.n_active, len(flat)))
        gathered = self.ranks.gather(flat[mine_N])
        before = sum(map(len, gathered[: self.ranks.rank]))
        values_M = torch.cat(gathered)
        is_chosen_M = torch.zeros_like(values_M, dtype=torch.bool)
        is_chosen_M[_largest(values_M, self.n_active)] = True
        return mine_N[is_chosen_M[before : before + len(mine_N)]]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.relu().flatten()
        chosen_N = self.choose(flat.detach())
        return torch.zeros_like(flat).scatter(-1, chosen_N, flat[chosen_N]).reshape(x.shape)


def select_among(sae: TrainingSAE[Any], ranks: Ranks, n_tokens: int) -> None:
    """Makes a BatchTopK SAE, Matryoshka ones included, select over the whole batch of all ranks, of n_tokens."""
    if isinstance(sae.activation_fn, BatchTopK):
        sae.activation_fn = GlobalBatchTopK(sae.activation_fn.k, n_tokens, ranks)


def _largest(flat: Tensor, n: int) -> Tensor:
    """Indices of the n largest values, ascending."""
    if flat.device.type != "cpu":
        return flat.topk(n, sorted=False).indices.sort().values
    # On a CPU numpy's vectorized partition takes a tenth of the time of torch's topk of a flat tensor.
    values = flat.float().numpy() if flat.dtype == torch.bfloat16 else flat.numpy()
    threshold = np.partition(values, -n)[-n]  # nan counts as the largest, as for torch
    only_nan = np.isnan(threshold)
    chosen = np.flatnonzero(np.isnan(values) if only_nan else ~(values < threshold))
    if len(chosen) > n:
        ties = np.arange(len(chosen)) if only_nan else np.flatnonzero(values[chosen] == threshold)
        chosen = np.delete(chosen, ties[n - len(chosen) :])
    return torch.from_numpy(chosen)


def sparse_class(
    sae_class: type[TrainingSAE[Any]], cfg: TrainingSAEConfig, *, compiled: bool = False
) -> type[TrainingSAE[Any]]:
    """The class to train with: the one here that computes what `sae_class` does, where that is faster.

    Args:
        sae_class: SAELens's class.
        cfg: the SAE's configuration.
        compiled: whether the step will go through torch.compile, which is for SAELens's own.
    """
    crossover = CROSSOVER.get(torch.device(cfg.device).type, max(CROSSOVER.values()))
    few = isinstance(cfg, TopKTrainingSAEConfig) and cfg.d_sae >= crossover * cfg.k
    if compiled or not few or cfg.dtype not in ("float32", "float64"):
        return sae_class
    return {
        TopKTrainingSAE: SparseTopKTrainingSAE,
        BatchTopKTrainingSAE: SparseBatchTopKTrainingSAE,
    }.get(sae_class, sae_class)
