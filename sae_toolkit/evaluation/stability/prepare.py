"""Finds and checks the SAEs that features are looked for in."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE, PreparedEvaluation
from sae_toolkit.evaluation.stability.measure import Stability, is_same
from sae_toolkit.saes.formats import SAEFile, load_sae_file
from sae_toolkit.saes.metadata import check_metadata
from sae_toolkit.saes.search import find_saes
from sae_toolkit.settings.evaluation import EvaluationSettings
from sae_toolkit.text.positions import PositionFilter
from sae_toolkit.text.rows import special_tokens

log = logging.getLogger(__name__)


def prepare_stability(settings: EvaluationSettings, groups: Sequence[PreparedEvaluation]) -> Stability:
    """Loads the SAEs of --stability, and checks that they can be compared with those that are evaluated.

    SAEs of different seeds hold out different documents, so that they may be in several groups. Each group compares
    firing on its own text.

    Raises:
        UserError: an SAE has another width, hook or model than those that are evaluated, these are at several hooks,
            there is no second SAE, or an SAE's decoder vectors are zero.
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
    others = []
    for file in files:
        other = next((each for each in evaluated if is_same(file, each.file)), None) or _load(file, groups, settings)
        if other is not None:
            _check_conversations(other, groups)
            others.append(other)
    for each in (*evaluated, *others):
        if not each.sae.W_dec.any():
            raise UserError(f"{flag}: all decoder vectors of {each.file.name} are zero; leave that SAE out")
    for each in evaluated:
        if all(is_same(other.file, each.file) for other in others):
            raise UserError(
                f"{flag}: there is only one SAE, {each.file.name}; name another one, such as one that was trained with"
                " another --seed"
            )
        if copy := next((other for other in others if other is not each and _has_weights_of(other, each)), None):
            log.warning(
                "%s: %s has the decoder of %s, so that all features are found again; name SAEs of other trainings",
                *(flag, copy.file.name, each.file.name),
            )
    return Stability(tuple(others))


def _has_weights_of(one: EvaluatedSAE, other: EvaluatedSAE) -> bool:
    return not is_same(one.file, other.file) and torch.equal(one.sae.W_dec, other.sae.W_dec)


def _load(file: SAEFile, groups: Sequence[PreparedEvaluation], settings: EvaluationSettings) -> EvaluatedSAE | None:
    """Loads another SAE, at the positions that it was trained on; None if it is one of many and is damaged."""
    group = groups[0]
    where = f"--stability {file.name}"
    try:
        sae = load_sae_file(file, "cpu", "--stability")
        check_metadata(sae, where)
    except UserError as error:
        if not file.one_of_many:
            raise
        log.warning("%s; left out", error)
        return None
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
    text = settings.text  # its flags are for all SAEs
    exclude, skip = text.exclude_special_tokens, text.skip_positions
    if exclude is None:
        exclude = metadata.get("exclude_special_tokens", False)
    if skip is None:
        skip = (metadata.seqpos_slice or (None,))[0] or 0
    positions = PositionFilter(
        special_token_ids=special_tokens(exclude, group.tokenizer, is_chat=any(each.text.is_chat for each in groups)),
        skip_positions=skip,
        max_activation_norm=metadata.max_activation_norm if text.max_activation_norm_multiple is None else None,
        chat_tokens=text.chat_tokens or metadata.chat_tokens,
    )
    return EvaluatedSAE(file, sae, positions)


def _check_conversations(other: EvaluatedSAE, groups: Sequence[PreparedEvaluation]) -> None:
    """Raises a UserError if an SAE is for what the assistant says, and a group is measured on whole conversations."""
    for group in groups:
        if other.positions.chat_tokens == "assistant" and group.text.is_chat and group.assistant_NT is None:
            raise UserError(
                f"--stability {other.file.name}: was trained on what the assistant says, and"
                f" {group.saes[0].file.name} on whole conversations; choose by --chat_tokens assistant or all"
            )


def _is_same_model(one: str, other: str) -> bool:
    if Path(one).exists() and Path(other).exists():
        return Path(one).resolve() == Path(other).resolve()
    return one == other
