"""Packs documents into rows of token ids. Each row is one context of the language model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, cast

import numpy as np
import torch
from sae_lens.pretokenize_runner import get_special_token_from_cfg
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from sae_lens.util import get_special_token_ids
from transformers import PreTrainedTokenizerBase

from sae_toolkit.errors import UserError
from sae_toolkit.terminal.progress import Progress
from sae_toolkit.text.positions import PositionFilter
from sae_toolkit.text.records import Conversation, Document
from sae_toolkit.text.sources import HeldOutSplit, TextSource
from sae_toolkit.text.token_ids import TokenIds
from sae_toolkit.text.tokenized_rows import LeftOut, contexts_of_token_ids

_DOCUMENTS_AT_ONCE = 64
_MARGIN = 1.02  # more positions than needed, because massive activations are left out later
# In a row of uint32, this bit of a token says that the assistant said it. Token ids are far below.
_ASSISTANT = 1 << 31


@dataclass(frozen=True)
class ContextFormat:
    """How documents are packed into contexts. The fields have the names and meanings of SAELens's."""

    context_size: int
    prepend_bos: bool = True
    sequence_separator_token: int | Literal["bos", "eos", "sep"] | None = "bos"
    disable_concat_sequences: bool = False


def special_tokens(exclude: bool | list[int], tokenizer: PreTrainedTokenizerBase, *, is_chat: bool) -> tuple[int, ...]:
    """Returns the token ids that SAELens's `exclude_special_tokens` leaves out.

    Args:
        exclude: True for every special token of the tokenizer, False for none, or the token ids.
        tokenizer: the language model's tokenizer.
        is_chat: whether the text holds conversations. SAELens knows the tokens that stand at the start, at the end and
            between texts. Those that a chat template writes around messages are special tokens too.

    Raises:
        UserError: an id is none of the tokenizer's.
    """
    if exclude is not True:
        unknown = [i for i in exclude or () if not 0 <= i < len(tokenizer)]
        if unknown:
            raise UserError(
                f"--exclude_special_tokens {unknown[0]}: the tokenizer has the ids 0 to {len(tokenizer) - 1:,}; give"
                " ids of it"
            )
        return tuple(exclude or ())
    of_template = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special) if is_chat else ()
    return tuple(sorted({*get_special_token_ids(tokenizer), *of_template}))


def token_rows(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    context: ContextFormat,
    *,
    tokenized: bool,
    left_out: LeftOut | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Packs documents into rows of `context.context_size` token ids.

    With `context.prepend_bos` each row starts with exactly one BOS token, even if the tokenizer adds one itself.
    Documents follow one another with a separator between them, and the incomplete last row is dropped.

    Args:
        documents: texts, conversations that a template was applied to, or rows of token ids.
        tokenizer: the language model's tokenizer.
        context: how to pack them.
        tokenized: whether the documents are rows of token ids. Such rows are not joined: each is cut into contexts, as
            `contexts_of_token_ids` says.
        left_out: counts the tokens of rows of token ids that are in no context.

    Yields:
        The index of the document that the row ends in, from 0, and the row: [context_size] int64. Of conversations
        with `assistant_spans`, the tokens of the assistant are marked; `split_marks` takes the marks away.

    Raises:
        UserError: the documents are texts, and there is no tokenizer, or it lacks a special token of `context`.
    """
    if tokenized:
        yield from contexts_of_token_ids(
            cast(Iterable[str | Sequence[int]], documents),
            context.context_size,
            bos_token_id=tokenizer.bos_token_id if context.prepend_bos else None,
            first_only=context.disable_concat_sequences,
            left_out=left_out,
        )
        return
    n_taken = 0

    def taken() -> Iterator[torch.Tensor]:
        nonlocal n_taken
        for ids in _token_ids(documents, tokenizer, (bos, separator)):
            n_taken += 1
            yield ids

    bos, separator = _tokens_between(tokenizer, context)
    for tokens in concat_and_batch_sequences(
        tokens_iterator=taken(),
        context_size=context.context_size,
        begin_batch_token_id=bos,
        begin_sequence_token_id=None,
        sequence_separator_token_id=separator,
        disable_concat_sequences=context.disable_concat_sequences,
    ):
        yield n_taken - 1, tokens.numpy()


def _tokens_between(tokenizer: PreTrainedTokenizerBase, context: ContextFormat) -> tuple[int | None, int | None]:
    """Returns the token that contexts begin with and the one between documents, each None if there shall be none.

    Raises:
        UserError: the tokenizer does not have one of them.
    """
    wanted = context.sequence_separator_token
    separator = get_special_token_from_cfg(wanted, tokenizer)
    if isinstance(tokenizer, TokenIds):
        return None, None  # it refuses the text, whatever its special tokens are
    if context.prepend_bos and tokenizer.bos_token_id is None:
        raise UserError(
            f"--model_name {tokenizer.name_or_path}: the tokenizer has neither a BOS nor an EOS token for contexts of"
            " text to begin with; train with --set prepend_bos=false, or give rows of token ids"
        )
    if wanted is not None and separator is None:
        raise UserError(
            f"--model_name {tokenizer.name_or_path}: the tokenizer has no {str(wanted).upper()} token to put between"
            " documents; train with --set sequence_separator_token=null, or give rows of token ids"
        )
    return tokenizer.bos_token_id if context.prepend_bos else None, separator


def _token_ids(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, unmarked: tuple[int | None, ...]
) -> Iterator[torch.Tensor]:
    """Yields the token ids of each document, with the assistant's marked.

    Args:
        unmarked: token ids that are never marked. SAELens compares them with the first token of a document.
    """
    never = torch.tensor([token for token in unmarked if token is not None], dtype=torch.long)
    documents = iter(documents)
    while batch := list(islice(documents, _DOCUMENTS_AT_ONCE)):
        spans = [document.assistant_spans if isinstance(document, Conversation) else () for document in batch]
        texts: list[Any] = [document.text if isinstance(document, Conversation) else document for document in batch]
        encoded: Any = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=any(spans)
        )
        for i, ids in enumerate(encoded["input_ids"]):
            if not ids:
                continue
            tokens_T = torch.tensor(ids)
            if spans[i]:
                said_T = torch.from_numpy(_in_spans(np.array(encoded["offset_mapping"][i]), spans[i]))
                tokens_T += _ASSISTANT * (said_T & ~torch.isin(tokens_T, never))
            yield tokens_T


def _in_spans(offsets_T2: np.ndarray, spans: Iterable[tuple[int, int]]) -> np.ndarray:
    """Returns [T] booleans, True at tokens with a character in one of the spans.

    Args:
        offsets_T2: the first character of each token, and the one behind it.
        spans: the first character of each span, and the one behind it.
    """
    in_span_T = np.zeros(len(offsets_T2), dtype=bool)
    for first, end in spans:
        in_span_T |= (offsets_T2[:, 1] > first) & (offsets_T2[:, 0] < end)
    return in_span_T


def split_marks(rows_NT: np.ndarray, positions: PositionFilter) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the token ids [N, T] of rows, and booleans [N, T] that are True where the assistant speaks.

    Args:
        rows_NT: rows of `token_rows`, marked where `positions` need to know where the assistant speaks.
        positions: the positions that are kept. Unless they need it, the booleans are None.
    """
    if positions.chat_tokens != "assistant":
        return rows_NT, None
    return rows_NT & ~rows_NT.dtype.type(_ASSISTANT), (rows_NT & rows_NT.dtype.type(_ASSISTANT)) != 0


def collect_training_rows(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    context: ContextFormat,
    positions: PositionFilter,
    held_out: HeldOutSplit,
    *,
    training_tokens: int,
    epochs: int = 1,
    flag: str = "--dataset_path",
) -> np.ndarray:
    """Tokenizes the documents that are not held out, until the rows have enough positions to train on.

    Args:
        source: the data set.
        tokenizer: the language model's tokenizer.
        context: how documents are packed into rows.
        positions: the positions that are left out of the training.
        held_out: the split whose held-out documents are not read.
        training_tokens: how many positions are needed.
        epochs: how often the run may train on each row to reach `training_tokens`.
        flag: the flag that named the data set, for messages.

    Returns:
        [n_rows, context_size] uint32 token ids, marked as by `token_rows`. If the data set is large enough, the rows
        have 2% more positions than `training_tokens`, because massive activations are left out later.

    Raises:
        UserError: the data set has fewer positions to train on than `training_tokens` / `epochs`.
    """
    documents = (document for document in source.documents() if not held_out.holds_out(document))
    rows: list[np.ndarray] = []
    left_out = LeftOut(context.context_size)
    n_positions = 0
    with Progress("tokenizing", training_tokens) as progress:
        for _, row in token_rows(documents, tokenizer, context, tokenized=source.tokenized, left_out=left_out):
            rows.append(row.astype(np.uint32))
            kept = int(positions.keeps_tokens(*split_marks(row[None], positions)).sum())
            n_positions += kept
            progress.advance(kept)
            if n_positions >= _MARGIN * training_tokens:
                break
    if n_positions * epochs < training_tokens:
        because = f"contexts of {context.context_size}, {100 * held_out.fraction:.4g}% held out"
        if said := left_out.describe():
            because += f"; {said}"
        what_to_do = "lower --training_tokens, use more text"
        if n_positions:
            enough = math.ceil(_MARGIN * training_tokens / n_positions)
            what_to_do += f", or train on it up to {enough:,} times (--epochs {enough})"
        elif left_out.all_short:
            what_to_do = f"lower --context_size to {left_out.longest}"
        raise UserError(
            f"{flag} {source.name}: too small: {n_positions:,} tokens to train on ({because}), and --training_tokens"
            f" asks for {training_tokens:,}{f' in --epochs {epochs}' if epochs > 1 else ''}; {what_to_do}"
        )
    left_out.log()
    return np.stack(rows)


def collect_evaluation_rows(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    context: ContextFormat,
    held_out: HeldOutSplit | None,
    *,
    n_rows: int,
    n_more_rows: int = 0,
    seed: int,
    flag: str = "--dataset",
    required: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes documents that the SAE was not trained on, and draws rows from them.

    Rows are drawn from the first 4 x `n_rows`, so that they are of several documents. Rows of token ids that each are
    one context are taken in their order.

    Args:
        source: the data set.
        tokenizer: the language model's tokenizer.
        context: how documents are packed into rows.
        held_out: the split that the SAE was trained with; None if it was trained on another data set.
        n_rows: how many rows to draw, at most.
        n_more_rows: how many rows to add after those, at most. The first `n_rows` rows do not depend on it.
        seed: seed of the draw.
        flag: the flag that named the data set, for messages.
        required: whether it is an error if there is no complete row.

    Returns:
        [N, context_size] uint32 token ids, marked as by `token_rows`, with N at most n_rows + n_more_rows; and [N] the
        index of the document that each row ends in.

    Raises:
        UserError: there is no complete row, and one is required.
    """
    documents = (d for d in source.documents() if held_out is None or held_out.holds_out(d))
    in_order = source.tokenized and (source.row_length or 0) <= context.context_size
    n_drawn_from = n_rows if in_order else 4 * n_rows
    n_candidates = max(n_drawn_from, n_rows + n_more_rows)
    left_out = LeftOut(context.context_size)
    rows = token_rows(documents, tokenizer, context, tokenized=source.tokenized, left_out=left_out)
    found = list(islice(rows, n_candidates))
    if not found and not required:
        return np.empty((0, context.context_size), np.uint32), np.empty(0, np.int64)
    if not found:
        half = f"the {held_out.part} half of " if held_out and held_out.part else ""
        which = f"{half}its held-out documents hold{'s' * bool(half)}" if held_out else "it holds"
        because = f" ({said})" if (said := left_out.describe()) else ""
        raise UserError(
            f"{flag} {source.name}: {which} no context of {context.context_size} tokens{because}; use more text"
            + (" or a shorter context" if left_out.all_short else "")
        )
    left_out.log()
    document_N, rows_NT = np.array([n for n, _ in found]), np.stack([row for _, row in found]).astype(np.uint32)
    order = np.arange(len(rows_NT))
    if not in_order:
        np.random.default_rng(seed).shuffle(order[:n_drawn_from])
    order = order[: n_rows + n_more_rows]
    return rows_NT[order], document_N[order]
