"""The evaluation: runs text through a language model and through SAEs at one of its hooks, and measures both."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from sae_toolkit.evaluation.massive_activations import (
    ActivationNorms,
    MassiveFirstPosition,
    may_hold_massive_first_position,
    without_first_position,
)
from sae_toolkit.evaluation.measurement import Evaluation, Measurement
from sae_toolkit.evaluation.metrics import compare_predictions
from sae_toolkit.evaluation.prepared_evaluation import PreparedEvaluation
from sae_toolkit.model.devices import out_of_memory_answered
from sae_toolkit.model.language_model import HookState, LanguageModel
from sae_toolkit.terminal.progress import Progress

log = logging.getLogger(__name__)

# If no position was scored in this many batches, none will be.
_BATCHES_WITHOUT_A_POSITION = 4


def evaluate_saes(prepared: PreparedEvaluation, model: LanguageModel, *, batch_size: int) -> list[Evaluation]:
    """Measures SAEs as `measure_saes` does, and says what to do if the memory does not suffice.

    Raises:
        UserError: as `measure_saes`, or the memory does not suffice.
    """
    for evaluated in prepared.saes:
        where = f"{prepared.hook_name} ({evaluated.sources.get('hook_name', 'record')})"
        positions = "all" if prepared.protocol != "health" else evaluated.positions.described(evaluated.sources)
        log.info("%s: at %s, positions: %s", evaluated.file.name, where, positions)
    with out_of_memory_answered(
        f"--batch_size {batch_size}: evaluating {len(prepared.saes)} SAEs on {prepared.device}",
        "lower --batch_size, or name fewer SAEs",
    ):
        return measure_saes(prepared, model, batch_size=batch_size)


@torch.no_grad()
def measure_saes(prepared: PreparedEvaluation, model: LanguageModel, *, batch_size: int) -> list[Evaluation]:
    """Measures SAEs on the same rows of tokens.

    An SAE whose record says nothing of positions is also measured without the first position, if that is massive.

    What does not depend on the SAE runs once: the layers up to the hook, the model's own losses, and its losses with
    zeros at the hook. Only the layers after the hook run again for each SAE.

    Args:
        prepared: the SAEs, the rows of tokens and the positions that are scored.
        model: language model, hooked where the SAEs are.
        batch_size: rows in one forward pass.

    Returns:
        One evaluation for each SAE, in the order of the SAEs.

    Raises:
        UserError: no position is scored for one of the SAEs, or losses or reconstructions are not finite.
    """
    rows_NT = prepared.rows_NT
    measurements = []
    for evaluated in prepared.saes:
        evaluated.sae.to(prepared.device)
        measurements.append(Measurement(evaluated, prepared))
    without_first: dict[int, Measurement] = {}
    norms = ActivationNorms()
    zero_ablation = _ZeroAblation(model)
    ends = sorted({prepared.n_loss_rows, prepared.n_sae_rows, len(rows_NT)})
    n_batches = start = 0
    with Progress("evaluating", rows_NT.size) as progress:
        while start < len(rows_NT):
            stop = min(start + batch_size, next(end for end in ends if end > start))
            batch_BT = rows_NT[start:stop].astype(np.int64)
            tokens_BT = torch.from_numpy(batch_BT)
            if start < prepared.n_loss_rows:
                clean_BTV, state = model.logits(tokens_BT)
                norms.add(state.acts_BTD)
                zero_logits = zero_ablation.logits(tokens_BT, state)
                tokens_BT = tokens_BT.to(clean_BTV.device)
                zero = None
                if start == 0 and norms.first_is_massive():
                    without_first = _without_first_position(prepared, measurements)
                for measurement in (*measurements, *without_first.values()):
                    replaced_BTD, scored_BT = measurement.add(start, batch_BT, state.acts_BTD, with_reconstruction=True)
                    sae_BTV = model.logits_from_hook(tokens_BT, state, replaced_BTD)
                    others: list[Sequence[torch.Tensor]] = [list(sae_BTV)] if zero else [list(sae_BTV), zero_logits]
                    ce_clean_BT, compared = compare_predictions(tokens_BT, clean_BTV, others)
                    zero = zero or compared[1]
                    measurement.losses.add(scored_BT, ce_clean_BT, compared[0], zero)
                    del sae_BTV
                del clean_BTV, zero_logits, state
            else:
                acts_BTD = model.activations(tokens_BT)
                norms.add(acts_BTD)
                with_reconstruction = start < prepared.n_sae_rows
                for measurement in measurements:
                    measurement.add(start, batch_BT, acts_BTD, with_reconstruction=with_reconstruction)
                if with_reconstruction:
                    for measurement in without_first.values():
                        measurement.add(start, batch_BT, acts_BTD, with_reconstruction=True)
            n_batches += 1
            if n_batches == _BATCHES_WITHOUT_A_POSITION or stop == len(rows_NT):
                for measurement in measurements:
                    measurement.check(norms.share_not_finite(), model.dtype)
            progress.advance(batch_BT.size)
            start = stop
    evaluations = [measurement.finish(model) for measurement in measurements]
    if norms.first_is_massive():
        for i, evaluated in enumerate(prepared.saes):
            if may_hold_massive_first_position(prepared, evaluated):
                averages = without_first[i].averages() if without_first else ({}, {})
                massive = MassiveFirstPosition(*norms.first_and_others(), *averages)
                evaluations[i] = replace(evaluations[i], massive_first_position=massive)
    for evaluated in prepared.saes:
        evaluated.sae.to("cpu")
    return evaluations


def _without_first_position(
    prepared: PreparedEvaluation, measurements: Sequence[Measurement]
) -> dict[int, Measurement]:
    """Returns measurements without the first position, by the SAE's index, of SAEs that may not be trained on it."""
    no_features = replace(prepared, features=(), n_features=0)
    return {
        i: Measurement(without_first_position(measurement.evaluated), no_features)
        for i, measurement in enumerate(measurements)
        if may_hold_massive_first_position(prepared, measurement.evaluated)
    }


class _ZeroAblation:
    """The model's predictions with zeros at the hook, at every position.

    Zeros in the residual stream remove all information about the text. At such a hook the predictions are the same for
    every sequence, and are computed for only one.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._is_shared = model.ablation_is_shared
        self._shared_TV: torch.Tensor | None = None

    def logits(self, tokens_BT: torch.Tensor, state: HookState) -> Sequence[torch.Tensor]:
        """Returns B tensors of logits [T, V], one for each sequence."""
        if not self._is_shared:
            return list(self.model.logits_from_hook(tokens_BT, state, torch.zeros_like(state.acts_BTD)))
        if self._shared_TV is None:
            layer_input = state.layer_input_BTD
            one = replace(
                state,
                acts_BTD=state.acts_BTD[:1],
                layer_input_BTD=None if layer_input is None else layer_input[:1],
            )
            self._shared_TV = self.model.logits_from_hook(tokens_BT[:1], one, torch.zeros_like(one.acts_BTD))[0]
        return [self._shared_TV] * len(tokens_BT)
