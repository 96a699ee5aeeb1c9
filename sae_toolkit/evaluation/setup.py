"""Prepares evaluations: loads SAEs, and groups those that one pass of a model serves."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from sae_lens import SAE
from transformers import PreTrainedTokenizerBase

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.placement import ModelKey, PlacedSAE, Placement
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE, PreparedEvaluation
from sae_toolkit.evaluation.text import collect_rows
from sae_toolkit.model.devices import choose_device
from sae_toolkit.model.tokenizer import load_tokenizer
from sae_toolkit.saes.formats import SAEFile, load_sae_file
from sae_toolkit.saes.metadata import check_metadata
from sae_toolkit.saes.search import find_saes
from sae_toolkit.settings.evaluation import EvaluatedSAESettings, EvaluationTextSettings, MeasurementSettings
from sae_toolkit.text.rows import special_tokens

# Sequences of one document resemble each other, so the bootstrap draws whole documents. Fewer documents than this are
# too few for that, and it draws sequences.
LEAST_DOCUMENTS = 10

_GroupKey = tuple[ModelKey, str, tuple[Any, ...]]  # model, hook and text

log = logging.getLogger(__name__)


def prepare_evaluations(
    sae_settings: EvaluatedSAESettings,
    text_settings: EvaluationTextSettings,
    measurements: MeasurementSettings,
    *,
    reads_text: bool = True,
) -> list[PreparedEvaluation]:
    """Loads the SAEs, checks that they fit their models and hooks, and tokenizes the text.

    Args:
        sae_settings, text_settings, measurements: the flags.
        reads_text: whether there are rows of text; if not, none is opened.

    Returns:
        One evaluation for each set of SAEs that have the same model, hook and text.

    Raises:
        UserError: an evaluation could not succeed.
    """
    device = choose_device(sae_settings.device)
    flag = "--stability" if sae_settings.sae_path == measurements.stability else "--sae_path"
    files = find_saes(list(sae_settings.sae_path), layer=sae_settings.layer, flag=flag)
    placement = Placement(sae_settings, text_settings, reads_text=reads_text)
    groups: dict[_GroupKey, list[PlacedSAE]] = {}
    for file, sae in _load_saes(files):
        _check_features(measurements.features, sae, file)
        placed = placement.place(file, sae)
        groups.setdefault((placed.model_key, placed.hook_name, placed.text.key), []).append(placed)
    if len(groups) > 1:
        log.warning("%s", _why_apart(groups))
    return [
        _prepare_group(group, text_settings, measurements, device, reads_text=reads_text) for group in groups.values()
    ]


def _load_saes(files: Sequence[SAEFile]) -> Iterator[tuple[SAEFile, SAE[Any]]]:
    """Loads SAEs on the CPU and checks them. A damaged SAE of a run or pattern is left out, unless all are damaged."""
    n_loaded = 0
    first_error: UserError | None = None
    for file in files:
        log.info("%s: %s, %s", file.name, file.library, file.form)
        try:
            sae = load_sae_file(file, "cpu")  # on the device only while it is measured
            check_metadata(sae, f"--sae_path {file.name}")
        except UserError as error:
            if not file.one_of_many:
                raise
            log.warning("%s; left out", error)
            first_error = first_error or error
        else:
            n_loaded += 1
            yield file, sae
    if n_loaded == 0 and first_error is not None:
        raise first_error


def _check_features(features: Sequence[int], sae: SAE[Any], file: SAEFile) -> None:
    for feature in features:
        if not 0 <= feature < sae.cfg.d_sae:
            raise UserError(f"--features {feature}: {file.name} has the features 0 to {sae.cfg.d_sae - 1}")


def _why_apart(groups: dict[_GroupKey, list[PlacedSAE]]) -> str:
    """Returns a line that says why the SAEs need several evaluations."""
    differing = [
        name
        for name, values in (
            ("models", {key[0] for key in groups}),
            ("hooks", {key[1] for key in groups}),
            ("texts, held-out splits, contexts or chat tokens", {key[2] for key in groups}),
        )
        if len(values) > 1
    ]
    names = "; ".join(
        f"{model_key[0]} {hook_name}: {', '.join(placed.evaluated.file.name for placed in group)}"
        for (model_key, hook_name, _), group in groups.items()
    )
    return f"SAEs of different {' and '.join(differing)}, evaluated in {len(groups)} passes ({names})"


def _prepare_group(
    group: Sequence[PlacedSAE],
    text_settings: EvaluationTextSettings,
    measurements: MeasurementSettings,
    device: str,
    *,
    reads_text: bool,
) -> PreparedEvaluation:
    first, text = group[0], group[0].text
    tokenizer = load_tokenizer(first.model)
    rows_NT, assistant_NT, document_N, n_loss_rows, n_sae_rows = (
        collect_rows(text, first.evaluated.positions, tokenizer, text_settings, first.model)
        if reads_text
        else (np.empty((0, text.context.context_size), np.uint32), None, np.empty(0, np.int64), 0, 0)
    )
    if measurements.protocol == "saebench":
        n_sae_rows = n_loss_rows  # both of SAEBench's passes read the same rows
    n_documents = len(np.unique(document_N[:n_loss_rows]))
    by_document = n_documents >= LEAST_DOCUMENTS and not text.source.tokenized
    return PreparedEvaluation(
        saes=tuple(_with_special_tokens(placed, tokenizer, text_settings.exclude_special_tokens) for placed in group),
        protocol=measurements.protocol,
        device=device,
        model=first.model,
        tokenizer=tokenizer,
        hook_name=first.hook_name,
        text=text.source,
        held_out=text.held_out,
        context=text.context,
        rows_NT=rows_NT,
        assistant_NT=assistant_NT,
        unit_N=document_N if by_document else np.arange(len(rows_NT)),
        units="documents" if by_document else "sequences",
        n_loss_rows=n_loss_rows,
        n_sae_rows=n_sae_rows,
        special_token_ids=special_tokens(True, tokenizer, is_chat=text.source.is_chat),
        unscored_token_ids=tuple(
            {i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None}
        ),
        features=tuple(measurements.features),
        n_features=measurements.n_features,
        seed=text_settings.seed,
    )


def _with_special_tokens(
    placed: PlacedSAE, tokenizer: PreTrainedTokenizerBase, exclude: bool | list[int] | None
) -> EvaluatedSAE:
    """Returns an SAE whose positions leave out special tokens.

    Args:
        exclude: which, as --exclude_special_tokens says; None for those that the SAE's training left out.
    """
    if exclude is None:
        exclude = placed.record.get("exclude_special_tokens", False)
    special_token_ids = special_tokens(exclude, tokenizer, is_chat=placed.text.source.is_chat)
    evaluated = placed.evaluated
    return replace(evaluated, positions=replace(evaluated.positions, special_token_ids=special_token_ids))
