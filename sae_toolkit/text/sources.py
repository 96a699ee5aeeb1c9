"""Finds text by name and reads it document by document: from the Hub, local files, or the embedded Wikipedia."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.files.connection import retrying
from sae_toolkit.files.embedded import EMBEDDED_TEXT, embedded_wikipedia
from sae_toolkit.files.hub import check_repository
from sae_toolkit.text.records import (
    Bad,
    Document,
    Records,
    Row,
    Skipped,
    parse_json_line,
    parse_text,
    read_files,
    text_document,
    tokens_document,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

_TOKEN_COLUMNS = ("tokens", "input_ids")
# A JSON Lines file is read as text: the JSON loader would end at the first line that is not JSON.
_FILE_LOADERS = {".txt": "text", ".json": "json", ".jsonl": "text", ".csv": "csv", ".parquet": "parquet"}
_ROWS_LOOKED_AT, _RECORDS_LOOKED_AT = 20, 1_000


@dataclass(frozen=True)
class TextSource:
    """A data set that has been opened, with the choices made while opening it."""

    name: str
    config: str | None
    split: str
    column: str
    tokenized: bool
    read: Callable[[], Iterable[Document | Bad | None]]
    fallback_from: str | None = None
    row_length: int | None = None  # tokens in the first row, where the rows are token ids
    unit: str = "record"  # what a record is in a message

    def documents(self) -> Iterator[Document]:
        """The documents in their order, without the empty ones and the bad ones; how many were bad is said.

        Raises:
            UserError: the data set cannot be read to its end, or most of it is bad.
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


def _readable(name: str, records: Iterable[T]) -> Iterator[T]:
    """The same records; whatever the readers of `datasets` raise (pyarrow's, pandas's, fsspec's) is a `UserError`."""
    try:
        yield from records
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: cannot be read: {one_line(error)}") from error


@dataclass(frozen=True)
class HeldOutSplit:
    """Which documents are kept for evaluation.

    A document is held out when a hash of the seed and its content, taken as a number in [0, 1), falls below
    the fraction; so the split survives re-ordering, sharding and streaming.
    """

    fraction: float
    seed: int

    def holds_out(self, document: Document) -> bool:
        content = document.encode() if isinstance(document, str) else np.asarray(document, np.int64).tobytes()
        digest = hashlib.sha256(f"{self.seed}\n".encode() + content).digest()
        return int.from_bytes(digest[:8], "big") < self.fraction * 2**64


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
    """Opens a data set; what is not given is found.

    Args:
        name: `embedded:wikipedia`, a local file (txt, jsonl, json, csv, parquet) or directory (of such files,
            or saved by `datasets`), or a Hugging Face id.
        flag: the flag that named it, for messages.
        config: the data set's configuration; found: the only one, `default`, or the first.
        split: found: the first of `preferred_splits` that exists, or the first there is.
        column: found: `tokens` or `input_ids` (used as they are), `text`, or the column of the longest strings.
        streaming: read as needed rather than download whole.
        fallback: a data set to take instead when this one cannot be opened; its own choices are found.

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
        for given, value in (("--dataset_config", config), ("--dataset_split", split), ("--text_column", column)):
            if value not in (None, "train", "text"):
                raise UserError(f"{given} {value}: {EMBEDDED_TEXT} has nothing to choose; leave it out")
        return TextSource(name, None, "train", "text", tokenized=False, read=embedded_wikipedia)
    if name.startswith("embedded:"):
        raise UserError(f"{flag} {name}: the only embedded text is {EMBEDDED_TEXT}")
    try:
        records, config, split = retrying(
            f"{flag} {name}", lambda: _load(name, flag, config, split, streaming, preferred_splits)
        )
    except UserError:
        raise
    except Exception as error:  # whatever the builders of datasets raise
        raise UserError(f"{flag} {name}: cannot be read: {one_line(error)}") from error
    first_rows = _first_rows(f"{flag} {name}", split, records)
    column = _choose_column(name, flag, column, first_rows)
    values = [row.get(column) for row in first_rows]
    tokenized = not any(isinstance(value, str) for value in values)
    row_length = next((len(value) for value in values if value is not None and _is_tokens(value)), None)
    as_document = tokens_document if tokenized else text_document

    def read() -> Iterator[Document | Bad | None]:
        for row in records:
            yield as_document(row, column) if isinstance(row, dict) else row

    return TextSource(name, config, split, column, tokenized, read, row_length=row_length, unit=records.unit)


def _first_rows(what: str, split: str, records: Records) -> list[Row]:
    """The first rows that are good, for their columns."""
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
        raise UserError(f"{what}: split {split} is empty (0 documents)")
    return rows


def _load(
    name: str, flag: str, config: str | None, split: str | None, streaming: bool, preferred_splits: Sequence[str]
) -> tuple[Records, str | None, str]:
    """Loads one split; returns it with the names of its configuration and split."""
    what = f"{flag} {name}"
    path = Path(name)
    if path.is_file():
        if config is not None:
            raise UserError(f"--dataset_config {config}: {name} is a file, which has no configurations; leave it out")
        loader = next((_FILE_LOADERS[s] for s in reversed(path.suffixes) if s in _FILE_LOADERS), None)
        if loader is None:
            raise UserError(f"{flag} {name}: cannot read this kind of file; use {', '.join(_FILE_LOADERS)}")
        split = _choose_split(name, ["train"], split, preferred_splits)
        if ".jsonl" in path.suffixes:
            return _read_json_lines([str(path)], what, streaming), None, split
        if loader == "text":
            return _read_text([str(path)], what, streaming, "paragraph"), None, split
        # What looks like a missing value to pandas, such as NA and an empty field, is text.
        how = {"keep_default_na": False} if loader == "csv" else {}
        files = {split: str(path)}
        data = datasets.load_dataset(loader, data_files=files, split=split, streaming=streaming, **how)
        return Records(data, what), None, split

    if path.is_dir():
        if any((path / file).is_file() for file in ("dataset_info.json", "dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, datasets.DatasetDict):
                split = _choose_split(name, list(saved), split, preferred_splits)
                return Records(saved[split], what), None, split
            return Records(saved, what), None, _choose_split(name, ["train"], split, preferred_splits)
        found = sorted(file for file in path.rglob("*") if file.suffix in _FILE_LOADERS)
        if found and all(file.suffix == ".txt" for file in found):
            split = _choose_split(name, ["train"], split, preferred_splits)
            return _read_text([str(file) for file in found], what, streaming, "document"), None, split
    else:
        name = check_repository(name, "dataset", flag)

    configs = datasets.get_dataset_config_names(name)
    if config is None:
        config = configs[0] if len(configs) == 1 or "default" not in configs else "default"
        if len(configs) > 1:
            log.info("%s has %d configurations; taking %s (--dataset_config chooses)", name, len(configs), config)
    elif config not in configs:
        raise UserError(f"--dataset_config {config}: {name} has {', '.join(configs)}")
    splits = datasets.get_dataset_split_names(name, config)
    split = _choose_split(name, splits, split, preferred_splits)
    files_of_splits = datasets.load_dataset_builder(name, config).config.data_files or {}
    split_files = [str(file) for file in files_of_splits.get(split, ())]
    if split_files and all(".jsonl" in Path(file).suffixes for file in split_files):
        return _read_json_lines(split_files, what, streaming), config, split
    if split_files and all(".txt" in Path(file).suffixes for file in split_files):
        return _read_text(split_files, what, streaming, "line"), config, split
    return Records(datasets.load_dataset(name, config, split=split, streaming=streaming), what), config, split


def _read_json_lines(files: list[str], what: str, streaming: bool) -> Records:
    return Records(read_files(files, "line", streaming), what, parse_json_line, is_lines=len(files) == 1)


def _read_text(files: list[str], what: str, streaming: bool, by: str) -> Records:
    return Records(read_files(files, by, streaming), what, parse_text, is_lines=by == "line" and len(files) == 1)


def _choose_split(name: str, splits: list[str], split: str | None, preferred: Sequence[str]) -> str:
    if split is None:
        return next((s for s in preferred if s in splits), splits[0])
    if split not in splits:
        raise UserError(f"--dataset_split {split}: {name} has {', '.join(splits)}")
    return split


def _choose_column(name: str, flag: str, column: str | None, rows: list[dict[str, Any]]) -> str:
    columns = list({column: None for row in rows for column in row})  # of JSON Lines, a row may lack some
    first = {c: _first_value([row[c] for row in rows if row.get(c) is not None]) for c in columns}
    if column is not None:
        if column not in columns:
            raise UserError(f"--text_column {column}: {name} has the columns {', '.join(columns)}")
        if not isinstance(first[column], str) and not _is_tokens(first[column]):
            kind = type(first[column]).__name__
            raise UserError(f"--text_column {column}: in {name} it holds {kind}, neither text nor token ids")
        return column
    for candidate in _TOKEN_COLUMNS:
        if candidate in columns and _is_tokens(first[candidate]):
            return candidate
    lengths = {
        c: sum(len(text) for row in rows if isinstance(text := row.get(c), str))
        for c in columns
        if isinstance(first[c], str)
    }
    if not lengths:
        raise UserError(f"{flag} {name}: no column of text or token ids among {', '.join(columns)}")
    if "text" in lengths:
        return "text"
    longest = max(lengths, key=lambda c: lengths[c])
    if len(lengths) > 1:
        log.info("%s has no column 'text'; taking the longest, %r (--text_column chooses)", name, longest)
    return longest


def _first_value(values: list[Any]) -> Any:
    """The first that could be a document, or else the first: a bad record at the beginning hides no column."""
    return next((v for v in values if isinstance(v, str) or _is_tokens(v)), values[0] if values else None)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, (list, tuple, np.ndarray)) and len(value) > 0 and isinstance(value[0], (int, np.integer))
