"""Reads text from local files and directories."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import fsspec

from sae_toolkit.errors import UserError
from sae_toolkit.text.kinds import JSON_LINES, KNOWN_KINDS, PLAIN_TEXT, TABLES, kind_of
from sae_toolkit.text.records import Records, parse_json_line, parse_text, read_files

log = logging.getLogger(__name__)

_KINDS_OF_DATASETS = (".ndjson", ".arrow", ".xml", ".zip", ".tar", ".gz", ".zst")  # which it reads from directories


def local_splits(path: Path, what: str, streaming: bool) -> dict[str, Callable[[], Records]]:
    """Returns the splits of local data that have no configurations, as functions that load them.

    Such data are a file, a data set that `datasets` saved, or a directory of text files, each of which is a document.
    For anything else the dictionary is empty.

    Args:
        path: the file or directory; it need not exist.
        what: the flag and its value, for messages.
        streaming: read the files as needed.

    Raises:
        UserError: there is no such file, or it, or all files of the directory, are of unknown kinds.
    """
    if path.is_file():
        if not kind_of(path):
            raise UserError(f"{what}: cannot read this kind of file; use {', '.join(KNOWN_KINDS)}")
        return {"train": lambda: _load_file(path, what, streaming)}
    if any((path / file).is_file() for file in ("dataset_info.json", "dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(str(path))
        splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        return {split: partial(Records, data, what) for split, data in splits.items()}
    if files := _text_files(path):
        return {"train": lambda: read_files(files, what, "document", parse_text, streaming=streaming)}
    if path.is_dir():
        _check_kinds(path, what)
        for file in path.rglob("*"):
            if TABLES.get(kind_of(file)) == "csv" and file.is_file() and not _is_hidden(file.relative_to(path)):
                _check_columns(file, f"{what}: {file.relative_to(path)}")
    elif kind_of(path) and (len(path.parts) != 2 or path.parent.is_dir()):  # an OWNER/NAME may be on the Hub
        raise UserError(f"{what}: no such file")
    return {}


def _check_kinds(directory: Path, what: str) -> None:
    """Refuses a directory in which no file is of a known kind, which `datasets` would take for a set of images, say."""
    files = [file for file in directory.rglob("*") if file.is_file()]
    if any(kind_of(file) or file.suffix in _KINDS_OF_DATASETS for file in files):
        return
    found = sorted({file.suffix or file.name for file in files})
    there = f"there are only {', '.join(found[:10])}" if found else "it is empty"
    raise UserError(f"{what}: no file of a kind that can be read; {there}; use {', '.join(KNOWN_KINDS)}")


def _text_files(directory: Path) -> list[str]:
    """Returns the text files of a directory that has no tables; none for another directory.

    Hidden files and the card of a data set are left out.
    """
    found = [
        file
        for file in (sorted(directory.rglob("*")) if directory.is_dir() else [])
        if kind_of(file) and file.is_file() and not _is_hidden(file.relative_to(directory))
        if not _is_card(file, directory)
    ]
    text = [file for file in found if kind_of(file) in PLAIN_TEXT]
    if n_others := len(found) - len(text):
        if len(text) > n_others:
            log.warning(
                "%s: reading its tables alone, and none of its %d files of text: put those into another directory",
                directory,
                len(text),
            )
        return []
    return [str(file) for file in text]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_card(file: Path, directory: Path) -> bool:
    """Returns whether a file is the card of a data set: a README.md that begins with YAML."""
    if file != directory / "README.md":
        return False
    with file.open("rb") as card:
        return card.read(3) == b"---"


def _load_file(path: Path, what: str, streaming: bool) -> Records:
    kind = kind_of(path)
    if kind == JSON_LINES:
        return read_files([str(path)], what, "line", parse_json_line, streaming=streaming)
    if kind in PLAIN_TEXT:
        return read_files([str(path)], what, "paragraph", parse_text, streaming=streaming)
    options: dict[str, Any] = {}
    if TABLES[kind] == "csv":
        # Without this, pandas would read NA and empty fields as missing values instead of text.
        options = {"keep_default_na": False, "sep": _separator(kind)}
        _check_columns(path, what)
    data = datasets.load_dataset(TABLES[kind], data_files=str(path), split="train", streaming=streaming, **options)
    return Records(data, what)


def _separator(kind: str) -> str:
    return "\t" if kind == ".tsv" else ","


def _check_columns(table: Path, what: str) -> None:
    """Refuses a table in which columns have the same name. pandas would rename all but the first, without a word."""
    with fsspec.open(str(table), "rt", compression="infer", encoding="utf-8-sig", errors="replace", newline="") as file:
        lines = csv.reader(file, delimiter=_separator(kind_of(table)))
        try:
            header = next((names for names in lines if names), [])
        except csv.Error:  # a field as long as a book, which is no name
            return
    name, n = next(iter(Counter(filter(None, header)).most_common(1)), ("", 0))
    if n > 1:
        raise UserError(f"{what}: {n} columns are called {name}; rename or remove all but one")
