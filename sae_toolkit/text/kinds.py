"""The kinds of local files that text is read from, by their names."""

from __future__ import annotations

from pathlib import PurePath

HTML = (".html", ".htm")
PLAIN_TEXT = (".txt", ".md", ".rst", *HTML)
# The loader of `datasets` for each kind of table.
TABLES = {".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
# JSON Lines are not read by the JSON loader, which stops at the first line that is not JSON.
JSON_LINES = ".jsonl"
KNOWN_KINDS = (*PLAIN_TEXT, JSON_LINES, *TABLES)


def kind_of(file: PurePath) -> str:
    """Returns the suffix that says how a file is read: `.md` for `a.md` and `a.md.gz`; empty if it is not known."""
    return next((s for suffix in reversed(file.suffixes) if (s := suffix.lower()) in KNOWN_KINDS), "")
