"""Reads the records of a data set. A dropped connection does not lose the place; unusable records are counted."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from pathlib import PurePath
from typing import Any, BinaryIO

import datasets
import fsspec
import numpy as np

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.files.connection import Retries
from sae_toolkit.text.kinds import HTML, kind_of
from sae_toolkit.text.markup import text_of_html

log = logging.getLogger(__name__)

Row = dict[str, Any]

_LARGEST_TOKEN_ID = np.iinfo(np.uint32).max
_RECORDS_BEFORE_JUDGING = 1_000

# `Retries` makes all retries. Those of datasets are switched off. They would send a busy host 20 requests a minute, and
# would not retry after a dropped connection: they catch httpx's errors, and huggingface_hub 2 raises httpx2's.
datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0
datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0
datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0


@dataclass(frozen=True)
class Bad:
    """Stands for a record that cannot be used, and says why."""

    reason: str


@dataclass(frozen=True)
class Conversation:
    """A conversation between a user and a language model.

    Args:
        messages: who says it (`system`, `user` or `assistant`) and the text of each message.
        text: the conversation as a chat template writes it; None before a template was applied.
        assistant_spans: for each part of `text` that the assistant said: its first character, and the one behind it.
    """

    messages: tuple[tuple[str, str], ...]
    text: str | None = None
    assistant_spans: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        """Returns the number of characters of the messages, without the white space around them."""
        return sum(len(text.strip()) for _, text in self.messages)


Document = str | Conversation | Sequence[int] | np.ndarray  # the last two: token ids of one row of a tokenized data set


@dataclass(frozen=True)
class Records:
    """The records of a data set, in order. Each iteration starts again at the first.

    Args:
        dataset: a data set of `datasets`, streaming or not.
        what: the flag and its value, for messages.
        parse: returns the row to use for a row of `dataset`; `Bad` if it cannot be used, and None for a blank line.
        is_lines: whether each record is a line of one file.
    """

    dataset: Any
    what: str
    parse: Callable[[Row], Row | Bad | None] = lambda row: row
    is_lines: bool = False

    def __iter__(self) -> Iterator[Row | Bad | None]:
        if not isinstance(self.dataset, datasets.IterableDataset):
            yield from map(self.parse, self.dataset)
            return
        dataset, n_read = self.dataset, 0
        retries = Retries(self.what)
        while True:
            try:
                for row in dataset:
                    n_read += 1
                    retries.reset()
                    yield self.parse(row)
                return
            except Exception as error:
                retries.what = f"{self.what}, after {n_read:,} records"
                retries.wait_after(error)
                place = dataset.state_dict()
                dataset = copy(self.dataset)  # `self.dataset` keeps its place at the first record
                dataset.load_state_dict(place)

    @property
    def unit(self) -> str:
        """What a record is called in messages."""
        return "line" if self.is_lines else "record"


def read_files(
    files: list[str], what: str, by: str, parse: Callable[[Row], Row | Bad | None], *, streaming: bool
) -> Records:
    """Returns the records of text files or JSON Lines files, local or on the Hub, compressed or not.

    The parts of an HTML page are those of its text, without tags.

    The files are read as bytes and each record is parsed alone. The loaders of `datasets` parse whole blocks, and
    stop at one bad byte or one line that is not JSON.

    Args:
        files: paths or URLs.
        what: the flag and its value, for messages.
        by: what a record is: a `line`, a `paragraph` (ended by an empty line) or a `document` (the whole file).
        parse: `parse_json_line` or `parse_text`.
        streaming: read the files as needed instead of downloading them first.
    """
    is_lines = by == "line" and len(files) == 1
    if not streaming:
        files = datasets.DownloadManager().download(files)
    parts = datasets.IterableDataset.from_generator(_generate, gen_kwargs={"files": files, "by": by})
    return Records(parts, what, parse, is_lines)


def _generate(files: list[str], by: str) -> Iterator[dict[str, bytes]]:
    for name in files:
        with fsspec.open(name, "rb", compression="infer") as file:
            if kind_of(PurePath(name)) in HTML:
                page = file.read()
                try:
                    file = BytesIO(text_of_html(page).encode())
                except UnicodeDecodeError:
                    yield {"bytes": page}  # as one record that cannot be used
                    continue
            for part in _PARTS[by](file):
                yield {"bytes": part}


def _paragraphs(lines: Iterable[bytes]) -> Iterator[bytes]:
    for is_empty, paragraph in groupby(lines, key=lambda line: not line.rstrip(b"\r\n")):
        if not is_empty:
            yield b"".join(paragraph).rstrip(b"\r\n")


_PARTS: dict[str, Callable[[BinaryIO], Iterable[bytes]]] = {
    "line": iter,
    "paragraph": _paragraphs,
    "document": lambda file: [file.read()],
}


def parse_json_line(row: Row) -> Row | Bad | None:
    """Returns a line of a JSON Lines file as a row, or why it cannot be used. Returns None for a blank line."""
    if not row["bytes"].strip():
        return None
    try:
        parsed = json.loads(row["bytes"])
    except UnicodeDecodeError as error:
        return Bad(f"not UTF-8 ({one_line(error)})")
    except (ValueError, RecursionError) as error:
        return Bad(f"not JSON ({one_line(error)})")
    return parsed if isinstance(parsed, dict) else Bad("not a JSON object")


def parse_text(row: Row) -> Row | Bad:
    """Returns a part of a text file as a row with the one column `text`, or why it cannot be used."""
    if b"\0" in row["bytes"]:
        return Bad("not UTF-8 (it holds null bytes, as UTF-16 does)")
    try:
        return {"text": row["bytes"].decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")}
    except UnicodeDecodeError as error:
        return Bad(f"not UTF-8 ({one_line(error)})")


def value_at(row: Row, column: str) -> Any:
    """Returns the value in a column of a row, None if there is none. `a.b` is the field b of the dictionary in a."""
    if column in row or "." not in column:
        return row.get(column)
    outer, _, inner = column.partition(".")
    return value_at(row[outer], inner) if isinstance(row.get(outer), dict) else None


def text_document(row: Row, column: str, joined_by: str | None = None) -> str | Bad:
    """Returns the text in a column of a row, or why it cannot be used.

    Args:
        row: the row.
        column: the column.
        joined_by: what stands between the strings of a list; None if the column holds no lists.
    """
    text = value_at(row, column)
    if joined_by is not None and isinstance(text, list | tuple | np.ndarray):
        if not all(isinstance(part, str) for part in text):
            return Bad(f"its {column!r} is a list that holds other things than text")
        text = joined_by.join(text)
    if not isinstance(text, str):
        return Bad(f"its {column!r} is {'null' if text is None else type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can write half a surrogate pair
        return Bad(f"its {column!r} is not valid Unicode")
    return text


def tokens_document(row: Row, column: str) -> np.ndarray | Bad:
    """Returns the token ids in a column of a row ([T] int64, each from 0 to 2^32 - 1), or why they cannot be used.

    Where the row has an `attention_mask`, ids at which it is 0 are left out: they are padding.
    """
    try:
        tokens = np.asarray(value_at(row, column))
    except (ValueError, OverflowError):
        tokens = np.asarray(None)
    if tokens.ndim == 1 and not len(tokens):
        return tokens.astype(np.int64)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        return Bad(f"its {column!r} is not a list of whole numbers")
    given = value_at(row, ".".join([*column.split(".")[:-1], "attention_mask"]))
    if given is not None:
        mask = _as_mask(given)
        if mask is None or mask.shape != tokens.shape:
            return Bad(f"its attention_mask is not a 0 or 1 for each of its {column!r}")
        tokens = tokens[mask]
    for token in (tokens.min(), tokens.max()) if len(tokens) else ():
        if not 0 <= token <= _LARGEST_TOKEN_ID:
            return Bad(f"its {column!r} holds {token}, which is not a token id")
    return tokens.astype(np.int64)


def _as_mask(given: Any) -> np.ndarray | None:
    """Returns an attention mask as booleans; None if it is not one of zeros and ones."""
    try:
        mask = np.asarray(given)
    except (ValueError, OverflowError):
        return None
    return mask == 1 if mask.dtype.kind in "iub" and np.isin(mask, (0, 1)).all() else None


class Skipped:
    """Counts the records of a data set and how many of them cannot be used.

    Args:
        name: the data set, for messages.
        unit: what a record is called in messages.
    """

    def __init__(self, name: str, unit: str) -> None:
        self.name = name
        self.unit = unit
        self.n_records = 0
        self.n_bad = 0
        self._first = ""

    def count(self, place: int, bad: Bad | None) -> None:
        """Counts one record.

        Args:
            place: the record's number in the data set, from 1.
            bad: why the record cannot be used; None if it can.

        Raises:
            UserError: this is record 1,000, and most so far cannot be used.
        """
        self.n_records += 1
        if bad is not None:
            self.n_bad += 1
            self._first = self._first or f"{self.unit} {place:,}: {bad.reason}"
        if self.n_records == _RECORDS_BEFORE_JUDGING:
            self.judge()

    def judge(self) -> None:
        """Raises a `UserError` if most records so far cannot be used."""
        if self.n_bad > self.n_records / 2:
            raise UserError(
                f"{self.name}: {self.n_bad:,} of its first {self.n_records:,} records cannot be used; the first is"
                f" {self._first}; correct the data, or choose another of its columns"
            )

    def warn(self) -> None:
        """Logs how many records were skipped, unless `judge` raises an error for them."""
        if 0 < self.n_bad <= self.n_records / 2:
            log.warning(
                "%s: skipped %s of %s records that could not be used; the first is %s",
                self.name,
                f"{self.n_bad:,}",
                f"{self.n_records:,}",
                self._first,
            )
