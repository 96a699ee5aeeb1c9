"""Opens a data set by name (on the Hub, in local files, or the embedded Wikipedia) and reads its documents."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

import datasets
import numpy as np

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.files.connection import retrying
from sae_toolkit.files.embedded import EMBEDDED_TEXT, embedded_wikipedia
from sae_toolkit.files.hub import check_repository
from sae_toolkit.synthetic.directory import is_synthetic, synthetic_directory
from sae_toolkit.synthetic.language_model import ROW_LENGTH
from sae_toolkit.synthetic.text import rows_of_text
from sae_toolkit.text.columns import choose_column
from sae_toolkit.text.local_files import local_splits
from sae_toolkit.text.records import (
    Bad,
    Conversation,
    Document,
    Records,
    Row,
    Skipped,
    parse_json_line,
    parse_text,
    read_files,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

_ROWS_LOOKED_AT, _RECORDS_LOOKED_AT = 20, 1_000


@dataclass(frozen=True)
class TextSource:
    """An open data set, and what was chosen when it was opened.

    Args:
        name: name of the data set.
        config: its configuration; None if it has none.
        split: its split.
        column: the column that holds the documents.
        tokenized: whether the documents are rows of token ids.
        read: returns an iterable over all documents, with `Bad` for an unusable record and None for a blank line.
        fallback_from: the data set that could not be opened, if this one takes its place.
        row_length: length of the longest of the first rows in tokens, if the documents are rows of token ids.
        unit: what a record is called in messages.
        is_chat: whether the documents are conversations.
        joined_by: what stands between the strings of a document, if the column holds lists of strings.
        sample: the first 60 characters of the first document.
    """

    name: str
    config: str | None
    split: str
    column: str
    tokenized: bool
    read: Callable[[], Iterable[Document | Bad | None]]
    fallback_from: str | None = None
    row_length: int | None = None
    unit: str = "record"
    is_chat: bool = False
    joined_by: str | None = None
    sample: str = ""

    def described(self, *, with_sample: bool = False) -> str:
        """Returns a phrase that says which column is read and how, and with the sample, how its documents begin."""
        how = ", by the chat template" if self.is_chat else ", as token ids" if self.tokenized else ""
        if self.joined_by:
            how = f", lists joined by {'line breaks' if self.joined_by == chr(10) else 'spaces'}"
        return f"column {self.column}{how}" + (f", which begins {self.sample!r}" if with_sample and self.sample else "")

    def documents(self) -> Iterator[Document]:
        """Yields the documents in order, without empty ones. Unusable records are skipped, and a warning counts them.

        Raises:
            UserError: the data set cannot be read to its end, or most of its records cannot be used.
        """
        skipped = Skipped(self.name, self.unit)
        try:
            for place, document in enumerate(_readable(self.name, self.read()), 1):
                if document is None:
                    continue
                if isinstance(document, Bad):
                    skipped.count(place, document)
                    continue
                skipped.count(place, None)
                if len(document) and not (isinstance(document, str) and document.isspace()):
                    yield document
            skipped.judge()
        finally:
            skipped.warn()


_WHAT_TO_DO = {
    "codec can't decode": "; save it as UTF-8",
    "No columns to parse": "; the file is empty, use another one",
}


@contextmanager
def _errors_of_readers(name: str) -> Iterator[None]:
    """Context manager that turns errors of `datasets`, pyarrow, pandas and fsspec into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = one_line(error)
        to_do = next((advice for words, advice in _WHAT_TO_DO.items() if words in why), "")
        raise UserError(f"{name}: cannot be read: {why}{to_do}") from error


def _readable(name: str, records: Iterable[T]) -> Iterator[T]:
    """Yields the records. An error in reading them becomes a `UserError`."""
    with _errors_of_readers(name):
        yield from records


@dataclass(frozen=True)
class HeldOutSplit:
    """Chooses the documents that are held out of training, for evaluation.

    A document is held out if a hash of the seed and its content, read as a number in [0, 1), is below the fraction.
    The choice therefore does not depend on order, sharding or streaming. Of a conversation, the content is its
    messages, because what a template makes of them can depend on the day.

    The two halves of the held-out documents are those with a number below half of the fraction (`validation`) and the
    others (`test`). The same document never is in both.

    Args:
        fraction: share of the documents that is held out, from 0 to 1.
        seed: seed of the choice.
        part: one of the two halves; None for all held-out documents.
    """

    fraction: float
    seed: int
    part: Literal["validation", "test"] | None = None

    def holds_out(self, document: Document) -> bool:
        """Returns whether a document is held out of training, and in the `part` if there is one."""
        if isinstance(document, Conversation):
            content = json.dumps(document.messages).encode()
        else:
            content = document.encode() if isinstance(document, str) else np.asarray(document, np.int64).tobytes()
        digest = hashlib.sha256(f"{self.seed}\n".encode() + content).digest()
        number, middle = int.from_bytes(digest[:8], "big"), self.fraction / 2
        lowest = middle if self.part == "test" else 0
        return lowest * 2**64 <= number < (middle if self.part == "validation" else self.fraction) * 2**64


def open_text(
    name: str,
    *,
    flag: str,
    config: str | None = None,
    split: str | None = None,
    column: str | None = None,
    streaming: bool = True,
    preferred_splits: Sequence[str] = ("train",),
    fallback: str | None = None,
) -> TextSource:
    """Opens a data set, and chooses its configuration, split and column where they are not given.

    Args:
        name: `embedded:wikipedia`, `synthetic:` and the name of a synthetic model, a local file (txt, md, rst, html,
            jsonl, json, csv, tsv, parquet), a directory (of such files, or saved by `datasets`), or a Hugging Face id.
        flag: the flag that named it, for messages.
        config: the configuration. None chooses the one called `default`, or the first if there is none.
        split: the split. None chooses the first of `preferred_splits` that exists, or the data set's first.
        column: the column; None chooses one as `choose_column` does.
        streaming: read the data as needed instead of downloading them first.
        preferred_splits: the splits to choose from, best first.
        fallback: a data set to open if this one cannot be opened. Its configuration, split and column are then chosen
            as for None.

    Raises:
        UserError: it cannot be opened, is empty, or has no such configuration, split or column.
    """
    try:
        return _open(name, flag, config, split, column, streaming, preferred_splits)
    except UserError as error:
        if fallback is None:
            raise
        log.warning("%s; falling back to %s, as --fallback_dataset allows", error, fallback)
        source = _open(fallback, "--fallback_dataset", None, None, None, streaming, preferred_splits)
        return replace(source, fallback_from=name)


def _open(
    name: str,
    flag: str,
    config: str | None,
    split: str | None,
    column: str | None,
    streaming: bool,
    preferred_splits: Sequence[str],
) -> TextSource:
    if name == EMBEDDED_TEXT:
        _refuse_choices(name, config, split, column, of_column="text")
        return TextSource(name, None, "train", "text", tokenized=False, read=embedded_wikipedia)
    if is_synthetic(name):
        _refuse_choices(name, config, split, column, of_column="tokens")
        directory = synthetic_directory(name, flag)
        return TextSource(
            name,
            None,
            "train",
            "tokens",
            tokenized=True,
            read=partial(rows_of_text, directory),
            row_length=ROW_LENGTH,
            unit="row",
        )
    if name.startswith("embedded:"):
        raise UserError(f"{flag} {name}: the only embedded text is {EMBEDDED_TEXT}")
    what = f"{flag} {name}"
    with _errors_of_readers(what):
        records, config, split = retrying(what, lambda: _load(name, flag, config, split, streaming, preferred_splits))
    first_rows = _first_rows(what, split, records)
    chosen = choose_column(name, flag, column, first_rows)

    def read() -> Iterator[Document | Bad | None]:
        for row in records:
            yield chosen.document(row) if isinstance(row, dict) else row

    return TextSource(
        name,
        config,
        split,
        chosen.name,
        chosen.kind == "tokens",
        read,
        row_length=chosen.row_length,
        unit=records.unit,
        is_chat=chosen.kind == "conversations",
        joined_by=chosen.joined_by,
        sample=chosen.sample,
    )


def _refuse_choices(name: str, config: str | None, split: str | None, column: str | None, *, of_column: str) -> None:
    """Raises a UserError for a choice that a text which is no data set does not have."""
    for given, value, only in (
        ("--dataset_config", config, None),
        ("--dataset_split", split, "train"),
        ("--text_column", column, of_column),
    ):
        if value not in (None, only):
            raise UserError(f"{given} {value}: {name} has no such choice; leave it out")


def read_rows(name: str, *, flag: str, preferred_splits: Sequence[str] = ("train",)) -> Iterator[Row]:
    """Yields the rows of a data set with all their columns, in order. Unusable records are skipped and counted.

    Args:
        name, flag, preferred_splits: as for `open_text`, without the embedded text.

    Raises:
        UserError: it cannot be opened or read to its end, or most of its records cannot be used.
    """
    what = f"{flag} {name}"
    with _errors_of_readers(what):
        records, _, _ = retrying(what, lambda: _load(name, flag, None, None, True, preferred_splits))
    skipped = Skipped(what, records.unit)
    try:
        for place, row in enumerate(_readable(what, records), 1):
            if row is not None:
                skipped.count(place, row if isinstance(row, Bad) else None)
            if isinstance(row, dict):
                yield row
        skipped.judge()
    finally:
        skipped.warn()


def _first_rows(what: str, split: str, records: Records) -> list[Row]:
    """Returns the first 20 usable rows, to choose the column by."""
    rows: list[Row] = []
    skipped = Skipped(what, records.unit)
    for place, row in enumerate(islice(_readable(what, records), _RECORDS_LOOKED_AT), 1):
        if row is not None:
            skipped.count(place, row if isinstance(row, Bad) else None)
        if isinstance(row, dict):
            rows.append(row)
        if len(rows) == _ROWS_LOOKED_AT:
            break
    if not rows:
        skipped.judge()
        raise UserError(f"{what}: split {split} is empty (0 documents); use another split or data set")
    return rows


def _load(
    name: str, flag: str, config: str | None, split: str | None, streaming: bool, preferred_splits: Sequence[str]
) -> tuple[Records, str | None, str]:
    """Loads one split, and returns it with the names of its configuration and split."""
    what = f"{flag} {name}"
    path = Path(name)
    if splits := local_splits(path, what, streaming):
        if config is not None:
            kind = "file" if path.is_file() else "directory"
            raise UserError(
                f"--dataset_config {config}: {name} is a {kind} without configurations; leave --dataset_config out"
            )
        split = _choose_split(name, list(splits), split, preferred_splits)
        return splits[split](), None, split
    if not path.is_dir():
        name = check_repository(name, "dataset", flag)
    return _load_by_datasets(name, what, config, split, streaming, preferred_splits)


def _load_by_datasets(
    name: str, what: str, config: str | None, split: str | None, streaming: bool, preferred_splits: Sequence[str]
) -> tuple[Records, str | None, str]:
    """Loads one split of a data set on the Hub or in a directory, as `_load` does."""
    configs = datasets.get_dataset_config_names(name)
    if config is None:
        config = configs[0] if len(configs) == 1 or "default" not in configs else "default"
        if len(configs) > 1:
            log.info("%s has %d configurations; using %s (choose with --dataset_config)", name, len(configs), config)
    elif config not in configs:
        raise UserError(f"--dataset_config {config}: {name} has {', '.join(configs)}")
    splits = datasets.get_dataset_split_names(name, config)
    split = _choose_split(name, splits, split, preferred_splits)
    files_of_splits = datasets.load_dataset_builder(name, config).config.data_files or {}
    split_files = [str(file) for file in files_of_splits.get(split, ())]
    if split_files and all(".jsonl" in Path(file).suffixes for file in split_files):
        return read_files(split_files, what, "line", parse_json_line, streaming=streaming), config, split
    if split_files and all(".txt" in Path(file).suffixes for file in split_files):
        return read_files(split_files, what, "line", parse_text, streaming=streaming), config, split
    return Records(datasets.load_dataset(name, config, split=split, streaming=streaming), what), config, split


def _choose_split(name: str, splits: list[str], split: str | None, preferred: Sequence[str]) -> str:
    if split is None:
        return next((s for s in preferred if s in splits), splits[0])
    if split not in splits:
        raise UserError(f"--dataset_split {split}: {name} has {', '.join(splits)}")
    return split
