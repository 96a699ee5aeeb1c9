"""Sets the L0 of an SAE to what was asked for, on a sample of activations.

A feature is active on a token if its score is above a cut, which is the same for all features:

| architecture | score | what moves the cut |
| --- | --- | --- |
| batchtopk, matryoshka_batchtopk | what the selection compares in training | the threshold |
| standard | pre-activation x decoder norm, which the L1 loss weighs | the encoder's biases |
| gated | the gate's pre-activation x decoder norm | the gate's biases; magnitudes stay |
| jumprelu | pre-activation / threshold | one factor for all thresholds |

With n tokens the cut lies between the (L0 x n)-th largest score and the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import TrainingSAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.saes.standard_sae import StandardTrainingSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from sae_toolkit.distributed.ranks import ALONE, Ranks
from sae_toolkit.steps.activation_sample import ActivationSample
from sae_toolkit.steps.selection import largest

FURTHEST = 0.5  # from --target_l0, as a share of it: an SAE whose L0 is further away is left as it is
_MOST_AT_ONCE = 2**26  # scores
_SMALLEST = 1e-8  # of norms and thresholds that are divided by


@dataclass(frozen=True)
class Calibration:
    """The tensors of an SAE that give it the L0 that was asked for, and what is recorded about them.

    Attributes:
        tensors: the calibrated tensors, by their names in the SAE.
        l0: mean number of active features of a token with them, over the sample.
        l0_before: the same without them, for BatchTopK with SAELens's threshold.
        n_tokens: how many tokens the sample has.
        text: the text of the sample, `held-out` or `training`.
        saelens_topk_threshold: BatchTopK's threshold as SAELens's running mean has it, without the mean's bias; None
            for other architectures.
    """

    tensors: dict[str, Tensor]
    l0: float
    l0_before: float
    n_tokens: int
    text: str
    saelens_topk_threshold: float | None = None

    def metadata(self, fold: float = 1.0) -> dict[str, float | str]:
        """Returns what cfg.json records of it.

        Args:
            fold: what the folding of the normalization divides a threshold by.
        """
        record: dict[str, float | str] = {
            "calibrated_l0": self.l0,
            "calibrated_on_tokens": self.n_tokens,
            "calibrated_on_text": self.text,
            "l0_before_calibration": self.l0_before,
        }
        if self.saelens_topk_threshold is not None:
            record["saelens_topk_threshold"] = self.saelens_topk_threshold / fold
        return record

    @torch.no_grad()
    def apply(self, sae: TrainingSAE[Any], fold: float = 1.0) -> None:
        """Puts the tensors into an SAE, in place, and the record into its metadata."""
        state = sae.state_dict()
        for name, tensor in self.tensors.items():
            state[name].copy_(tensor)
        for name, value in self.metadata(fold).items():
            sae.cfg.metadata[name] = value

    @contextmanager
    def applied(self, sae: TrainingSAE[Any]) -> Iterator[None]:
        """Context manager in which an SAE is calibrated. At the end its tensors and metadata are as they were."""
        state = sae.state_dict()
        before = {name: state[name].clone() for name in self.tensors}
        self.apply(sae)
        try:
            yield
        finally:
            for name, tensor in before.items():
                state[name].copy_(tensor)
            for name in self.metadata():
                delattr(sae.cfg.metadata, name)


def has_calibration(cfg: TrainingSAEConfig, target_l0: float | None) -> bool:
    """Returns whether SAEs of a configuration are trained for a certain L0, and have a setting that moves it."""
    kinds = (StandardTrainingSAEConfig, GatedTrainingSAEConfig, JumpReLUTrainingSAEConfig)
    return isinstance(cfg, BatchTopKTrainingSAEConfig) or (target_l0 is not None and isinstance(cfg, kinds))


def saelens_threshold(sae: BatchTopKTrainingSAE, n_steps: int) -> float:
    """Returns SAELens's BatchTopK threshold without its bias towards zero: a running mean that starts at 0.

    After n steps such a mean is too low by the factor 1 - (1 - rate)^n, as Adam's moments are (Kingma & Ba 2015,
    section 3): by 29% after 122 steps at the default rate, by 0.7% after 488. A fine-tuning that began with the
    threshold of another SAE, as its metadata says, has no such bias.
    """
    threshold, began = float(sae.topk_threshold), sae.cfg.metadata.initialized_from
    if n_steps == 0 or (isinstance(began, dict) and began.get("topk_threshold")):
        return threshold
    return threshold / (1 - (1 - sae.cfg.topk_threshold_lr) ** n_steps)


@torch.no_grad()
def calibrate(
    sae: TrainingSAE[Any],
    scaler: ActivationScaler,
    sample: ActivationSample,
    target: float,
    n_steps: int,
    *,
    at_once: int,
    n_tokens: int | None = None,
    ranks: Ranks = ALONE,
) -> Calibration | None:
    """Returns the calibration of an SAE as it is now. Collective.

    The scores are computed in the SAE's dtype, as the finished SAE computes them.

    Args:
        sae: the SAE, or this rank's shard of it. `has_calibration` is true for it.
        scaler: the normalization of the run.
        sample: raw activations. Activations that are not finite are left out.
        target: the wanted L0, above 0.
        n_steps: how many steps the SAE was trained for.
        at_once: the most tokens that are encoded at a time.
        n_tokens: how many tokens of held-out text to calibrate on; None for all.
        ranks: the ranks that hold the parts of the sample, or of the features.

    Returns:
        The calibration. None if there is no sample yet. None too if the architecture does not select features and its
        L0 is not within `FURTHEST` of the target, because such a large change would harm the SAE.
    """
    if sample.is_empty:
        return None
    acts_ND = sample.first(n_tokens)
    acts_ND = acts_ND[acts_ND.isfinite().all(dim=-1)]
    n_tokens = int(sample.ranks.sum(torch.tensor(len(acts_ND))))
    text = "held-out" if sample.is_held_out else "training"
    threshold = saelens_threshold(sae, n_steps) if isinstance(sae, BatchTopKTrainingSAE) else None
    cut_before = threshold if threshold is not None else float(isinstance(sae, JumpReLUTrainingSAE))
    rows = max(1, min(at_once, _MOST_AT_ONCE // sae.cfg.d_sae))

    def chunks() -> Iterator[Tensor]:
        for part_ND in acts_ND.split(rows):
            yield _scores(sae, scaler(part_ND.to(sae.device, sae.dtype))).flatten()

    n_active = max(1, round(target * n_tokens))
    least_cut = -math.inf if threshold is None else 0.0
    cut, n_above, n_before = _find_cut(chunks, n_active, 2 * target / sae.cfg.d_sae, cut_before, least_cut, ranks)
    l0, l0_before = n_above / n_tokens, n_before / n_tokens
    if threshold is None and not (abs(l0_before / target - 1) <= FURTHEST):
        return None
    tensors = _moved(sae, cut)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        return None
    return Calibration(tensors, l0, l0_before, n_tokens, text, threshold)


def _scores(sae: TrainingSAE[Any], acts_BD: Tensor) -> Tensor:
    """Returns the scores [B, F] that a feature is active by, given normalized activations."""
    sae_in_BD = sae.process_sae_in(acts_BD)
    if isinstance(sae, GatedTrainingSAE):
        product_BF = sae_in_BD @ sae.W_enc
        is_positive_BF = (product_BF * sae.r_mag.exp()).add_(sae.b_mag) > 0
        scores_BF = product_BF.add_(sae.b_gate).mul_(_norms(sae))
        return scores_BF.masked_fill_(is_positive_BF.logical_not_(), -torch.inf)
    assert isinstance(sae.b_enc, Tensor)
    pre_BF = torch.nn.functional.linear(sae_in_BD, sae.W_enc.t(), sae.b_enc)
    if isinstance(sae, JumpReLUTrainingSAE):
        return pre_BF.div_(sae.threshold.clamp(min=_SMALLEST))
    if isinstance(sae, BatchTopKTrainingSAE) and not sae.cfg.rescale_acts_by_decoder_norm:
        return pre_BF
    return pre_BF.mul_(_norms(sae))


def _norms(sae: TrainingSAE[Any]) -> Tensor:
    return sae.W_dec.norm(dim=-1).clamp(min=_SMALLEST)


def _moved(sae: TrainingSAE[Any], cut: float) -> dict[str, Tensor]:
    """Returns the tensors with which exactly those features are active whose score is above the cut."""
    if isinstance(sae, BatchTopKTrainingSAE):
        return {"topk_threshold": torch.full_like(sae.topk_threshold, cut)}
    if isinstance(sae, JumpReLUTrainingSAE):
        return {"threshold": sae.threshold * (cut if cut > 0 else math.nan)}
    name = "b_gate" if isinstance(sae, GatedTrainingSAE) else "b_enc"
    return {name: sae.state_dict()[name] - cut / _norms(sae)}


def _find_cut(
    chunks: Callable[[], Iterator[Tensor]],
    n_active: int,
    share: float,
    cut_before: float,
    least_cut: float,
    ranks: Ranks,
) -> tuple[float, int, int]:
    """Finds the cut above which there are `n_active` scores, on all ranks together. Collective.

    Of each chunk only the largest scores are kept. If these were too few for certain, all chunks are computed again.

    Args:
        chunks: returns this rank's scores, in chunks [N].
        n_active: how many scores are to be above the cut.
        share: which share of a chunk to keep at first; more than is expected above the cut.
        cut_before: the cut to compare with.
        least_cut: the cut is not below this, though fewer scores are then above it.
        ranks: the ranks that have scores.

    Returns:
        The cut, `least_cut` if there are no more than `n_active` scores; how many scores are above it; and how many are
        above `cut_before`.
    """
    while True:
        kept, floor, n_before = [], torch.tensor(-torch.inf), torch.tensor(0)
        for scores_N in chunks():
            n = min(len(scores_N), math.ceil(share * len(scores_N)))
            largest_N = scores_N[largest(scores_N, n)].to(torch.promote_types(scores_N.dtype, torch.float32))
            kept.append(largest_N)
            if n < len(scores_N):
                floor = torch.maximum(floor.to(largest_N), largest_N.min())
            n_before = n_before.to(scores_N.device) + (scores_N > cut_before).sum()
        values_N = torch.cat(ranks.gather(torch.cat(kept)))
        floor, n_before = ranks.maximum(floor), ranks.sum(n_before)
        if len(values_N) <= n_active:
            if share >= 1:
                return least_cut, int((values_N > least_cut).sum()), int(n_before)
        else:
            least_N = values_N[largest(values_N, n_active + 1)].topk(2, largest=False).values
            found_all = (floor <= least_N[0]) | least_N[0].isnan()
            if share >= 1 or found_all:
                cut = max(least_N.double().mean().item(), least_cut)
                return cut, int((values_N > cut).sum()), int(n_before)
        share *= 2
