"""Prepares evaluations: loads SAEs, and finds the model, hook and text of each from its cfg.json or from flags."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from transformers import PreTrainedTokenizerBase

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE, PreparedEvaluation
from sae_toolkit.evaluation.text import EvaluationText, collect_rows, may_have_trained_on, open_text_of, with_context
from sae_toolkit.files.trust import model_kwargs_of_sae
from sae_toolkit.model.devices import choose_device
from sae_toolkit.model.hook_width import hook_width
from sae_toolkit.model.loading import ModelSource, find_model
from sae_toolkit.model.tokenizer import load_tokenizer
from sae_toolkit.saes.formats import SAEFile, load_sae_file
from sae_toolkit.saes.metadata import check_metadata, check_names_of_download
from sae_toolkit.saes.search import find_saes
from sae_toolkit.settings.evaluation import EvaluatedSAESettings, EvaluationTextSettings, MeasurementSettings
from sae_toolkit.text.positions import PositionFilter
from sae_toolkit.text.rows import special_tokens

# Sequences of one document resemble each other, so the bootstrap draws whole documents. Fewer documents than this are
# too few for that, and it draws sequences.
LEAST_DOCUMENTS = 10

_ModelKey = tuple[str, tuple[tuple[str, str], ...]]  # name, and arguments of `from_pretrained`
_GroupKey = tuple[_ModelKey, str, tuple[Any, ...]]  # model, hook and text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Group:
    """SAEs that are evaluated together: at the same hook of the same model, on the same text.

    Beside each SAE is the record that says how to measure it: its own, or that of the SAE that --like names.
    """

    model: ModelSource
    hook_name: str
    text: EvaluationText
    members: list[tuple[EvaluatedSAE, SAEMetadata]] = field(default_factory=list)


def prepare_evaluations(
    sae_settings: EvaluatedSAESettings, text_settings: EvaluationTextSettings, measurements: MeasurementSettings
) -> list[PreparedEvaluation]:
    """Loads the SAEs, checks that they fit their models and hooks, and tokenizes the text.

    Returns:
        One evaluation for each set of SAEs that have the same model, hook and text.

    Raises:
        UserError: an evaluation could not succeed.
    """
    device = choose_device(sae_settings.device)
    flag = "--stability" if sae_settings.sae_path == measurements.stability else "--sae_path"
    files = find_saes(list(sae_settings.sae_path), layer=sae_settings.layer, flag=flag)
    models: dict[_ModelKey, ModelSource] = {}
    widths: dict[_ModelKey, dict[str, int]] = {}
    groups: dict[_GroupKey, _Group] = {}
    like = _record_of(sae_settings.like, sae_settings, text_settings) if sae_settings.like else None
    for file, sae in _load_saes(files):
        _check_features(measurements.features, sae, file)
        own = sae.cfg.metadata
        record = own if like is None else like
        if like is None and file.is_download:
            where = f"--sae_path {file.name}"
            check_names_of_download(sae, where, model_name=sae_settings.model_name, dataset=text_settings.dataset)
        model_key = _find_model(record, file, sae_settings, models)
        model = models[model_key]
        hook_name = _find_hook(record, sae, file, sae_settings, model, widths.setdefault(model_key, {}))
        with _of_the_sae(file, unless=None):
            _check_separator(record, model)
        with _of_the_sae(file, unless=text_settings.dataset):
            source, held_out = open_text_of(record, text_settings)
        of_context = text_settings.context_length, text_settings.skip_positions
        with _of_the_sae(file, unless=next((flag for flag in of_context if flag is not None), None)):
            text = with_context(source, held_out, record, text_settings, model)
        group = groups.setdefault((model_key, hook_name, text.key), _Group(model, hook_name, text))
        sources = _sources(record, sae_settings, text_settings, is_chat=source.is_chat)
        multiple = text_settings.max_activation_norm_multiple
        limit = record.max_activation_norm if multiple is None else None
        positions = PositionFilter((), text.skip_positions, limit, text.chat_tokens)
        is_text_seen = may_have_trained_on(own, text)
        evaluated = EvaluatedSAE(file, sae, positions, multiple or None, sources, is_text_seen)
        if record is not own:
            _warn_of_own_record(evaluated, model, hook_name, text)
        group.members.append((evaluated, record))
    if len(groups) > 1:
        log.warning("%s", _why_apart(groups))
    return [_prepare_group(group, text_settings, measurements, device) for group in groups.values()]


def _warn_of_own_record(evaluated: EvaluatedSAE, model: ModelSource, hook_name: str, text: EvaluationText) -> None:
    """Warns where an SAE that is measured as another one was trained elsewhere, or on the text."""
    own, name = evaluated.sae.cfg.metadata, evaluated.file.name
    for trained, measured in ((own.model_name, model.name), (own.hook_name, hook_name)):
        if trained and trained != measured:
            log.warning("%s: was trained at %s; with --like it is evaluated at %s", name, trained, measured)
    if evaluated.is_text_seen:
        log.warning(
            "%s: may have been trained on these documents of %s, which are not those that it holds out itself; give"
            " other text by --dataset, or train the SAEs with one --held_out_seed",
            *(name, text.source.name),
        )


def _find_model(
    record: SAEMetadata, file: SAEFile, settings: EvaluatedSAESettings, models: dict[_ModelKey, ModelSource]
) -> _ModelKey:
    """Adds the model of an SAE to the models, if it is not there, and returns its key."""
    name = settings.model_name or record.model_name
    if not name:
        raise UserError(f"--model_name: the SAE {file.name} does not say which model it is for; name it")
    kwargs = {} if settings.model_name else _model_kwargs(record, file)
    key = name, tuple(sorted(kwargs.items()))
    if key not in models:
        with _of_the_sae(file, unless=settings.model_name):
            models[key] = find_model(name, kwargs, trust_remote_code=settings.trust_remote_code)
    return key


def _sources(
    metadata: SAEMetadata,
    sae_settings: EvaluatedSAESettings,
    text_settings: EvaluationTextSettings,
    *,
    is_chat: bool,
) -> dict[str, str]:
    """Returns where the hook and the positions of an SAE come from, as `EvaluatedSAE.sources`."""
    record = "--like" if sae_settings.like else "record"
    has_hook_flag = sae_settings.hook_name is not None or sae_settings.layer is not None
    given = {
        **({"chat_tokens": ("chat_tokens", text_settings.chat_tokens is not None)} if is_chat else {}),
        "hook_name": ("hook_name", has_hook_flag),
        "exclude_special_tokens": ("exclude_special_tokens", text_settings.exclude_special_tokens is not None),
        "skip_positions": ("seqpos_slice", text_settings.skip_positions is not None),
        "max_activation_norm": ("max_activation_norm", text_settings.max_activation_norm_multiple is not None),
    }
    return {
        name: "flag" if by_flag else record if field in metadata else "default"
        for name, (field, by_flag) in given.items()
    }


def _find_hook(
    record: SAEMetadata,
    sae: SAE[Any],
    file: SAEFile,
    settings: EvaluatedSAESettings,
    model: ModelSource,
    widths: dict[str, int],
) -> str:
    """Returns the hook of an SAE, after checking that the SAE has the width of the activations there.

    Args:
        widths: the widths of the model's activations by hook, as far as they are known. A new one is added.
    """
    with _of_the_sae(file, unless=settings.layer if settings.hook_name is None else settings.hook_name):
        hook_name = settings.hook_name or _hook_name(record, settings.layer)
        if hook_name not in widths:
            flag = "--hook_name" if settings.hook_name else None
            widths[hook_name] = hook_width(model.config, hook_name, model.trust_remote_code, flag)
    if sae.cfg.d_in != widths[hook_name]:
        if settings.hook_name:
            raise UserError(
                f"--hook_name {hook_name}: {model.name} has the width {widths[hook_name]} there, and the SAE"
                f" {file.name} has the width {sae.cfg.d_in}; name the hook that it was trained at"
            )
        raise UserError(
            f"--sae_path {file.name}: an SAE of width {sae.cfg.d_in}, and {model.name} has {widths[hook_name]} at"
            f" {hook_name}; give the model that it was trained on"
        )
    return hook_name


def _record_of(like: str, sae_settings: EvaluatedSAESettings, text_settings: EvaluationTextSettings) -> SAEMetadata:
    """Returns the metadata of the SAE that --like names: its model, hook, text and positions."""
    file, *others = find_saes([like], layer=sae_settings.layer, flag="--like")
    if others:
        raise UserError(f"--like {like}: there are {1 + len(others)} SAEs; name one of them, such as {file.name}")
    sae = load_sae_file(file, "cpu", "--like")
    check_metadata(sae, f"--like {file.name}")
    if file.is_download:
        check_names_of_download(
            sae, f"--like {file.name}", model_name=sae_settings.model_name, dataset=text_settings.dataset
        )
    return sae.cfg.metadata


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


def _model_kwargs(record: SAEMetadata, file: SAEFile) -> dict[str, str]:
    """Returns the arguments of `from_pretrained` that choose the model's weights. Others in the file are ignored."""
    kwargs, left_out = model_kwargs_of_sae(record.model_from_pretrained_kwargs or {})
    if left_out:
        log.info("%s: %s in its model_from_pretrained_kwargs are ignored", file.name, ", ".join(left_out))
    return kwargs


@contextmanager
def _of_the_sae(file: SAEFile, *, unless: Any) -> Iterator[None]:
    """Names the SAE in errors about a value that comes from its cfg.json.

    Args:
        unless: value of the flag that takes the place of cfg.json. Unless it is None, the error stays as it is.
    """
    try:
        yield
    except UserError as error:
        raise error if unless is not None else UserError(f"--sae_path {file.name}: {error}") from None


def _check_features(features: Sequence[int], sae: SAE[Any], file: SAEFile) -> None:
    for feature in features:
        if not 0 <= feature < sae.cfg.d_sae:
            raise UserError(f"--features {feature}: {file.name} has the features 0 to {sae.cfg.d_sae - 1}")


def _check_separator(record: SAEMetadata, model: ModelSource) -> None:
    token, n_tokens = record.get("sequence_separator_token"), model.config.get_text_config().vocab_size
    if isinstance(token, int) and not 0 <= token < n_tokens:
        raise UserError(
            f"metadata.sequence_separator_token in cfg.json is {token}, and {model.name} has the tokens 0 to"
            f" {n_tokens - 1}"
        )


def _why_apart(groups: dict[_GroupKey, _Group]) -> str:
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
        f"{model_key[0]} {hook_name}: {', '.join(member.file.name for member, _ in group.members)}"
        for (model_key, hook_name, _), group in groups.items()
    )
    return f"SAEs of different {' and '.join(differing)}, evaluated in {len(groups)} passes ({names})"


def _prepare_group(
    group: _Group, text_settings: EvaluationTextSettings, measurements: MeasurementSettings, device: str
) -> PreparedEvaluation:
    tokenizer = load_tokenizer(group.model)
    rows_NT, assistant_NT, document_N, n_loss_rows, n_sae_rows = collect_rows(
        group.text, group.members[0][0].positions, tokenizer, text_settings, group.model
    )
    if measurements.protocol == "saebench":
        n_sae_rows = n_loss_rows  # both of SAEBench's passes read the same rows
    n_documents = len(np.unique(document_N[:n_loss_rows]))
    by_document = n_documents >= LEAST_DOCUMENTS and not group.text.source.tokenized
    return PreparedEvaluation(
        saes=tuple(
            _with_special_tokens(
                member, record, tokenizer, group.text.source.is_chat, text_settings.exclude_special_tokens
            )
            for member, record in group.members
        ),
        protocol=measurements.protocol,
        device=device,
        model=group.model,
        tokenizer=tokenizer,
        hook_name=group.hook_name,
        text=group.text.source,
        held_out=group.text.held_out,
        context=group.text.context,
        rows_NT=rows_NT,
        assistant_NT=assistant_NT,
        unit_N=document_N if by_document else np.arange(len(rows_NT)),
        units="documents" if by_document else "sequences",
        n_loss_rows=n_loss_rows,
        n_sae_rows=n_sae_rows,
        special_token_ids=special_tokens(True, tokenizer, is_chat=group.text.source.is_chat),
        unscored_token_ids=tuple(
            {i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None}
        ),
        features=tuple(measurements.features),
        n_features=measurements.n_features,
        seed=text_settings.seed,
    )


def _with_special_tokens(
    evaluated: EvaluatedSAE,
    record: SAEMetadata,
    tokenizer: PreTrainedTokenizerBase,
    is_chat: bool,
    exclude: bool | list[int] | None,
) -> EvaluatedSAE:
    """Returns an SAE whose positions leave out special tokens.

    Args:
        record: says how the SAE is measured.
        is_chat: whether the text holds conversations.
        exclude: which, as --exclude_special_tokens says; None for those that the SAE's training left out.
    """
    if exclude is None:
        exclude = record.get("exclude_special_tokens", False)
    special_token_ids = special_tokens(exclude, tokenizer, is_chat=is_chat)
    return replace(evaluated, positions=replace(evaluated.positions, special_token_ids=special_token_ids))


def _hook_name(record: SAEMetadata, layer: int | None) -> str:
    """Returns the hook that the SAE was trained at, or the same kind of hook at `layer` if that is given."""
    hook_name = record.hook_name
    if not hook_name:
        if layer is None:
            raise UserError(
                "--layer: the SAE's cfg.json does not say which hook it is for; name the layer, or the hook by"
                " --hook_name"
            )
        return f"blocks.{layer}.hook_resid_post"
    if layer is None:
        return hook_name
    at_layer, n_layers = re.subn(r"\.\d+(?=\.|$)", f".{layer}", hook_name, count=1)
    if not n_layers:
        raise UserError(f"--layer {layer}: the SAE was trained at {hook_name}, which is in no layer; leave it out")
    if at_layer != hook_name:
        log.warning("--layer %d: the SAE was trained at %s; evaluating it at %s", layer, hook_name, at_layer)
    return at_layer
