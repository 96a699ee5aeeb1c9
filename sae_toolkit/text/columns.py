"""Chooses the column of a data set that holds conversations, token ids or text, by its name and its values."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from sae_toolkit.errors import UserError
from sae_toolkit.text.conversations import conversation_document, is_conversation
from sae_toolkit.text.records import Bad, Conversation, Document, Row, text_document, tokens_document, value_at

log = logging.getLogger(__name__)

_CONVERSATION_COLUMNS = ("messages", "conversation", "conversations", "dialogue", "dialog", "chat")
_TOKEN_COLUMNS = ("tokens", "input_ids")
_TEXT_COLUMNS = ("text", "content", "raw_content", "document", "article", "body", "story", "passage")

_LEAST_WORDS, _LEAST_LETTERS = 3, 6  # of a text: words, or letters of a script without spaces
_LEAST_TO_COMPARE = 4  # fewer values than this say nothing about their variety
_SHOWN = 60  # characters of the first document
# Chinese and Japanese, Thai and Lao, Tibetan, Burmese, Khmer
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]"
)
# What a value is that is no text. The first that matches the whole value says it.
_NO_TEXT = {
    "JSON": r"(\{\s*\"|\[\s*[{\"]).*",
    "URLs": r"(\w+://|www\.)\S+",
    "dates": r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}([ T].*)?|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}( .*)?",
    "numbers": r"[-+]?[\d.,]+(e[-+]?\d+)?\s?%?",
    "file names": r"\S*[/\\]\S+|([A-Za-z]:)?[/\\.~][^\n]*[/\\][^\n]*\.\w{1,5}|[^\n.!?]*\.(txt|md|pdf|docx?|html?"
    r"|jpe?g|png|gif|jsonl?|csv|py|xml|zip|gz|mp[34]|wav|parquet)",
    "ids or hashes": r"[0-9a-fA-F]{8,}|\S*\d\S*|[A-Za-z0-9+/_=-]{20,}",
    "single words": r"\S+",
}

Kind = Literal["conversations", "tokens", "text", "texts"]


@dataclass(frozen=True)
class Column:
    """The column that documents are read from.

    Args:
        name: its name; `a.b` is the field b of the dictionaries in the column a.
        kind: what it holds: `conversations`, `tokens` (token ids), `text` or `texts` (lists of strings).
        joined_by: what stands between the strings of a list, if it holds lists.
        sample: the first 60 characters of its first document.
        row_length: the most token ids in one of its first rows, if it holds token ids.
    """

    name: str
    kind: Kind
    joined_by: str | None = None
    sample: str = ""
    row_length: int | None = None

    @property
    def document(self) -> Callable[[Row], Document | Bad]:
        """The function that returns the document of a row, or why it cannot be used."""
        if self.kind == "conversations":
            return partial(conversation_document, column=self.name)
        if self.kind == "tokens":
            return partial(tokens_document, column=self.name)
        return partial(text_document, column=self.name, joined_by=self.joined_by)


def choose_column(
    name: str, flag: str, column: str | None, rows: Sequence[Row], *, by: str = "--text_column"
) -> Column:
    """Chooses the column of a data set that its documents are read from.

    Without a name it is, in this order: a column of conversations; `tokens` or `input_ids` with token ids; a column
    with a name that data sets give to their text, such as `text` or `content`; the column that alone reads as text.

    Args:
        name: name of the data set, for messages.
        flag: the flag that named it, for messages.
        column: the name of the column; None chooses one.
        rows: the first rows.
        by: the flag that names the column, for messages.

    Raises:
        UserError: there is no such column, it holds nothing that can be read, or several columns come into question.
    """
    names = list(dict.fromkeys(column for row in rows for column in row))  # rows of JSON Lines may lack columns
    if column is not None:
        return _named_column(name, column, rows, names, by)
    kinds = {c: kind for c in names if (kind := _kind(c, rows)) is not None}
    conversations = [c for c in names if kinds.get(c) == "conversations"]
    if conversations:
        chosen = next((c for c in _CONVERSATION_COLUMNS if c in conversations), conversations[0])
        # Of preference data, the answer that people preferred. With a column of prompts it is half a conversation.
        if len(conversations) > 1 and chosen not in _CONVERSATION_COLUMNS:
            if set(conversations) != {"chosen", "rejected"}:
                raise _in_doubt(name, flag, conversations, "hold conversations", by)
            chosen = "chosen"
        return _described(chosen, "conversations", rows)
    for chosen in _TOKEN_COLUMNS:
        if kinds.get(chosen) == "tokens":
            return _described(chosen, "tokens", rows)
    readable = [c for c in names if kinds.get(c) in ("text", "texts") and _reads_as_text(_strings(c, rows))]
    if kinds.get("text") == "text" and not (readable and _no_text(_strings("text", rows))):
        _warn_of_no_text(f"{flag} {name}", "text", rows)
        return _described("text", "text", rows)
    known = [c for c in _TEXT_COLUMNS if c in readable]
    if not readable:
        raise UserError(f"{flag} {name}: no column of text or token ids among {_listed(names, rows)}; name one by {by}")
    if not known and len(readable) > 1:
        raise _in_doubt(name, flag, readable, "read as text", by)
    chosen = (known or readable)[0]
    return _described(chosen, kinds[chosen], rows)


def _named_column(name: str, column: str, rows: Sequence[Row], names: list[str], by: str) -> Column:
    values = [value for row in rows if (value := value_at(row, column)) is not None]
    if column not in names and not values:
        raise UserError(f"{by} {column}: {name} has the columns {', '.join(names)}")
    kind = _kind(column, rows)
    if kind is None:
        found = type(values[0]).__name__ if values else "null"
        inner = values[0].items() if values and isinstance(values[0], dict) else ()
        fields = [f"{column}.{field}" for field, value in inner if isinstance(value, str)]
        instead = f"name a field of it, such as {fields[0]}" if fields else "use another"
        raise UserError(
            f"{by} {column}: in {name} it holds {found}, neither text, conversations nor token ids; {instead}"
        )
    if kind == "text":
        _warn_of_no_text(f"{by} {column}, {name}", column, rows)
    return _described(column, kind, rows)


def _described(column: str, kind: Kind, rows: Sequence[Row]) -> Column:
    """Returns a column with what its first rows say about it."""
    values = [value for row in rows if _kind_of(value := value_at(row, column)) == kind]
    joined_by = row_length = None
    if kind == "texts":
        parts = [part for value in values for part in value if isinstance(part, str)]
        joined_by = "\n" if sum(_is_text(part) for part in parts) > len(parts) / 2 else " "
    if kind == "tokens":
        row_length = max(map(len, values))
    found = Column(column, kind, joined_by, row_length=row_length)
    samples = (_sample(found.document(row)) for row in rows if _kind_of(value_at(row, column)) == kind)
    return replace(found, sample=next(filter(None, samples), ""))


def _warn_of_no_text(where: str, column: str, rows: Sequence[Row]) -> None:
    if what := _no_text(_strings(column, rows)):
        log.warning("%s: its column %s seems to hold %s, which is hardly text", where, column, what)


def _sample(document: Document | Bad) -> str:
    if isinstance(document, Bad):
        return ""
    if isinstance(document, str):
        text = document
    elif isinstance(document, Conversation):
        text = " ".join(f"{role}: {content[: 10 * _SHOWN]}" for role, content in document.messages[:_SHOWN])
    else:
        text = " ".join(map(str, document[:_SHOWN]))
    return " ".join(text[: 100 * _SHOWN].split())[:_SHOWN]


def _in_doubt(name: str, flag: str, columns: list[str], what: str, by: str) -> UserError:
    listed = f"{', '.join(columns[:-1])} and {columns[-1]}"
    return UserError(f"{flag} {name}: its columns {listed} {what}; choose one by {by}")


def _listed(names: list[str], rows: Sequence[Row]) -> str:
    """Returns the columns, each with what it holds instead of text, if that is known."""
    what = {c: _no_text(_strings(c, rows)) for c in names}
    return ", ".join(f"{c} ({what[c]})" if what[c] else c for c in names)


def _kind(column: str, rows: Sequence[Row]) -> Kind | None:
    """Returns the kind of the first value that can be a document, so that bad records at the start hide no column.

    Lists of strings count only if there is no value of another kind: beside texts they are bad records.
    """
    kinds = [kind for row in rows if (kind := _kind_of(value_at(row, column))) is not None]
    return next((kind for kind in kinds if kind != "texts"), kinds[0] if kinds else None)


def _kind_of(value: Any) -> Kind | None:
    if isinstance(value, str):
        return "text"
    if is_conversation(value):
        return "conversations"
    if not isinstance(value, list | tuple | np.ndarray) or not len(value):
        return None
    if isinstance(value[0], int | np.integer):
        return "tokens"
    return "texts" if isinstance(value[0], str) else None


def _strings(column: str, rows: Sequence[Row]) -> list[str]:
    """Returns the texts in a column. Of a list of strings, it is one of them."""
    values = [value_at(row, column) for row in rows]
    values = [value[0] if isinstance(value, list | tuple | np.ndarray) and len(value) else value for value in values]
    return [value for value in values if isinstance(value, str)]


def _reads_as_text(values: list[str]) -> bool:
    """Returns whether most values are texts, and they are not the labels of a few classes."""
    if len(values) >= _LEAST_TO_COMPARE and len(set(values)) <= len(values) / 2:
        return False
    return sum(map(_is_text, values)) > len(values) / 2


def _is_text(value: str) -> bool:
    """Returns whether a value has words of letters, with spaces between them if its script has those."""
    value = value[:1000].strip()
    n_letters, n_all = sum(map(str.isalpha, value)), len("".join(value.split()))
    if 2 * n_letters < n_all or _what(value) is not None:
        return False
    if len(_WITHOUT_SPACES.findall(value)) >= _LEAST_LETTERS:
        return True
    return sum(2 * sum(map(str.isalpha, word)) > len(word) for word in value.split()) >= _LEAST_WORDS


def _no_text(values: list[str]) -> str | None:
    """Returns what most values are, in words, if that is no text."""
    if not values:
        return None
    what, n = Counter(_what(value[:1000].strip()) for value in values).most_common(1)[0]
    return what if what and n > len(values) / 2 else None


def _what(value: str) -> str | None:
    """Returns what a value is, in words, if it is no text."""
    if len(_WITHOUT_SPACES.findall(value)) >= _LEAST_LETTERS:  # a sentence of such a script looks like a single word
        return None
    return next((what for what, pattern in _NO_TEXT.items() if re.fullmatch(pattern, value, re.DOTALL)), None)
