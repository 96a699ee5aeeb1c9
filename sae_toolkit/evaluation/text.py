"""The text and the contexts that an SAE is evaluated with, from its cfg.json or from flags."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from sae_lens.saes.sae import SAEMetadata
from transformers import PreTrainedTokenizerBase

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.seen_text import same_data
from sae_toolkit.model.devices import out_of_memory_answered
from sae_toolkit.model.loading import ModelSource
from sae_toolkit.model.text_checks import check_fits_text, check_token_ids
from sae_toolkit.settings.evaluation import EvaluationTextSettings
from sae_toolkit.text.chat import by_chat_template
from sae_toolkit.text.positions import PositionFilter
from sae_toolkit.text.rows import ContextFormat, collect_evaluation_rows, split_marks
from sae_toolkit.text.sources import HeldOutSplit, TextSource, open_text

log = logging.getLogger(__name__)

# How many tokens are evaluated on. Losses, which need the model's upper layers and logits, are measured on fewer.
TOKENS = 50_000
LOSS_TOKENS = 20_000


@dataclass(frozen=True)
class EvaluationText:
    """The text and the context that an SAE is evaluated with."""

    source: TextSource
    held_out: HeldOutSplit | None
    context: ContextFormat
    skip_positions: int
    chat_tokens: Literal["all", "assistant"] | None  # None if the text holds no conversations

    @property
    def key(self) -> tuple[Any, ...]:
        """A key that is equal for SAEs that can be evaluated on the same rows."""
        source = self.source
        return source.name, source.config, source.split, source.column, self.held_out, self.context, self.chat_tokens


def open_text_of(
    metadata: SAEMetadata, text_settings: EvaluationTextSettings
) -> tuple[TextSource, HeldOutSplit | None]:
    """Opens the text to evaluate an SAE on.

    If it is the data set that the SAE was trained on, it is read as in training, and only its held-out documents are
    used, or the half of them that --held_out_part names. If it is another data set, its test split is used.

    Returns:
        The text, and the split by which documents are held out; None if all documents are used.

    Raises:
        UserError: no text is named, it cannot be opened, nothing of it was held out of the SAE's training, or it is
            not the text of the training and a half of its held-out documents is asked for.
    """
    name = text_settings.dataset or metadata.dataset_path
    if not name:
        raise UserError("--dataset: the SAE's cfg.json does not say what it was trained on; name a data set")
    is_own = same_data(name, metadata.dataset_path)
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
        log.warning("the SAE's cfg.json does not say which documents it trained on: it may have trained on these")
        return _all_of(source, text_settings)
    trained_on = (metadata.dataset_config, metadata.dataset_split)
    if not same_data(source.name, metadata.dataset_path) or (source.config, source.split) != trained_on:
        return _all_of(source, text_settings)
    if metadata.text_column not in (None, source.column):  # of another column, other documents are held out
        log.warning("%s: the SAE was trained on the column %s of the same data set", name, metadata.text_column)
        return _all_of(source, text_settings)
    if not metadata.held_out_fraction:
        raise UserError(
            f"--dataset {name}: no documents of it were held out of the SAE's training; name another data set"
        )
    return source, HeldOutSplit(metadata.held_out_fraction, metadata.held_out_seed, text_settings.held_out_part)


def _all_of(source: TextSource, text_settings: EvaluationTextSettings) -> tuple[TextSource, None]:
    """Returns a text of which no documents are known to be held out."""
    if (part := text_settings.held_out_part) is not None:
        raise UserError(
            f"--held_out_part {part}: it is not known which documents of {source.name} were held out of the SAE's"
            " training; leave it out"
        )
    return source, None


def with_context(
    source: TextSource,
    held_out: HeldOutSplit | None,
    metadata: SAEMetadata,
    text_settings: EvaluationTextSettings,
    model: ModelSource,
) -> EvaluationText:
    """Returns a text with the context and the positions to evaluate an SAE with.

    Raises:
        UserError: the context is too long for the model, or leaves no next token to predict.
    """
    context_size = text_settings.context_length or metadata.context_size or source.row_length or 128
    is_own = same_data(source.name, metadata.dataset_path)
    if source.row_length and source.row_length < context_size and not is_own and not text_settings.context_length:
        log.warning(  # no context has tokens of two rows
            "%s: rows of at most %d tokens; measuring on contexts as long as these, and not of %d tokens",
            *(source.name, source.row_length, context_size),
        )
        context_size = source.row_length
    context = ContextFormat(
        context_size=context_size,
        prepend_bos=metadata.prepend_bos is not False,
        sequence_separator_token=metadata.get("sequence_separator_token", "bos"),
        disable_concat_sequences=bool(metadata.disable_concat_sequences),
    )
    if model.max_context is not None and context.context_size > model.max_context:
        raise UserError(
            f"--context_length {context.context_size}: {model.name} was made for contexts of at most"
            f" {model.max_context}; lower it"
        )
    check_fits_text(model, source.name, context.context_size, "--dataset", "--context_length")
    skip_positions = text_settings.skip_positions
    if skip_positions is None:
        skip_positions = (metadata.seqpos_slice or (None,))[0] or 0
    elif skip_positions + 1 >= context.context_size:
        raise UserError(
            f"--skip_positions {skip_positions}: leaves no next token to predict in a context of"
            f" {context.context_size}; lower it"
        )
    if skip_positions + 1 >= context.context_size:
        raise UserError(
            f"--context_length {context.context_size}: leaves no next token to predict after the {skip_positions}"
            f" positions that the SAE skips; give at least {skip_positions + 2}"
        )
    return EvaluationText(source, held_out, context, skip_positions, _chat_tokens(source, metadata, text_settings))


def _chat_tokens(
    source: TextSource, metadata: SAEMetadata, text_settings: EvaluationTextSettings
) -> Literal["all", "assistant"] | None:
    """Returns which tokens of conversations to measure on; None for a text without any, unless a flag asks for them."""
    if source.is_chat:
        return text_settings.chat_tokens or metadata.chat_tokens or "all"
    if text_settings.chat_tokens == "assistant":
        return "assistant"  # which is refused when the text is read
    if metadata.chat_tokens == "assistant" and text_settings.chat_tokens is None:
        log.warning(
            "%s: holds no conversations, and the SAE was trained only on what the assistant says in some; measuring on"
            " all of this text",
            source.name,
        )
    return None


def rows_of_evaluation(usable: int) -> int:
    """Returns how many rows an SAE is evaluated on where nobody says, if so many positions of each are usable."""
    return math.ceil(1.05 * TOKENS / usable)


def collect_rows(
    text: EvaluationText,
    positions: PositionFilter,
    tokenizer: PreTrainedTokenizerBase,
    settings: EvaluationTextSettings,
    model: ModelSource,
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, int, int]:
    """Tokenizes the text.

    Returns:
        Token ids, [N, T]; booleans [N, T], True where the assistant speaks, or None if `positions` need not know it;
        the number of the document that each row is from, [N]; and the numbers of rows for losses and for
        reconstruction.

    Raises:
        UserError: the text cannot be read, is too short, or has tokens that the model does not have; or it holds
            conversations and the tokenizer has no chat template, or none where --chat_tokens asks for some.
    """
    source = by_chat_template(text.source, tokenizer, text.chat_tokens, flag="--dataset", model_name=model.name)
    if source.sample:
        log.info("%s: %s", source.name, source.described(with_sample=True))
    usable = text.context.context_size - text.skip_positions
    n_loss_rows = settings.num_samples or math.ceil(LOSS_TOKENS / usable)
    n_sae_rows = settings.num_samples or rows_of_evaluation(usable)
    n_dead_rows = math.ceil(settings.dead_tokens / usable) if settings.dead_tokens else n_sae_rows
    with out_of_memory_answered(
        f"--dataset {text.source.name}: reading it", "lower --num_samples or --dead_tokens, or free memory"
    ):
        marked_NT, document_N = collect_evaluation_rows(
            source,
            tokenizer,
            text.context,
            text.held_out,
            n_rows=n_sae_rows,
            n_more_rows=max(0, n_dead_rows - n_sae_rows),
            seed=settings.seed,
        )
    rows_NT, assistant_NT = split_marks(marked_NT, positions)
    if len(rows_NT) < max(n_sae_rows, n_dead_rows):
        log.warning("%s: there are only %s tokens to evaluate on", text.source.name, f"{rows_NT.size:,}")
    check_token_ids(rows_NT, model, f"--dataset {text.source.name}")
    log.debug("%d contexts of %d tokens", *rows_NT.shape)
    return rows_NT, assistant_NT, document_N, min(n_loss_rows, len(rows_NT)), min(n_sae_rows, len(rows_NT))
