"""Finds and checks the SAEs that features are looked for in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE, PreparedEvaluation
from sae_toolkit.evaluation.stability.measure import Stability, is_same
from sae_toolkit.saes.formats import SAEFile, load_sae_file
from sae_toolkit.saes.metadata import check_metadata
from sae_toolkit.saes.search import find_saes
from sae_toolkit.settings.evaluation import EvaluationSettings
from sae_toolkit.text.positions import PositionFilter


def prepare_stability(settings: EvaluationSettings, groups: Sequence[PreparedEvaluation]) -> Stability:
    """Loads the SAEs of --stability, and checks that they can be compared with those that are evaluated.

    SAEs of different seeds hold out different documents, so that they may be in several groups. Each group compares
    firing on its own text.

    Raises:
        UserError: an SAE has another width, hook or model than those that are evaluated, these are at several hooks,
            or there is no second SAE.
    """
    names = settings.measurements.stability
    flag = f"--stability {' '.join(names)}"
    hooks = dict.fromkeys(f"{group.hook_name} of {group.model.name}" for group in groups)
    if len(hooks) > 1:
        raise UserError(
            f"{flag}: compares SAEs of one hook, and these are at {' and '.join(hooks)}; evaluate those of each hook by"
            " themselves"
        )
    files = find_saes(list(names), layer=settings.saes.layer, flag="--stability")
    evaluated = [each for group in groups for each in group.saes]
    for each in evaluated:
        if all(is_same(file, each.file) for file in files):
            raise UserError(
                f"{flag}: there is only one SAE, {each.file.name}; name another one, such as one that was trained with"
                " another --seed"
            )
    others = []
    for file in files:
        known = next((each for each in evaluated if is_same(file, each.file)), None)
        others.append(known or _load(file, groups[0], settings))
    return Stability(tuple(others))


def _load(file: SAEFile, group: PreparedEvaluation, settings: EvaluationSettings) -> EvaluatedSAE:
    where = f"--stability {file.name}"
    sae = load_sae_file(file, "cpu", "--stability")
    check_metadata(sae, where)
    first = group.saes[0]
    if sae.cfg.d_in != first.sae.cfg.d_in:
        raise UserError(
            f"{where}: an SAE of width {sae.cfg.d_in}, and {first.file.name} has the width {first.sae.cfg.d_in}; name"
            " SAEs of the same hook"
        )
    metadata = sae.cfg.metadata
    hook_name = metadata.hook_name
    if hook_name and hook_name != group.hook_name:
        raise UserError(
            f"{where}: an SAE of {hook_name}, and {first.file.name} is at {group.hook_name}; name SAEs of one hook"
        )
    model = metadata.model_name
    if model and settings.saes.model_name is None and not _is_same_model(model, group.model.name):
        raise UserError(
            f"{where}: an SAE of {model}, and {first.file.name} is of {group.model.name}; name SAEs of one model, or"
            " give --model_name to compare them on that model"
        )
    positions = PositionFilter((), (metadata.seqpos_slice or (None,))[0] or 0, metadata.max_activation_norm)
    return EvaluatedSAE(file, sae, positions)


def _is_same_model(one: str, other: str) -> bool:
    if Path(one).exists() and Path(other).exists():
        return Path(one).resolve() == Path(other).resolve()
    return one == other
