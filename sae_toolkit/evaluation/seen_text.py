"""Whether an SAE may have been trained on the text that it is measured on, by what its files say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from sae_toolkit.text.sources import HeldOutSplit, TextSource

# What a record says of the documents that an SAE was trained on.
TEXT_OF_TRAINING = (
    *("dataset_path", "dataset_config", "dataset_split", "text_column", "held_out_fraction", "held_out_seed"),
)


class _Record(Protocol):
    """What an SAE's files say of its training, by name: SAELens's metadata, or a mapping in them."""

    def get(self, name: str, /) -> Any: ...


def may_have_trained_on(record: _Record, source: TextSource, held_out: HeldOutSplit | None) -> bool | None:
    """Returns whether documents of a text were among those that an SAE could be trained on, by its record.

    It could if it, or an SAE that its training began with, was trained on that data set and held out none of these
    documents, or if the record does not say which it held out.

    Args:
        record: the metadata of the SAE, or `initialized_from` of it.
        source: the text.
        held_out: the split by which some of its documents are chosen; None if all are.

    Returns:
        None if it is not known: the record does not say what the SAE, or one before it, was trained on, or it was
        another configuration of this data set, or another part of this split.
    """
    found = {_one_training(each, source, held_out) for each in _trainings(record)}
    return True if True in found else None if None in found else False


def _trainings(record: _Record) -> Iterator[_Record]:
    """Yields the record of an SAE, and those of the SAEs that its training began with, one after the other."""
    yield record
    while isinstance(before := record.get("initialized_from"), dict):
        record = before
        yield record


def _one_training(record: _Record, source: TextSource, held_out: HeldOutSplit | None) -> bool | None:
    data, split, fraction = record.get("dataset_path"), record.get("dataset_split"), record.get("held_out_fraction")
    if not isinstance(data, str):
        return None
    if not same_data(source.name, data):
        return _is_within(source.name, data) or _is_within(data, source.name)
    if not isinstance(split, str):
        return True
    if source.config != record.get("dataset_config"):
        return None  # configurations of one data set often share documents
    if source.split != split:
        return None if source.split.partition("[")[0] == split.partition("[")[0] else False
    # Documents are held out by their content, so of another column others are.
    other_column = record.get("text_column") not in (None, source.column)
    if held_out is None or other_column or not isinstance(fraction, int | float):
        return True
    return held_out.seed != record.get("held_out_seed") or held_out.fraction > fraction


def _is_within(name: str, other: str) -> bool:
    """Returns whether a path leads to a part of another."""
    path, whole = Path(name), Path(other)
    return path.exists() and whole.exists() and path.resolve().is_relative_to(whole.resolve())


def same_data(name: str, other: str | None) -> bool:
    """Returns whether two names are of the same data set: the same path, or the same id, with or without its owner."""
    if other is None:
        return False
    if Path(name).exists() or Path(other).exists():
        return Path(name).resolve() == Path(other).resolve()
    (owner, _, ending), (other_owner, _, other_ending) = name.rpartition("/"), other.rpartition("/")
    return ending == other_ending and (owner == other_owner or "" in (owner, other_owner))
