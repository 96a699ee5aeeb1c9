"""A data set's records: read on where a connection dropped, and those that are no document skipped and counted."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import groupby
from typing import Any, BinaryIO

import datasets
import fsspec
import numpy as np

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.files.connection import Retries

log = logging.getLogger(__name__)

Document = str | Sequence[int] | np.ndarray  # text, or a row of a data set that is tokenized already
Row = dict[str, Any]

_LARGEST_TOKEN_ID = np.iinfo(np.uint32).max
_RECORDS_BEFORE_JUDGING = 1_000

# The connection has one policy (`Retries`): datasets' own would wait for a busy host 20 times a minute, and for a
# dropped connection not at all (it looks for the exceptions of httpx, and huggingface_hub 2 raises those of httpx2).
datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0
datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0
datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0


@dataclass(frozen=True)
class Bad:
    """Why a record cannot be used."""

    reason: str


@dataclass(frozen=True)
class Records:
    """The records of a data set in their order, from the first each time.

    Args:
        dataset: from `datasets`, streaming or not.
        what: the flag and name that it came by, for messages.
        parse: makes a row of what the loader of `datasets` gives; None for a blank line.
        is_lines: whether a record is a line of one file.
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
                dataset = copy(self.dataset)  # the next reading of `self` begins at the first record again
                dataset.load_state_dict(place)

    @property
    def unit(self) -> str:
        return "line" if self.is_lines else "record"


def read_files(files: list[str], by: str, streaming: bool) -> datasets.IterableDataset:
    """The bytes of files, here or on the Hub, packed or not; what they hold is for `Records.parse` to judge.

    The loaders of `datasets` decode whole blocks: one bad byte, or one line that is not JSON, is their end.

    Args:
        by: `line`, `paragraph` (ended by an empty line) or `document` (the whole file).
        streaming: read as needed rather than download whole.
    """
    if not streaming:
        files = datasets.DownloadManager().download(files)
    return datasets.IterableDataset.from_generator(_generate, gen_kwargs={"files": files, "by": by})


def _generate(files: list[str], by: str) -> Iterator[dict[str, bytes]]:
    for name in files:
        with fsspec.open(name, "rb", compression="infer") as file:
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
    """A line of a JSON Lines file as a row."""
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
    """A part of a text file as a row with the column `text`."""
    try:
        return {"text": row["bytes"].decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")}
    except UnicodeDecodeError as error:
        return Bad(f"not UTF-8 ({one_line(error)})")


def text_document(row: Row, column: str) -> str | Bad:
    text = row.get(column)
    if not isinstance(text, str):
        return Bad(f"its {column!r} is {'null' if text is None else type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can write half a surrogate pair
        return Bad(f"its {column!r} is not valid Unicode")
    return text


def tokens_document(row: Row, column: str) -> np.ndarray | Bad:
    """Token ids, [T] int64, each of 0 to 2^32 - 1."""
    try:
        tokens = np.asarray(row.get(column))
    except (ValueError, OverflowError):
        tokens = np.asarray(None)
    if tokens.ndim == 1 and not len(tokens):
        return tokens.astype(np.int64)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        return Bad(f"its {column!r} is no list of whole numbers")
    for token in (tokens.min(), tokens.max()):
        if not 0 <= token <= _LARGEST_TOKEN_ID:
            return Bad(f"its {column!r} holds {token}, which is no token id")
    return tokens.astype(np.int64)


class Skipped:
    """Counts the records of a data set, and those of them that cannot be used."""

    def __init__(self, name: str, unit: str) -> None:
        self.name = name
        self.unit = unit
        self.n_records = 0
        self.n_bad = 0
        self._first = ""

    def count(self, place: int, bad: Bad | None) -> None:
        """Counts one.

        Args:
            place: its number in the data set, from 1.
            bad: what is wrong with it.

        Raises:
            UserError: most of the first 1,000 are bad.
        """
        self.n_records += 1
        if bad is not None:
            self.n_bad += 1
            self._first = self._first or f"{self.unit} {place:,}: {bad.reason}"
        if self.n_records == _RECORDS_BEFORE_JUDGING:
            self.judge()

    def judge(self) -> None:
        """Raises a UserError where most of the records so far are bad."""
        if self.n_bad > self.n_records / 2:
            raise UserError(
                f"{self.name}: {self.n_bad:,} of its first {self.n_records:,} records cannot be used; the first is"
                f" {self._first}; look at how it was made, or choose another column (--text_column)"
            )

    def warn(self) -> None:
        if 0 < self.n_bad <= self.n_records / 2:  # of more, `judge` has said it
            log.warning(
                "%s: skipped %s of %s records that could not be used; the first is %s",
                self.name,
                f"{self.n_bad:,}",
                f"{self.n_records:,}",
                self._first,
            )
