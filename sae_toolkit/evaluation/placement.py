"""Where each SAE is measured: the model, the hook, the text and the positions, from its cfg.json or from flags."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.prepared_evaluation import EvaluatedSAE
from sae_toolkit.evaluation.seen_text import may_have_trained_on
from sae_toolkit.evaluation.text import EvaluationText, open_text_of, with_context
from sae_toolkit.files.trust import model_kwargs_of_sae
from sae_toolkit.model.hook_width import hook_width
from sae_toolkit.model.loading import ModelSource, find_model
from sae_toolkit.saes.formats import SAEFile, load_sae_file
from sae_toolkit.saes.metadata import check_metadata, check_names_of_download
from sae_toolkit.saes.search import find_saes
from sae_toolkit.settings.evaluation import EvaluatedSAESettings, EvaluationTextSettings
from sae_toolkit.text.positions import PositionFilter
from sae_toolkit.text.sources import TextSource

ModelKey = tuple[str, tuple[tuple[str, str], ...]]  # name, and arguments of `from_pretrained`

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlacedSAE:
    """An SAE, and where it is measured.

    Args:
        evaluated: the SAE. Its positions do not yet leave out special tokens, which the tokenizer knows.
        record: says how to measure it: its own record, or that of the SAE that --like names.
        model_key: equal for SAEs of the same model.
    """

    evaluated: EvaluatedSAE
    record: SAEMetadata
    model_key: ModelKey
    model: ModelSource
    hook_name: str
    text: EvaluationText


class Placement:
    """Finds where SAEs are measured. Models and widths that several SAEs have are looked up once.

    Args:
        sae_settings, text_settings: the flags, which come before what an SAE's record says.
        reads_text: whether text is opened. Without any, an SAE is placed as on the text that it was trained on.

    Raises:
        UserError: --like names no SAE, several, or one that cannot be loaded.
    """

    def __init__(
        self, sae_settings: EvaluatedSAESettings, text_settings: EvaluationTextSettings, *, reads_text: bool = True
    ) -> None:
        self._saes = sae_settings
        self._text = text_settings
        self._reads_text = reads_text
        self._like = _record_of(sae_settings.like, sae_settings, text_settings) if sae_settings.like else None
        self._models: dict[ModelKey, ModelSource] = {}
        self._widths: dict[ModelKey, dict[str, int]] = {}

    def place(self, file: SAEFile, sae: SAE[Any]) -> PlacedSAE:
        """Returns where an SAE is measured, after checking that it fits there.

        Raises:
            UserError: it is not known, cannot be opened, or does not fit.
        """
        own = sae.cfg.metadata
        record = own if self._like is None else self._like
        if self._like is None and file.is_download:
            where = f"--sae_path {file.name}"
            dataset = self._text.dataset if self._reads_text else ""  # none is opened
            check_names_of_download(sae, where, model_name=self._saes.model_name, dataset=dataset)
        model_key = _find_model(record, file, self._saes, self._models)
        model = self._models[model_key]
        hook_name = _find_hook(record, sae, file, self._saes, model, self._widths.setdefault(model_key, {}))
        text = self._open_text(record, file, model)
        sources = _sources(record, self._saes, self._text, is_chat=text.source.is_chat)
        multiple = self._text.max_activation_norm_multiple
        limit = record.max_activation_norm if multiple is None else None
        positions = PositionFilter((), text.skip_positions, limit, text.chat_tokens)
        is_text_seen = may_have_trained_on(own, text.source, text.held_out)
        evaluated = EvaluatedSAE(file, sae, positions, multiple or None, sources, is_text_seen)
        if record is not own:
            _warn_of_other_place(evaluated, model, hook_name)
        if text.held_out is not None:
            _warn_of_seen_text(evaluated, text.source.name)
        return PlacedSAE(evaluated, record, model_key, model, hook_name, text)

    def _open_text(self, record: SAEMetadata, file: SAEFile, model: ModelSource) -> EvaluationText:
        with _of_the_sae(file, unless=None):
            _check_separator(record, model)
        with _of_the_sae(file, unless=self._text.dataset):
            source, held_out = open_text_of(record, self._text) if self._reads_text else (_no_text(record), None)
        of_context = self._text.context_length, self._text.skip_positions
        with _of_the_sae(file, unless=next((flag for flag in of_context if flag is not None), None)):
            return with_context(source, held_out, record, self._text, model)


def _no_text(record: SAEMetadata) -> TextSource:
    """Returns a text without documents, of the kind that an SAE was trained on."""
    is_chat = record.chat_tokens is not None
    return TextSource("no text", None, "", "", tokenized=False, read=lambda: (), is_chat=is_chat)


def _find_model(
    record: SAEMetadata, file: SAEFile, settings: EvaluatedSAESettings, models: dict[ModelKey, ModelSource]
) -> ModelKey:
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


def _check_separator(record: SAEMetadata, model: ModelSource) -> None:
    token, n_tokens = record.get("sequence_separator_token"), model.config.get_text_config().vocab_size
    if isinstance(token, int) and not 0 <= token < n_tokens:
        raise UserError(
            f"metadata.sequence_separator_token in cfg.json is {token}, and {model.name} has the tokens 0 to"
            f" {n_tokens - 1}"
        )


def _warn_of_other_place(evaluated: EvaluatedSAE, model: ModelSource, hook_name: str) -> None:
    """Warns where an SAE that is measured as another one was trained on another model, or at another hook."""
    own, name = evaluated.sae.cfg.metadata, evaluated.file.name
    for trained, measured in ((own.model_name, model.name), (own.hook_name, hook_name)):
        if trained and trained != measured:
            log.warning("%s: was trained at %s; with --like it is evaluated at %s", name, trained, measured)


def _warn_of_seen_text(evaluated: EvaluatedSAE, text_name: str) -> None:
    """Warns where documents were held out of one training, and the SAE may have been trained on them in another."""
    if evaluated.is_text_seen:
        log.warning(
            "%s: may have been trained on these documents of %s, which are not those that all of its training held out;"
            " give other text by --dataset, or train the SAEs with one --held_out_seed",
            *(evaluated.file.name, text_name),
        )
    elif evaluated.is_text_seen is None:
        log.warning(
            "%s: its files do not say whether it was trained on these documents of %s",
            *(evaluated.file.name, text_name),
        )
