"""Prepares an inspection: SAEs, model and text as for an evaluation, and a directory for each SAE's results."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE, PreparedEvaluation
from sae_toolkit.evaluation.setup import prepare_evaluations
from sae_toolkit.evaluation.stability.prepare import prepare_stability
from sae_toolkit.inspection.explanations.local import find_judge
from sae_toolkit.inspection.latents import WINDOW
from sae_toolkit.inspection.neuronpedia import layer_of
from sae_toolkit.inspection.results import check_directory
from sae_toolkit.inspection.run import check_memory
from sae_toolkit.reports.results import directory_of_results
from sae_toolkit.settings.evaluation import EvaluationSettings, EvaluationTextSettings, MeasurementSettings
from sae_toolkit.settings.inspection import InspectionSettings
from sae_toolkit.text.token_ids import TokenIds

_FOLDER = "features"


def prepare_inspection(settings: InspectionSettings) -> list[PreparedEvaluation]:
    """Loads the SAEs, checks that they fit their models and hooks, and tokenizes the text.

    Returns:
        One group for each set of SAEs that have the same model, hook and text.

    Raises:
        UserError: an inspection could not succeed.
    """
    if settings.steering.steer:
        text = EvaluationTextSettings(**asdict(settings.text))
        measures_norms = bool(settings.text.max_activation_norm_multiple)
        return prepare_evaluations(settings.saes, text, MeasurementSettings(), reads_text=measures_norms)
    text = EvaluationTextSettings(**asdict(settings.text), dead_tokens=settings.features.tokens)
    groups = prepare_evaluations(settings.saes, text, MeasurementSettings())
    for group in groups:
        _check_outputs(settings, group)
    groups = [_with_rows_for(settings.features.tokens, group) for group in groups]
    if settings.explanations.explain and settings.explanations.explain_url is None:
        find_judge(settings.explanations.explain)  # before the text is read, which may take hours
    for of_pass in in_passes(groups):
        check_memory(of_pass, settings.features)
    return groups


def _check_outputs(settings: InspectionSettings, group: PreparedEvaluation) -> None:
    """Raises a UserError for exports and explanations that the SAEs of a group cannot have."""
    export, explain = settings.run.export, settings.explanations.explain
    flag = f"--export {' '.join(export)}" if export else f"--explain {explain}"
    if (export or explain) and isinstance(group.tokenizer, TokenIds):
        raise UserError(
            f"{flag}: it shows tokens as text, and {group.model.name} has no tokenizer; leave it out, or name a model"
            " that has one"
        )
    if "neuronpedia" in export and layer_of(group.hook_name) is None:
        raise UserError(
            f"--export neuronpedia: wants the number of a layer, and {group.hook_name} has none; leave it out"
        )
    if ("delphi" in export or explain) and group.context.context_size < WINDOW:
        flag = "--export delphi" if "delphi" in export else f"--explain {explain}"
        raise UserError(
            f"{flag}: delphi takes windows of {WINDOW} tokens, and the contexts have {group.context.context_size};"
            f" give --context_length {WINDOW} or more"
        )
    if explain and find_spec("delphi") is None:
        raise UserError(
            f"--explain {explain}: delphi is not installed; run pip install --no-deps -c constraints.txt"
            " -r requirements/explanations.txt in the environment of this script"
        )


def prepare_others(settings: InspectionSettings, groups: Sequence[PreparedEvaluation]) -> Sequence[EvaluatedSAE]:
    """Returns the SAEs of --stability.

    Raises:
        UserError: as `prepare_stability`.
    """
    if not settings.features.stability:
        return ()
    measurements = MeasurementSettings(stability=settings.features.stability)
    return prepare_stability(EvaluationSettings(settings.saes, measurements=measurements), groups).others


def in_passes(groups: Sequence[PreparedEvaluation]) -> list[list[PreparedEvaluation]]:
    """Returns the groups that one pass of the model serves together: those of the same model and rows of text."""
    passes: list[list[PreparedEvaluation]] = []
    for group in groups:
        for of_pass in passes:
            first = of_pass[0]
            same_model = (first.model.location, first.model.adapter) == (group.model.location, group.model.adapter)
            if same_model and np.array_equal(first.rows_NT, group.rows_NT):
                of_pass.append(group)
                break
        else:
            passes.append([group])
    return passes


def _with_rows_for(n_tokens: int, group: PreparedEvaluation) -> PreparedEvaluation:
    """Returns the group with as many rows as hold so many tokens where the SAEs are applied."""
    usable = group.context.context_size - max(evaluated.positions.skip_positions for evaluated in group.saes)
    rows = slice(math.ceil(n_tokens / usable))
    return replace(group, rows_NT=group.rows_NT[rows], assistant_NT=group.assistant_at(rows), unit_N=group.unit_N[rows])


def choose_directories(output: Path | None, groups: Sequence[PreparedEvaluation]) -> list[list[Path]]:
    """Returns the directory for the results of each SAE, for each group, and makes it.

    Raises:
        UserError: it cannot be written, or two SAEs would have the same.
    """
    files = [evaluated.file for group in groups for evaluated in group.saes]
    if output is None:
        directories = [directory_of_results(file) / _FOLDER for file in files]
    else:
        directories = [output if len(files) == 1 else output / file.name.strip("/").replace("/", "_") for file in files]
    for directory, file in zip(directories, files, strict=True):
        if directories.count(directory) > 1:
            raise UserError(
                f"--sae_path {file.name}: two SAEs would have their results in {directory}; name one of them"
            )
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output {directory}: cannot be made: {one_line(error)}; name another one") from None
        if not os.access(directory, os.W_OK):
            raise UserError(f"--output {directory}: cannot be written to; name another directory")
        check_directory(directory)
    remaining = iter(directories)
    return [[next(remaining) for _ in group.saes] for group in groups]
