"""Norms of activations in an evaluation: the norm limit that a flag asks for, and first positions that are massive."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE, PreparedEvaluation
from sae_toolkit.model.devices import out_of_memory_answered
from sae_toolkit.model.language_model import LanguageModel

MASSIVE = 10  # times the median norm, the default of --max_activation_norm_multiple
_TOKENS = 8192  # for the median norm


@dataclass(frozen=True)
class MassiveFirstPosition:
    """A first position that is massive, where the SAE's record does not say whether the SAE was trained on it.

    Args:
        norm: median L2 norm at the first position of the contexts.
        norm_of_others: median L2 norm at the other positions.
        metrics_without: the metrics of losses and reconstructions if the first position is left out. Empty if the first
            position was not massive in the first batch, so that this was not measured.
        intervals_without: their 95% intervals.
    """

    norm: float
    norm_of_others: float
    metrics_without: dict[str, float]
    intervals_without: dict[str, list[float]]


class ActivationNorms:
    """The L2 norms of the activations of an evaluation, batch by batch."""

    def __init__(self) -> None:
        self._norms: list[torch.Tensor] = []

    def add(self, acts_BTD: torch.Tensor) -> None:
        """Adds a batch."""
        self._norms.append(acts_BTD.float().norm(dim=-1).cpu())

    def first_and_others(self) -> tuple[float, float]:
        """Returns the median norm at the first position of the sequences, and at all others."""
        norms_NT = torch.cat(self._norms)
        return norms_NT[:, 0].median().item(), norms_NT[:, 1:].median().item()

    def share_not_finite(self) -> float:
        """Returns the share of the activations that hold NaN or infinity."""
        return 1 - torch.cat(self._norms).isfinite().double().mean().item()

    def first_is_massive(self) -> bool:
        """Returns whether the median norm at the first position is above 10 times that at the others."""
        first, others = self.first_and_others()
        return first > MASSIVE * others


def may_hold_massive_first_position(prepared: PreparedEvaluation, evaluated: EvaluatedSAE) -> bool:
    """Returns whether an SAE is measured at the first position though nothing says that it was trained there."""
    sources = evaluated.sources
    return (
        prepared.protocol == "health"
        and sources.get("skip_positions") == sources.get("max_activation_norm") == "default"
        and bool(evaluated.positions.keeps_tokens(prepared.rows_NT, prepared.assistant_NT)[:, 0].any())
    )


def without_first_position(evaluated: EvaluatedSAE) -> EvaluatedSAE:
    """Returns the SAE with the first position of each context left out."""
    return replace(evaluated, positions=replace(evaluated.positions, skip_positions=1))


def measure_norm_limits(prepared: PreparedEvaluation, model: LanguageModel, *, batch_size: int) -> PreparedEvaluation:
    """Returns the evaluation with a norm limit for each SAE that --max_activation_norm_multiple was given for.

    As in training, the limit is a multiple of the median L2 norm at the positions that the SAE does not leave out. It
    is measured on the first 8,192 tokens.

    Args:
        prepared: the evaluation.
        model: language model, hooked where the SAEs are.
        batch_size: rows in one forward pass.

    Raises:
        UserError: no position is left, or the median norm is not finite.
    """
    if all(evaluated.max_norm_multiple is None for evaluated in prepared.saes):
        return prepared
    rows_NT = prepared.rows_NT[: max(_TOKENS // prepared.rows_NT.shape[1], 1)].astype(np.int64)
    with out_of_memory_answered(
        f"--batch_size {batch_size}: the median norm of the activations on {prepared.device}", "lower --batch_size"
    ):
        norms = [model.activations(rows).float().norm(dim=-1) for rows in torch.from_numpy(rows_NT).split(batch_size)]
    norms_NT = torch.cat(norms).cpu()
    assistant_NT = prepared.assistant_at(slice(len(rows_NT)))
    limited = (_with_limit(each, rows_NT, assistant_NT, norms_NT, model) for each in prepared.saes)
    return replace(prepared, saes=tuple(limited))


def _with_limit(
    evaluated: EvaluatedSAE,
    rows_NT: np.ndarray,
    assistant_NT: np.ndarray | None,
    norms_NT: torch.Tensor,
    model: LanguageModel,
) -> EvaluatedSAE:
    if evaluated.max_norm_multiple is None:
        return evaluated
    norms_N = norms_NT[torch.from_numpy(evaluated.positions.keeps_tokens(rows_NT, assistant_NT))]
    flag = f"--max_activation_norm_multiple {evaluated.max_norm_multiple:g}"
    if len(norms_N) == 0:
        raise UserError(f"{flag}: no token is left to measure the median norm on; lower --skip_positions")
    median = norms_N.median().item()
    if not np.isfinite(median):
        raise UserError(
            f"--lm_dtype {str(model.dtype).removeprefix('torch.')}: the median norm of the activations is {median}, so"
            f" {flag} has no meaning; use another dtype"
        )
    limit = evaluated.max_norm_multiple * median
    return replace(evaluated, positions=replace(evaluated.positions, max_activation_norm=limit), max_norm_multiple=None)
