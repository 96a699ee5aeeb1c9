"""What to evaluate SAEs on: their own record of their training, unless the person says otherwise."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from transformers import PreTrainedTokenizerBase

from sae_toolkit.errors import UserError
from sae_toolkit.files.trust import model_kwargs_of_sae
from sae_toolkit.model.devices import choose_device
from sae_toolkit.model.language_model import hook_width
from sae_toolkit.model.loading import ModelSource, check_token_ids, find_model, load_tokenizer
from sae_toolkit.saes.formats import SAEFile, load_sae_file
from sae_toolkit.saes.metadata import check_metadata, check_names_of_download
from sae_toolkit.saes.search import find_saes
from sae_toolkit.settings.evaluation import EvaluatedSAESettings, EvaluationTextSettings, MeasurementSettings
from sae_toolkit.text.positions import PositionFilter
from sae_toolkit.text.rows import ContextFormat, collect_evaluation_rows, special_tokens
from sae_toolkit.text.sources import HeldOutSplit, TextSource, open_text

# What needs only the SAE is measured on more tokens than losses, which need the model's upper layers and logits.
TOKENS = 50_000
LOSS_TOKENS = 20_000
# Sequences of one document are alike; with fewer documents than this there is no telling how much.
LEAST_DOCUMENTS = 10

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluatedSAE:
    """An SAE, where it came from, and the positions that it was trained for."""

    file: SAEFile
    sae: SAE[Any]
    positions: PositionFilter


@dataclass(frozen=True)
class PreparedEvaluation:
    """An evaluation that is ready to start: SAEs of one hook of one model, on the same rows.

    Losses are measured on the first `n_loss_rows`, reconstruction on the first `n_sae_rows`, and firings on all.
    """

    saes: tuple[EvaluatedSAE, ...]
    protocol: str
    device: str
    model: ModelSource
    tokenizer: PreTrainedTokenizerBase
    hook_name: str
    text: TextSource
    held_out: HeldOutSplit | None
    context: ContextFormat
    rows_NT: np.ndarray
    unit_N: np.ndarray  # which independent unit of text a row belongs to
    units: str  # what these are: documents, or sequences
    n_loss_rows: int
    n_sae_rows: int
    special_token_ids: tuple[int, ...]
    unscored_token_ids: tuple[int, ...]  # under SAEBench's protocol
    features: tuple[int, ...]
    n_features: int
    seed: int


@dataclass(frozen=True)
class _Text:
    """Text and context: what decides whether two SAEs can be evaluated on the same rows."""

    source: TextSource
    held_out: HeldOutSplit | None
    context: ContextFormat
    skip_positions: int

    @property
    def key(self) -> tuple[Any, ...]:
        source = self.source
        return source.name, source.config, source.split, source.column, self.held_out, self.context


def prepare_evaluations(
    sae_settings: EvaluatedSAESettings, text_settings: EvaluationTextSettings, measurements: MeasurementSettings
) -> list[PreparedEvaluation]:
    """Loads the SAEs, checks that they fit their models and hooks, and tokenizes the text.

    Returns:
        One evaluation for each set of SAEs that share model, hook and text.

    Raises:
        UserError: the evaluation could not succeed.
    """
    device = choose_device(sae_settings.device)
    files = find_saes(list(sae_settings.sae_path), layer=sae_settings.layer)
    models: dict[tuple[Any, ...], ModelSource] = {}
    widths: dict[tuple[Any, ...], int] = {}
    texts: dict[tuple[Any, ...], _Text] = {}
    groups: dict[tuple[Any, ...], list[EvaluatedSAE]] = {}
    like = _record_of(sae_settings.like, sae_settings, text_settings) if sae_settings.like else None
    for file, sae in _load_saes(files):
        _check_features(measurements.features, sae, file)
        if like is not None:
            sae.cfg.metadata = copy(like)
        elif file.is_download:
            where = f"--sae_path {file.name}"
            check_names_of_download(sae, where, model_name=sae_settings.model_name, dataset=text_settings.dataset)
        model_name = sae_settings.model_name or sae.cfg.metadata.model_name
        if not model_name:
            raise UserError(f"--model_name: the SAE {file.name} does not say which model it is for; name it")
        model_kwargs = {} if sae_settings.model_name else _model_kwargs(sae, file)
        with _of_the_sae(file, unless=sae_settings.model_name):
            model_key = model_name, tuple(sorted(model_kwargs.items()))
            if model_key not in models:
                models[model_key] = find_model(
                    model_name, model_kwargs, trust_remote_code=sae_settings.trust_remote_code
                )
        model = models[model_key]
        with _of_the_sae(file, unless=sae_settings.layer):
            hook_name = _hook_name(sae, sae_settings.layer)
            if (model_key, hook_name) not in widths:
                widths[model_key, hook_name] = hook_width(model.config, hook_name, model.trust_remote_code)
        d_in = widths[model_key, hook_name]
        if sae.cfg.d_in != d_in:
            raise UserError(
                f"--sae_path {file.name}: an SAE of width {sae.cfg.d_in}, and {model.name} has {d_in} at {hook_name};"
                " give the model that it was trained on"
            )
        with _of_the_sae(file, unless=None):
            _check_separator(sae, model)
        with _of_the_sae(file, unless=text_settings.dataset or text_settings.context_length):
            text = _choose_text(sae, text_settings, model)
        key = (model_key, hook_name, text.key)
        texts[key] = texts.get(key, text)
        groups.setdefault(key, []).append(EvaluatedSAE(file, sae, PositionFilter(skip_positions=text.skip_positions)))
    if len(groups) > 1:
        log.warning("%s", _why_apart(groups))
    return [
        _prepare_group(text_settings, measurements, device, models[key[0]], key[1], texts[key], members)
        for key, members in groups.items()
    ]


def _record_of(like: str, sae_settings: EvaluatedSAESettings, text_settings: EvaluationTextSettings) -> SAEMetadata:
    """What the SAE of --like says of its model, hook, text and positions."""
    file, *others = find_saes([like], layer=sae_settings.layer, flag="--like")
    if others:
        raise UserError(f"--like {like}: {1 + len(others)} SAEs; name one of them, such as {file.name}")
    sae = load_sae_file(file, "cpu", "--like")
    check_metadata(sae, f"--like {file.name}")
    if file.is_download:
        check_names_of_download(
            sae, f"--like {file.name}", model_name=sae_settings.model_name, dataset=text_settings.dataset
        )
    return sae.cfg.metadata


def _load_saes(files: Sequence[SAEFile]) -> Iterator[tuple[SAEFile, SAE[Any]]]:
    """Loads SAEs, checked, on the CPU; one of a run or a pattern that is damaged is left out where others remain."""
    n_loaded = 0
    first_error: UserError | None = None
    for file in files:
        log.info("%s: %s, %s", file.name, file.library, file.form)
        try:
            sae = load_sae_file(file, "cpu")  # moved to the device while it is measured
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


def _model_kwargs(sae: SAE[Any], file: SAEFile) -> dict[str, str]:
    """Which weights of its model an SAE was trained on; nothing else that a file says reaches `from_pretrained`."""
    kwargs, left_out = model_kwargs_of_sae(sae.cfg.metadata.model_from_pretrained_kwargs or {})
    if left_out:
        log.info("%s: of its model_from_pretrained_kwargs, %s are not followed", file.name, ", ".join(left_out))
    return kwargs


@contextmanager
def _of_the_sae(file: SAEFile, *, unless: Any) -> Iterator[None]:
    """Names the SAE in a mistake that is in its own record, and not in the flag, unless that was given."""
    try:
        yield
    except UserError as error:
        raise error if unless is not None else UserError(f"--sae_path {file.name}: {error}") from None


def _check_features(features: Sequence[int], sae: SAE[Any], file: SAEFile) -> None:
    for feature in features:
        if not 0 <= feature < sae.cfg.d_sae:
            raise UserError(f"--features {feature}: {file.name} has the features 0 to {sae.cfg.d_sae - 1}")


def _check_separator(sae: SAE[Any], model: ModelSource) -> None:
    token, n_tokens = sae.cfg.metadata.get("sequence_separator_token"), model.config.get_text_config().vocab_size
    if isinstance(token, int) and not 0 <= token < n_tokens:
        raise UserError(
            f"metadata.sequence_separator_token in cfg.json is {token}, and {model.name} has the tokens 0 to"
            f" {n_tokens - 1}"
        )


def _why_apart(groups: dict[tuple[Any, ...], list[EvaluatedSAE]]) -> str:
    """What keeps the SAEs from one evaluation, in a line."""
    differing = [
        name
        for name, values in (
            ("models", {key[0] for key in groups}),
            ("hooks", {key[1] for key in groups}),
            ("texts, held-out splits or contexts", {key[2] for key in groups}),
        )
        if len(values) > 1
    ]
    names = "; ".join(f"{key[0][0]} {key[1]}: {', '.join(m.file.name for m in ms)}" for key, ms in groups.items())
    return f"SAEs of different {' and '.join(differing)}, evaluated in {len(groups)} passes ({names})"


def _choose_text(sae: SAE[Any], text_settings: EvaluationTextSettings, model: ModelSource) -> _Text:
    metadata = sae.cfg.metadata
    source, held_out = _open_text(sae, text_settings)
    context_size = text_settings.context_length or metadata.context_size or source.row_length or 128
    if source.row_length and not _same_data(source.name, metadata.dataset_path) and not text_settings.context_length:
        context_size = source.row_length  # given tokens are used as they are
    context = ContextFormat(
        context_size=context_size,
        prepend_bos=metadata.prepend_bos is not False,
        sequence_separator_token=metadata.get("sequence_separator_token", "bos"),
        disable_concat_sequences=bool(metadata.disable_concat_sequences),
    )
    if model.max_context is not None and context.context_size > model.max_context:
        raise UserError(
            f"--context_length {context.context_size}: {model.name} was made for contexts of at most"
            f" {model.max_context}"
        )
    skip_positions = (metadata.seqpos_slice or (None,))[0] or 0
    if skip_positions + 1 >= context.context_size:
        raise UserError(
            f"--context_length {context.context_size}: leaves no next token to predict after the {skip_positions}"
            f" positions that the SAE skips; give at least {skip_positions + 2}"
        )
    return _Text(source, held_out, context, skip_positions)


def _prepare_group(
    text_settings: EvaluationTextSettings,
    measurements: MeasurementSettings,
    device: str,
    model: ModelSource,
    hook_name: str,
    text: _Text,
    members: list[EvaluatedSAE],
) -> PreparedEvaluation:
    tokenizer = load_tokenizer(model)
    members = [
        replace(
            member,
            positions=PositionFilter(
                special_tokens(member.sae.cfg.metadata.get("exclude_special_tokens", False), tokenizer),
                member.positions.skip_positions,
                member.sae.cfg.metadata.max_activation_norm,
            ),
        )
        for member in members
    ]
    usable = text.context.context_size - text.skip_positions
    n_loss_rows = text_settings.num_samples or math.ceil(LOSS_TOKENS / usable)
    n_sae_rows = text_settings.num_samples or math.ceil(1.05 * TOKENS / usable)
    n_dead_rows = math.ceil(text_settings.dead_tokens / usable) if text_settings.dead_tokens else n_sae_rows
    rows_NT, document_N = collect_evaluation_rows(
        text.source,
        tokenizer,
        text.context,
        text.held_out,
        n_rows=n_sae_rows,
        n_more_rows=max(0, n_dead_rows - n_sae_rows),
        seed=text_settings.seed,
    )
    if len(rows_NT) < max(n_sae_rows, n_dead_rows):
        log.warning("%s: there are only %s tokens to evaluate on", text.source.name, f"{rows_NT.size:,}")
    check_token_ids(rows_NT, model, f"--dataset {text.source.name}")
    n_documents = len(np.unique(document_N[:n_loss_rows]))
    by_document = n_documents >= LEAST_DOCUMENTS and not text.source.tokenized
    if measurements.protocol == "saebench":
        n_sae_rows = n_loss_rows  # both of its passes read the same rows
    log.debug("%d contexts of %d tokens", *rows_NT.shape)
    return PreparedEvaluation(
        saes=tuple(members),
        protocol=measurements.protocol,
        device=device,
        model=model,
        tokenizer=tokenizer,
        hook_name=hook_name,
        text=text.source,
        held_out=text.held_out,
        context=text.context,
        rows_NT=rows_NT,
        unit_N=document_N if by_document else np.arange(len(rows_NT)),
        units="documents" if by_document else "sequences",
        n_loss_rows=min(n_loss_rows, len(rows_NT)),
        n_sae_rows=min(n_sae_rows, len(rows_NT)),
        special_token_ids=special_tokens(True, tokenizer),
        unscored_token_ids=tuple(
            {i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None}
        ),
        features=tuple(measurements.features),
        n_features=measurements.n_features,
        seed=text_settings.seed,
    )


def _hook_name(sae: SAE[Any], layer: int | None) -> str:
    """The SAE's own hook, at the layer that was asked for."""
    hook_name = sae.cfg.metadata.hook_name
    if not hook_name:
        if layer is None:
            raise UserError("--layer: the SAE's cfg.json does not say which hook it is for; name the layer")
        return f"blocks.{layer}.hook_resid_post"
    if layer is None:
        return hook_name
    at_layer = re.sub(r"\.\d+(?=\.|$)", f".{layer}", hook_name, count=1)
    if at_layer != hook_name:
        log.warning("--layer %d: the SAE was trained at %s; evaluating it at %s", layer, hook_name, at_layer)
    return at_layer


def _open_text(sae: SAE[Any], text_settings: EvaluationTextSettings) -> tuple[TextSource, HeldOutSplit | None]:
    """Opens the text, and says which of its documents the SAE did not train on.

    The data set of the training is read as the training read it, and only its held-out documents are used.
    Of another one, the split made for testing is taken.
    """
    metadata = sae.cfg.metadata
    name = text_settings.dataset or metadata.dataset_path
    if not name:
        raise UserError("--dataset: the SAE's cfg.json does not say what it was trained on; name a data set")
    is_own = _same_data(name, metadata.dataset_path)
    source = open_text(
        name,
        flag="--dataset",
        config=text_settings.dataset_config or (metadata.dataset_config if is_own else None),
        split=text_settings.dataset_split or (metadata.dataset_split if is_own else None),
        column=text_settings.text_column or (metadata.text_column if is_own else None),
        preferred_splits=("train",) if is_own else ("test", "validation", "train"),
        fallback=text_settings.fallback_dataset,
    )
    if is_own and metadata.fallback_from:
        source = replace(source, fallback_from=metadata.fallback_from)
    if is_own and metadata.dataset_split is None:
        log.warning("the SAE's cfg.json does not say which documents it trained on: these may be among them")
        return source, None
    trained_on = (metadata.dataset_config, metadata.dataset_split)
    if not _same_data(source.name, metadata.dataset_path) or (source.config, source.split) != trained_on:
        return source, None
    if not metadata.held_out_fraction:
        raise UserError(f"--dataset {name}: nothing of it was held out of the SAE's training; name another data set")
    return source, HeldOutSplit(metadata.held_out_fraction, metadata.held_out_seed)


def _same_data(name: str, other: str | None) -> bool:
    """Whether two names mean the same data set: the same path, or an id with its owner or without."""
    if other is None:
        return False
    if Path(name).exists() or Path(other).exists():
        return Path(name).resolve() == Path(other).resolve()
    (owner, _, ending), (other_owner, _, other_ending) = name.rpartition("/"), other.rpartition("/")
    return ending == other_ending and (owner == other_owner or "" in (owner, other_owner))
