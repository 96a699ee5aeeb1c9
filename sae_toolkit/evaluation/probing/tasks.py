"""The tasks of probing: labelled texts of two classes, from files, the Hub or the embedded text."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sae_toolkit.errors import UserError
from sae_toolkit.text.columns import choose_column
from sae_toolkit.text.records import Bad, Row, text_document, value_at
from sae_toolkit.text.sources import read_rows

log = logging.getLogger(__name__)

LEAST_PER_CLASS = 100
_LABEL_COLUMNS = ("label", "labels", "target", "class")
_ROWS_LOOKED_AT = 20
_CLASSES_SHOWN = 5
_KINDS = {str: "text", int: "integer", bool: "truth value"}


@dataclass(frozen=True)
class Task:
    """Texts of two classes.

    Args:
        name: name of the task.
        source: where the texts come from.
        texts: N texts.
        y_N: class of each text, 0 or 1.
        classes: the labels of class 0 and class 1.
        document_N: number of the document that each text comes from; None if each text stands for itself.
    """

    name: str
    source: str
    texts: tuple[str, ...]
    y_N: np.ndarray
    classes: tuple[str, str]
    document_N: np.ndarray | None = None


def read_task(
    name: str,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    most_examples: int,
    keep_repeated: bool = False,
) -> Task:
    """Reads a task from a file or from the Hub.

    Args:
        name: a local file or directory with a column of texts and one of labels, or a Hugging Face id.
        text_column: the column of texts; None chooses one as `choose_column` does.
        label_column: the column of labels; None takes the one that is called label, labels, target or class.
        most_examples: only the first rows are read, as many as this.
        keep_repeated: whether to keep texts that occur again. If not, each text is in the task once.

    Raises:
        UserError: it cannot be read, a column is missing, texts are empty or have both labels, or there are not two
            classes with at least 100 texts each.
    """
    what = f"--probing {name}"
    rows = list(islice(read_rows(name, flag="--probing"), most_examples + 1))
    if not rows:
        raise UserError(f"{what}: has no rows; use another file")
    all_read = len(rows) <= most_examples
    if not all_read:
        rows.pop()
        log.warning("%s: reading only the first %s rows, as --probing_examples says", what, f"{most_examples:,}")
    label_column = _label_column(name, label_column, rows)
    without_label = [{key: value for key, value in row.items() if key != label_column} for row in rows]
    column = choose_column(name, "--probing", text_column, without_label[:_ROWS_LOOKED_AT], by="--probing_text_column")
    if column.kind != "text":
        raise UserError(f"{what}: its column {column.name} holds {column.kind}; probing needs one text in each row")
    texts = [value_at(row, column.name) for row in rows]
    empty = [place for place, text in enumerate(texts, 1) if not isinstance(text, str) or not text.strip()]
    if empty:
        raise UserError(
            f"{what}: {len(empty):,} of its {len(rows):,} rows have no text in the column {column.name}, the first is"
            f" row {empty[0]:,}; remove them"
        )
    for place, row in enumerate(rows, 1):
        if isinstance(document := text_document(row, column.name), Bad):
            raise UserError(f"{what}: row {place:,}: {document.reason}; remove it")
    labels = [label.strip() if isinstance(label := value_at(row, label_column), str) else label for row in rows]
    _check_labels(what, label_column, labels)
    first: dict[str, int] = {}  # the place where each text occurs first
    again = [place for place, text in enumerate(texts) if first.setdefault(text, place) != place]
    if again:
        doing = "kept" if keep_repeated else "left out"
        log.warning("%s: %s %s texts that occur again", what, doing, f"{len(again):,}")
    for place in again:
        if not keep_repeated and labels[place] != (other := labels[first[texts[place]]]):
            raise UserError(
                f"{what}: row {place + 1:,} has the label {labels[place]}, and row {first[texts[place]] + 1:,} with the"
                f" same text has {other}; remove one of them"
            )
    kept = range(len(texts)) if keep_repeated else list(first.values())
    why = (
        ""
        if all_read
        else f"; only the first {most_examples:,} rows were read: shuffle it, or raise --probing_examples"
    )
    y_N, classes = _classes(what, label_column, [labels[place] for place in kept], why)
    path = Path(name)
    return Task(path.name.split(".")[0] if path.exists() else name, name, tuple(texts[p] for p in kept), y_N, classes)


def _label_column(name: str, column: str | None, rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(column for row in rows for column in row))
    if column is not None:
        if all(value_at(row, column) is None for row in rows):
            raise UserError(f"--probing_label_column {column}: {name} has the columns {', '.join(names)}")
        return column
    found = [column for column in names if column in _LABEL_COLUMNS]
    if len(found) != 1:
        there = f"the columns {' and '.join(found)}" if found else f"no column of labels among {', '.join(names)}"
        raise UserError(f"--probing {name}: has {there}; name one by --probing_label_column")
    return found[0]


def _check_labels(what: str, column: str, labels: Sequence[Any]) -> None:
    for place, label in enumerate(labels, 1):
        if not isinstance(label, str | int | bool) or (isinstance(label, str) and not label.strip()):
            found = "no label" if label is None or isinstance(label, str) else f"{type(label).__name__} {label}"
            raise UserError(
                f"{what}: row {place:,} has {found} in the column {column}; labels are text, integers, true or false"
            )
        if type(label) is not type(labels[0]):  # Python takes True and 1 for equal, and "1" and 1 look alike
            kinds = [f"the {_KINDS[type(each)]} {each}" for each in (label, labels[0])]
            raise UserError(
                f"{what}: row {place:,} has {kinds[0]} in the column {column}, and row 1 has {kinds[1]}; write all"
                " labels in one way"
            )


def _classes(what: str, column: str, labels: Sequence[Any], why: str) -> tuple[np.ndarray, tuple[str, str]]:
    """Returns the class of each label, 0 or 1, and the two labels in their order. `why` ends a message."""
    counts = Counter(labels)
    if len(counts) != 2:
        shown = ", ".join(map(str, islice(counts, _CLASSES_SHOWN))) + (", ..." if len(counts) > _CLASSES_SHOWN else "")
        to_do = "add texts of another" if len(counts) == 1 else "keep two, or label one of them against the rest"
        n_classes = "one class" if len(counts) == 1 else f"{len(counts):,} classes"
        raise UserError(
            f"{what}: its column {column} has {n_classes} ({shown}), and probing tells two apart; {to_do}{why}"
        )
    ordered = sorted(counts)
    rare = min(ordered, key=lambda label: counts[label])
    if counts[rare] < LEAST_PER_CLASS:
        raise UserError(
            f"{what}: {counts[rare]} different texts labelled {rare}; probing needs at least"
            f" {LEAST_PER_CLASS} of each class{why}"
        )
    return np.array([label == ordered[1] for label in labels], dtype=np.int64), (str(ordered[0]), str(ordered[1]))
