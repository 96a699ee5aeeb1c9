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
from sae_toolkit.steps.active_features import ActiveFeatures, Reconstruction, reconstruct
from sae_toolkit.steps.auxiliary_loss import DeadFeatures, find_dead_features, reconstruct_with_dead
from sae_toolkit.steps.selection import GlobalBatchTopK, among_largest, largest, largest_of_rows


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
    # Whether the encoder's product takes its inputs in bfloat16 and gives float32.
    encodes_in_bfloat16: bool = False
    # The ranks that hold the shards.
    shards: Ranks = ALONE

    def __init__(self, cfg: TopKTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.W_enc.data = self.W_enc.data.t().contiguous().t()

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        dead = find_dead_features(step_input.dead_neuron_mask, self.dead_bound, self.shards)
        with torch.no_grad():
            sae_in_BD = self.process_sae_in(step_input.sae_in)
            norm_F = self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None
            scaled_BF = self._scaled_pre_activations(sae_in_BD, norm_F)
            active, scaled_N = self._select(scaled_BF)
            scaled_N = scaled_N.to(sae_in_BD.dtype)  # under autocast the product is in bfloat16
            pre_N = scaled_N if norm_F is None else scaled_N / norm_F[active.features_N]
            del scaled_BF
            feature_acts = torch.sparse_coo_tensor(
                torch.stack((active.rows_N, active.features_N)),
                scaled_N.relu(),
                (active.n_rows, active.n_features),
                check_invariants=False,
            )

        reconstruction = reconstruct(
            pre_N,
            sae_in_BD,
            self.W_enc,
            self.b_enc,
            self.b_dec if self.cfg.apply_b_dec_to_input else None,
            self.W_dec,
            active,
            active.features_N[:0] if dead is None else dead.features_C,
        )
        recons_BD = reconstruction.of_active_BD + self.b_dec / self.shards.size
        sae_out = self.hook_sae_recons(self._of_all_shards(recons_BD))
        sae_out = self.reshape_fn_out(self.run_time_activation_norm_fn_out(sae_out), self.d_head)

        mse_loss = self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
        auxiliary_loss = sae_out.new_zeros(())
        if dead is not None:
            auxiliary_loss = self._auxiliary_loss(step_input.sae_in, sae_out, sae_in_BD, norm_F, reconstruction, dead)
        losses = {"mse_loss": mse_loss, "auxiliary_reconstruction_loss": auxiliary_loss}
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            feature_acts=feature_acts,
            hidden_pre=sae_in_BD.new_empty(0),
            loss=sum(losses.values(), start=sae_out.new_zeros(())),
            losses=losses,
        )

    def _scaled_pre_activations(self, sae_in_BD: Tensor, norm_F: Tensor | None) -> Tensor:
        """Returns the pre-activations of all features times their decoder norms, [B, F].

        Args:
            sae_in_BD: input of the encoder.
            norm_F: the decoder norms; None to return pre-activations as they are.
        """
        if self.encodes_in_bfloat16 and not torch.is_autocast_enabled(sae_in_BD.device.type):
            return bfloat16_linear(sae_in_BD, self.W_enc.t(), self.b_enc, norm_F)
        pre_BF = F.linear(sae_in_BD, self.W_enc.t(), self.b_enc)
        if norm_F is None:
            return pre_BF
        # in place, unless autocast made the product bfloat16
        return pre_BF.mul_(norm_F) if pre_BF.dtype == norm_F.dtype else pre_BF * norm_F

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

    def _auxiliary_loss(
        self, acts_BD: Tensor, sae_out: Tensor, sae_in_BD: Tensor, norm_F: Tensor | None,
        reconstruction: Reconstruction, dead: DeadFeatures,
    ) -> Tensor:  # fmt: skip
        """Returns SAELens's `calculate_topk_aux_loss`.

        Args:
            acts_BD: what the SAE reconstructs.
            sae_out: its reconstruction.
            sae_in_BD: input of the encoder.
            norm_F: decoder norms; None if they do not matter to the selection.
            reconstruction: holds the dead features' weights.
            dead: the dead features.
        """
        half = acts_BD.shape[-1] // 2
        part_BD = reconstruct_with_dead(sae_in_BD, reconstruction, dead, half=half, norm_F=norm_F, shards=self.shards)
        recons_BD = self.reshape_fn_out(self._of_all_shards(part_BD), self.d_head)
        residual_BD = (acts_BD - sae_out).detach()
        scale = (dead.n_dead.to(sae_out.dtype) / half).clamp(max=1.0)
        squared = F.mse_loss(recons_BD, residual_BD, reduction="sum")
        return self.cfg.aux_loss_coefficient * scale * squared * (acts_BD.shape[-1] / acts_BD.numel())


class _SumOfParts(torch.autograd.Function):
    """Sums a tensor over the shards. In the backward pass each shard gets the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, part_BD: Tensor, shards: Ranks) -> Tensor:
        return shards.sum(part_BD.clone())

    @staticmethod
    def backward(ctx: Any, grad_BD: Tensor) -> Any:
        return grad_BD, None


def bfloat16_linear(x_BD: Tensor, W_FD: Tensor, b_F: Tensor, scale_F: Tensor | None = None) -> Tensor:
    """Returns (x @ W.T + b) * scale in float32, [B, F]. The product takes its inputs in bfloat16 and sums in float32.

    The scale is multiplied into W while W is converted, so that it takes no pass over the result.
    """
    W = torch.empty_like(W_FD, dtype=torch.bfloat16)
    if scale_F is None:
        W.copy_(W_FD)
    else:
        torch.mul(W_FD, scale_F[:, None], out=W)
        b_F = b_F * scale_F
    x = x_BD.to(torch.bfloat16)
    if x.device.type == "cpu":  # which has no such product; this one differs in the order of its sums only
        return F.linear(x.float(), W.float(), b_F)
    return torch.addmm(b_F, x, W.t(), out_dtype=torch.float32)


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


def crossover(device: str, d_in: int) -> float:
    """Returns how many features there must be for each active one, for the sparse step to be faster than SAELens's.

    On a CPU it was measured (BENCHMARKS.md). On a CUDA device it is computed, with products in TF32 at 400 TFLOP/s and
    bytes at 3 TB/s. For a token and a feature, SAELens's step has 5 more products of 2 D operations, and moves about
    160 bytes more. For an active entry the sparse step gathers three times D numbers of 4 bytes.
    """
    if torch.device(device).type == "cpu":
        return 8
    return (12 * d_in / 3e12) / (10 * d_in / 400e12 + 160 / 3e12)


def sparse_class(
    sae_class: type[TrainingSAE[Any]], cfg: TrainingSAEConfig, *, compiled: bool = False
) -> type[TrainingSAE[Any]]:
    """Returns the class to train with: this module's equivalent of `sae_class` if that is faster, else `sae_class`.

    Args:
        sae_class: SAELens's training class.
        cfg: the SAE's configuration.
        compiled: whether the step is compiled with torch.compile, which is offered for SAELens's own classes only.
    """
    # Sparse tensors are not complete on mps.
    few = isinstance(cfg, TopKTrainingSAEConfig) and cfg.d_sae >= crossover(cfg.device, cfg.d_in) * cfg.k
    if compiled or not few or cfg.dtype not in ("float32", "float64") or cfg.device == "mps":
        return sae_class
    return SPARSE_CLASSES.get(sae_class, sae_class)
