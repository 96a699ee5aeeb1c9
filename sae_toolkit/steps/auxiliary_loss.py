"""SAELens's auxiliary loss of dead features (`calculate_topk_aux_loss`), computed from their weights only.

Shapes: B tokens, D = d_in, F = d_sae, C features that the loss is computed with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_toolkit.distributed.ranks import Ranks
from sae_toolkit.steps.active_features import Reconstruction
from sae_toolkit.steps.selection import among_largest

# The number of features is rounded up to a multiple of this, because each new size of the products costs memory: on a
# CPU oneDNN keeps data for each size (2 GiB after some hundred sizes), on CUDA the allocator keeps blocks.
_FEW_SIZES = 256


@dataclass(frozen=True)
class DeadFeatures:
    """The dead features of a shard, in a tensor whose size is known without waiting for the device.

    Args:
        features_C: dead features. The rest of the tensor is filled with feature 0.
        is_dead_C: False where the tensor is filled up.
        n_dead: number of dead features in all shards, [].
        bound: upper bound of `n_dead`.
    """

    features_C: Tensor
    is_dead_C: Tensor
    n_dead: Tensor
    bound: int


def find_dead_features(dead_F: Tensor | None, bounds: tuple[int, int] | None, shards: Ranks) -> DeadFeatures | None:
    """Returns the dead features; None if there are none.

    Args:
        dead_F: which of this shard's features are dead; None if that is not counted.
        bounds: upper bounds of the number of dead features: in all shards together, and in the shard with the most.
            With None they are read from the device, which has to be waited for.
        shards: the ranks that hold the shards.
    """
    if dead_F is None:
        return None
    bound, most = bounds or 2 * (int(dead_F.sum()),)
    if bound == 0:
        return None
    n_here = min(-(-most // _FEW_SIZES) * _FEW_SIZES, len(dead_F))
    n_dead_here = dead_F.sum()
    return DeadFeatures(
        features_C=torch.nonzero_static(dead_F, size=n_here, fill_value=0).squeeze(1),
        is_dead_C=torch.arange(n_here, device=dead_F.device) < n_dead_here,
        n_dead=shards.sum(n_dead_here.clone()),
        bound=bound,
    )


def reconstruct_with_dead(
    sae_in_BD: Tensor, taken: Reconstruction, dead: DeadFeatures, *, half: int, norm_F: Tensor | None, shards: Ranks
) -> Tensor:
    """Returns the reconstruction [B, D] from this shard's dead features, at most `half` of all shards for each token.

    Args:
        sae_in_BD: input of the encoder, after b_dec was subtracted.
        taken: the dead features' weights.
        dead: the dead features.
        half: half of d_in (Gao et al. 2024, appendix B.1).
        norm_F: decoder norms, by which pre-activations are multiplied to be compared; None to compare them as they are.
        shards: the ranks that hold the shards.
    """
    pre_BC = F.linear(sae_in_BD, taken.W_enc_CD, taken.b_enc_C)
    left_out_BC = ~dead.is_dead_C
    if dead.bound > half:
        norm_C = torch.ones_like(taken.b_enc_C) if norm_F is None else norm_F[dead.features_C]
        left_out_BC = _all_but_largest(pre_BC.detach(), norm_C, dead, half, shards)
    return pre_BC.masked_fill_(left_out_BC, 0.0) @ taken.W_dec_CD


def _all_but_largest(pre_BC: Tensor, norm_C: Tensor, dead: DeadFeatures, half: int, shards: Ranks) -> Tensor:
    """Returns which of this shard's features are not among the `half` largest dead ones of all shards, bool [B, C]."""
    below_C = torch.zeros_like(norm_C).masked_fill_(~dead.is_dead_C, -torch.inf)
    scaled_BC = torch.addcmul(below_C, pre_BC, norm_C)
    values, columns = scaled_BC.topk(min(half, scaled_BC.shape[1]), dim=-1, sorted=False)
    chosen = among_largest(values, half, shards) & (values != -torch.inf)
    return torch.ones_like(pre_BC, dtype=torch.bool).scatter_(1, columns, ~chosen)
