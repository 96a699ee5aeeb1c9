"""Evaluations beyond the four health metrics. Each is off unless its flag is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from sae_toolkit.evaluation.l0_check.check import check_decoders, measure_l0_check
from sae_toolkit.evaluation.prepared_evaluation import PreparedEvaluation
from sae_toolkit.evaluation.probing.run import measure_probing, read_tasks
from sae_toolkit.evaluation.shown import Measured
from sae_toolkit.evaluation.stability.prepare import prepare_stability
from sae_toolkit.evaluation.synthetic.measure import check_synthetic, measure_synthetic
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.settings.evaluation import EvaluationSettings


@dataclass(frozen=True)
class FurtherEvaluation:
    """A further evaluation that is checked and ready to start.

    Args:
        name: its key in evaluation.json.
        measure: takes SAEs at one hook, their language model and the number of rows in one forward pass. Returns the
            results of each SAE.
    """

    name: str
    measure: Callable[[PreparedEvaluation, LanguageModel, int], Sequence[Measured]]


def prepare_further_evaluations(
    settings: EvaluationSettings, groups: Sequence[PreparedEvaluation]
) -> list[FurtherEvaluation]:
    """Returns the further evaluations that flags ask for, after checking that they can run on the SAEs.

    Raises:
        UserError: one of them cannot run.
    """
    further = []
    if settings.measurements.stability:
        further.append(FurtherEvaluation("stability", prepare_stability(settings, groups).measure))
    if settings.measurements.l0_check:
        check_decoders(groups)
        further.append(FurtherEvaluation("l0_check", measure_l0_check))
    if settings.measurements.synthetic:
        check_synthetic(groups)
        further.append(FurtherEvaluation("synthetic", measure_synthetic))
    if settings.measurements.probing:
        tasks = read_tasks(settings.measurements, groups)
        further.append(FurtherEvaluation("probing", partial(measure_probing, tasks)))
    return further
