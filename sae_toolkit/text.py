"""Finds text by name and reads it document by document: from the Hub, local files, or the embedded Wikipedia."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from sae_toolkit.embedded import EMBEDDED_TEXT, embedded_wikipedia
from sae_toolkit.errors import UserError, one_line
from sae_toolkit.hub import check_repository

log = logging.getLogger(__name__)

Document = str | Sequence[int]  # text, or a row of a data set that is tokenized already

_TOKEN_COLUMNS = ("tokens", "input_ids")
_FILE_LOADERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class TextSource:
    """A data set that has been opened, with the choices made while opening it."""

    name: str
    config: str | None
    split: str
    column: str
    tokenized: bool
    read: Callable[[], Iterable[Document]]
    fallback_from: str | None = None
    row_length: int | None = None  # tokens in the first row, where the rows are token ids

    def documents(self) -> Iterator[Document]:
        """The documents in their order, without the empty ones.

        Raises:
            UserError: the data set cannot be read to its end.
        """
        documents = iter(self.read())
        while True:
            try:
                document = next(documents)
            except StopIteration:
                return
            except UserError:
                raise
            except Exception as error:  # whatever the readers of datasets raise: pyarrow's, pandas's, fsspec's
                raise UserError(f"{self.name}: cannot be read: {one_line(error)}") from error
            if isinstance(document, str):
                if document and not document.isspace():
                    yield document
            elif document is not None and len(document):
                yield document


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
        dataset, config, split = _load(name, flag, config, split, streaming, preferred_splits)
        first_rows = list(dataset.take(20))
    except UserError:
        raise
    except Exception as error:  # datasets raises whatever its readers raise: pyarrow's, pandas's, fsspec's, OSError
        raise UserError(f"{flag} {name}: cannot be read: {one_line(error)}") from error
    if not first_rows:
        raise UserError(f"{flag} {name}: split {split} is empty (0 documents)")
    column = _choose_column(name, flag, column, first_rows)
    tokenized = not any(isinstance(row[column], str) for row in first_rows)
    row_length = next((len(row[column]) for row in first_rows if row[column]), None) if tokenized else None
    return TextSource(
        name, config, split, column, tokenized, lambda: (row[column] for row in dataset), row_length=row_length
    )


def _load(
    name: str, flag: str, config: str | None, split: str | None, streaming: bool, preferred_splits: Sequence[str]
) -> tuple[Any, str | None, str]:
    """Loads one split; returns it with the names of its configuration and split."""
    path = Path(name)
    if path.is_file():
        if config is not None:
            raise UserError(f"--dataset_config {config}: {name} is a file, which has no configurations; leave it out")
        loader = next((_FILE_LOADERS[s] for s in reversed(path.suffixes) if s in _FILE_LOADERS), None)
        if loader is None:
            raise UserError(f"{flag} {name}: cannot read this kind of file; use {', '.join(_FILE_LOADERS)}")
        split = _choose_split(name, ["train"], split, preferred_splits)
        how = {"sample_by": "paragraph"} if loader == "text" else {}
        return _load_files(loader, [path], split, streaming, **how), None, split

    if path.is_dir():
        if any((path / file).is_file() for file in ("dataset_info.json", "dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(str(path))
            if isinstance(saved, datasets.DatasetDict):
                split = _choose_split(name, list(saved), split, preferred_splits)
                return saved[split], None, split
            return saved, None, _choose_split(name, ["train"], split, preferred_splits)
        files = sorted(file for file in path.rglob("*") if file.suffix in _FILE_LOADERS)
        if files and all(file.suffix == ".txt" for file in files):
            split = _choose_split(name, ["train"], split, preferred_splits)
            return _load_files("text", files, split, streaming, sample_by="document"), None, split
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
    return datasets.load_dataset(name, config, split=split, streaming=streaming), config, split


def _load_files(loader: str, files: list[Path], split: str, streaming: bool, **how: str) -> Any:
    return datasets.load_dataset(
        loader, data_files=[str(file) for file in files], split=split, streaming=streaming, **how
    )


def _choose_split(name: str, splits: list[str], split: str | None, preferred: Sequence[str]) -> str:
    if split is None:
        return next((s for s in preferred if s in splits), splits[0])
    if split not in splits:
        raise UserError(f"--dataset_split {split}: {name} has {', '.join(splits)}")
    return split


def _choose_column(name: str, flag: str, column: str | None, rows: list[dict[str, Any]]) -> str:
    columns = list(rows[0])
    first = {c: next((row[c] for row in rows if row[c] is not None), None) for c in columns}
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
    lengths = {c: sum(len(row[c] or "") for row in rows) for c in columns if isinstance(first[c], str)}
    if not lengths:
        raise UserError(f"{flag} {name}: no column of text or token ids among {', '.join(columns)}")
    if "text" in lengths:
        return "text"
    longest = max(lengths, key=lambda c: lengths[c])
    if len(lengths) > 1:
        log.info("%s has no column 'text'; taking the longest, %r (--text_column chooses)", name, longest)
    return longest


def _is_tokens(value: Any) -> bool:
    return isinstance(value, (list, tuple, np.ndarray)) and len(value) > 0 and isinstance(value[0], (int, np.integer))
