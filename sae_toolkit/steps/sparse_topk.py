"""TopK and BatchTopK SAEs whose training step computes with the active features only, forward and backward.

SAELens multiplies dense activations [B, F] with the decoder, and its gradients are dense products too, although only
k of F activations are not zero. Here the only dense product is the encoder's, which the selection needs. The classes
inherit from SAELens's, so configuration, weights and checkpoints are the same.

Shapes: B tokens, D = d_in, F = d_sae, K = k, N active features of all tokens together (k x B), C dead features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor

from sae_toolkit.distributed.ranks import ALONE, Ranks
from sae_toolkit.steps.active_features import ActiveFeatures, decode, pre_activations
from sae_toolkit.steps.selection import GlobalBatchTopK, among_largest, largest, largest_of_rows

# With fewer than this many features for each active one, SAELens's dense products are as fast. The number for CPUs was
# measured (BENCHMARKS.md). The number for CUDA is an estimate that compares 4 bytes x k x D gathered with 2 x D x F
# operations in TF32.
CROSSOVER = {"cpu": 8, "cuda": 256}

# The auxiliary loss rounds its number of features up to a multiple of this, because each new size of its products costs
# memory: on a CPU oneDNN keeps data for each size (2 GiB after some hundred sizes), on CUDA the allocator keeps blocks.
_FEW_SIZES = 256


class SparseTopKTrainingSAE(TopKTrainingSAE):
    """SAELens's TopKTrainingSAE with a faster step. The results differ by rounding only.

    A feature's activation is its pre-activation times its decoder norm, and decoding divides by the norm. So the
    norm affects the selection only, and its gradient is zero.

    `W_enc` keeps its shape [D, F], but each feature's D weights are contiguous in memory. `feature_acts` of a step's
    output is a sparse COO tensor; `hidden_pre`, which would be [B, F], is empty.

    The SAE can be one of several shards, which hold equally many features each. All shards take the same batch. The
    losses and `sae_out` are those of the whole SAE. The gradient of `b_dec` is that of the whole SAE only after it is
    summed over the shards.
    """

    # Upper bounds of the number of dead features: in all shards together, and in the shard with the most. If this is
    # None, the numbers are read from the device, and the step waits for that.
    dead_bound: tuple[int, int] | None = None
    # The ranks that hold the shards.
    shards: Ranks = ALONE

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
            else:  # in place, unless autocast made the product bfloat16
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
        values_N = pre_activations(pre_N, sae_in_BD, self.W_enc, self.b_enc, b_dec, active).relu()
        recons_BD = decode(values_N, self.W_dec, active) + self.b_dec / self.shards.size
        sae_out = self.hook_sae_recons(self._of_all_shards(recons_BD))
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
        """Selects the active features. Returns them and their pre-activations times decoder norms, [N]."""
        n_rows, n_features = scaled_BF.shape
        k, shape = int(self.cfg.k), (n_rows, n_features)
        values_BK, features_BK = largest_of_rows(scaled_BF, k)
        rows_BK = torch.arange(n_rows, device=scaled_BF.device)[:, None].expand_as(features_BK)
        if self.shards.is_alone:
            return ActiveFeatures(features_BK.flatten(), rows_BK.flatten(), shape), values_BK.flatten()
        chosen_BK = among_largest(values_BK, k, self.shards)
        return ActiveFeatures(features_BK[chosen_BK], rows_BK[chosen_BK], shape), values_BK[chosen_BK]

    def _of_all_shards(self, part_BD: Tensor) -> Tensor:
        return part_BD if self.shards.is_alone else _SumOfParts.apply(part_BD, self.shards)

    def _auxiliary_loss(self, step_input: TrainStepInput, sae_out: Tensor) -> Tensor:
        """Returns SAELens's `calculate_topk_aux_loss`, computed from the dead features' weights only.

        With a `dead_bound` the number of dead features is not read from the device. The loss is then computed with as
        many features as the bound allows, and the features that are not dead are masked.
        """
        dead_F = step_input.dead_neuron_mask
        if dead_F is None:
            return sae_out.new_zeros(())
        bound, most = self.dead_bound or 2 * (int(dead_F.sum()),)
        if bound == 0:
            return sae_out.new_zeros(())
        n_here = min(-(-most // _FEW_SIZES) * _FEW_SIZES, len(dead_F))
        dead_C = torch.nonzero_static(dead_F, size=n_here, fill_value=0).squeeze(1)
        is_dead_C = torch.arange(n_here, device=dead_C.device) < dead_F.sum()
        n_dead = self.shards.sum(dead_F.sum())

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
                scaled_BC = torch.where(is_dead_C, scaled_BC, -torch.inf)
                values, columns = scaled_BC.topk(min(half, n_here), dim=-1, sorted=False)
                chosen = among_largest(values, half, self.shards)
                keep_BC = is_dead_C & torch.zeros_like(pre_BC, dtype=torch.bool).scatter_(1, columns, chosen)
        pre_BC = torch.where(keep_BC, pre_BC, 0.0)
        recons_BD = self.reshape_fn_out(self._of_all_shards(pre_BC @ W_dec_CD), self.d_head)
        residual_BD = (step_input.sae_in - sae_out).detach()
        scale = (n_dead.to(sae_out.dtype) / half).clamp(max=1.0)
        return self.cfg.aux_loss_coefficient * scale * (recons_BD - residual_BD).pow(2).sum(dim=-1).mean()


class _SumOfParts(torch.autograd.Function):
    """Sums a tensor over the shards. In the backward pass each shard gets the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, part_BD: Tensor, shards: Ranks) -> Tensor:
        return shards.sum(part_BD.clone())

    @staticmethod
    def backward(ctx: Any, grad_BD: Tensor) -> Any:
        return grad_BD, None


class SparseBatchTopKTrainingSAE(BatchTopKTrainingSAE, SparseTopKTrainingSAE):
    """SAELens's BatchTopKTrainingSAE with a faster step. The results differ by rounding only."""

    cfg: BatchTopKTrainingSAEConfig
    topk_threshold: Tensor

    def _select(self, scaled_BF: Tensor) -> tuple[ActiveFeatures, Tensor]:
        flat = scaled_BF.flatten()
        if isinstance(self.activation_fn, GlobalBatchTopK):
            chosen_N = self.activation_fn.choose(flat)
        else:
            chosen_N = largest(flat, int(self.cfg.k * len(scaled_BF)))
        rows_N = chosen_N // scaled_BF.shape[1]
        features_N = chosen_N - rows_N * scaled_BF.shape[1]
        return ActiveFeatures(features_N, rows_N, (scaled_BF.shape[0], scaled_BF.shape[1])), flat[chosen_N]

    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: Tensor) -> None:
        """Updates SAELens's running mean of the smallest activation, without waiting for the device."""
        values_N = acts_topk._values()
        positive_N = torch.cat((torch.where(values_N > 0, values_N, torch.inf), values_N.new_full((1,), torch.inf)))
        smallest = self.shards.minimum(positive_N.min().to(self.topk_threshold.dtype))
        moved = torch.lerp(self.topk_threshold, smallest, self.cfg.topk_threshold_lr)
        usable = smallest.isfinite() & values_N.isfinite().all()
        self.topk_threshold = torch.where(usable, moved, self.topk_threshold)


SPARSE_CLASSES: dict[type[TrainingSAE[Any]], type[SparseTopKTrainingSAE]] = {
    TopKTrainingSAE: SparseTopKTrainingSAE,
    BatchTopKTrainingSAE: SparseBatchTopKTrainingSAE,
}


def sparse_class(
    sae_class: type[TrainingSAE[Any]], cfg: TrainingSAEConfig, *, compiled: bool = False
) -> type[TrainingSAE[Any]]:
    """Returns the class to train with: this module's equivalent of `sae_class` if that is faster, else `sae_class`.

    Args:
        sae_class: SAELens's training class.
        cfg: the SAE's configuration.
        compiled: whether the step is compiled with torch.compile, which is offered for SAELens's own classes only.
    """
    crossover = CROSSOVER.get(torch.device(cfg.device).type, max(CROSSOVER.values()))
    few = isinstance(cfg, TopKTrainingSAEConfig) and cfg.d_sae >= crossover * cfg.k
    if compiled or not few or cfg.dtype not in ("float32", "float64"):
        return sae_class
    return SPARSE_CLASSES.get(sae_class, sae_class)
