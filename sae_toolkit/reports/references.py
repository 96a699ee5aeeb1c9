"""Published SAEs and runs of this project, to place an evaluated SAE among them."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

from sae_toolkit import ROOT
from sae_toolkit.evaluation.shown import Shown
from sae_toolkit.reports.tables import format_value
from sae_toolkit.synthetic.directory import PREFIX

REFERENCES = ROOT / "presets" / "reference_saes.json"

# Upper ends of the classes of model sizes, in parameters, with what the page calls them.
SIZES = {"under 1 B": 1e9, "1 to 3 B": 3e9, "over 3 B": math.inf}

_HOW_TO_READ = (
    "A place, not a ranking: each source measured on its own text, at its own positions, and partly by other"
    " definitions, which its note says."
)


@dataclass(frozen=True)
class ReferenceSAE:
    """An SAE and the numbers that a source gives of it. A number that the source lacks is None.

    Args:
        name: the SAE's name, as its source has it.
        model: id of its language model on the Hugging Face Hub.
        parameters: the model's number of parameters.
        hook: TransformerLens's name of the hook, or the source's words for it.
        d_sae: number of features.
        training_tokens: tokens that it was trained on.
        l0: mean number of active features at a token.
        loss_recovered: at most 1.
        explained_variance: at most 1.
        dead_features: share of the features, 0 to 1.
        own: whether this project trained it.
        source: URL, or file of this repository, where the numbers were read.
        read: day on which they were read.
        note: where the source's definitions differ from this project's, or are not said.
    """

    name: str
    model: str
    parameters: int
    hook: str
    d_sae: int | None
    training_tokens: int | None
    l0: float
    loss_recovered: float | None
    explained_variance: float | None
    dead_features: float | None
    own: bool
    source: str
    read: date
    note: str


@functools.cache
def load_references(path: Path = REFERENCES) -> tuple[ReferenceSAE, ...]:
    """Returns the SAEs of a reference file, in its order.

    Raises:
        ValueError: a row has a wrong key, a value of a wrong kind or out of its range, no source, or no model.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    return tuple(_checked(row, content["models"]) for row in content["saes"])


def _checked(row: Mapping[str, Any], models: Mapping[str, Any]) -> ReferenceSAE:
    """Returns a row of the file as a `ReferenceSAE`."""
    expected = {field.name for field in fields(ReferenceSAE)} - {"parameters"}
    if set(row) != expected:
        raise ValueError(f"{row.get('name')}: keys {sorted(set(row) ^ expected)} are missing or unknown")
    name = row["name"]
    if not all(isinstance(row[key], str) and row[key] for key in ("name", "model", "hook", "source", "note")):
        raise ValueError(f"{name}: name, model, hook, source and note must be words")
    if not row["source"].startswith("https://") and not (ROOT / row["source"]).is_file():
        raise ValueError(f"{name}: source {row['source']} is neither a URL nor a file of this repository")
    model = models.get(row["model"])
    if model is None or not _is_count(model["parameters"]) or not model["source"]:
        raise ValueError(f"{name}: {row['model']} has no number of parameters with a source in models")
    if not all(row[key] is None or _is_count(row[key]) for key in ("d_sae", "training_tokens")):
        raise ValueError(f"{name}: d_sae and training_tokens must be whole numbers above 0, or null")
    if not isinstance(row["l0"], int | float) or not row["l0"] > 0 or not isinstance(row["own"], bool):
        raise ValueError(f"{name}: l0 must be a number above 0, and own true or false")
    for key, low in (("loss_recovered", -math.inf), ("explained_variance", -math.inf), ("dead_features", 0)):
        if row[key] is not None and not (isinstance(row[key], int | float) and low <= row[key] <= 1):
            raise ValueError(f"{name}: {key} {row[key]} must be a share of at most 1, or null")
    return ReferenceSAE(**dict(row) | {"parameters": model["parameters"], "read": date.fromisoformat(row["read"])})


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def size_of(parameters: int) -> str:
    """Returns the class of a model's size: a key of `SIZES`."""
    return next(size for size, end in SIZES.items() if parameters < end)


def is_placed(summary: Mapping[str, Any]) -> bool:
    """Returns whether an evaluation has what a place among the references needs.

    Under SAEBench's protocol it has not: there the SAE stands in at every position. Nor has an SAE of a synthetic
    model, which is no language model.
    """
    if summary["model"].startswith(PREFIX):
        return False
    l0, loss_recovered = summary["metrics"]["l0"], summary["metrics"]["loss_recovered"]
    return summary["protocol"] == "health" and bool(l0) and loss_recovered is not None


def nearest(references: Sequence[ReferenceSAE], l0: float, parameters: int, n: int) -> list[ReferenceSAE]:
    """Returns the references on models of the same class of size whose L0 is nearest in ratio, at most n.

    Args:
        references: SAEs to choose from.
        l0: L0 of the evaluated SAE, above 0.
        parameters: number of parameters of its model.
        n: number of references to return.
    """
    alike = [reference for reference in references if size_of(reference.parameters) == size_of(parameters)]
    return sorted(alike, key=lambda reference: abs(math.log(reference.l0 / l0)))[:n]


def references_table(summary: Mapping[str, Any], n: int = 6) -> Shown | None:
    """Returns the evaluated SAE, and the references nearest to it, as a table; None if it has no place among them.

    Args:
        summary: content of evaluation.json.
        n: number of references.
    """
    if not is_placed(summary):
        return None
    metrics, parameters = summary["metrics"], summary["model_parameters"]
    this = ("this SAE", summary["model"], f"{summary['sae']['d_sae']:,}", "")
    rows = [
        (*this, *(format_value(metric, metrics[metric]) for metric in ("l0", "loss_recovered", "explained_variance")))
    ]
    rows += [
        (
            f"{reference.name} ({_short(reference.source)})",
            reference.model,
            _counted(reference.d_sae),
            _counted(reference.training_tokens),
            *(
                "" if value is None else format_value(metric, value)
                for metric, value in (
                    ("l0", reference.l0),
                    ("loss_recovered", reference.loss_recovered),
                    ("explained_variance", reference.explained_variance),
                )
            ),
        )
        for reference in nearest(load_references(), metrics["l0"], parameters, n)
    ]
    columns = ("SAE", "Model", "Features", "Tokens", "L0", "Loss recovered", "Explained variance")
    how_to_read = (
        f"The references with the nearest L0, on models of {size_of(parameters)} parameters. An empty cell: its source"
        f" does not say. All rows, with the pages that they are from: {REFERENCES.relative_to(ROOT)}. {_HOW_TO_READ}"
    )
    return Shown("Among other SAEs", columns, tuple(rows), how_to_read)


def _short(source: str) -> str:
    """Returns a URL's host and first two names, which say whose page it is; other sources as they are."""
    return "/".join(source.removeprefix("https://").split("/")[:3]) if source.startswith("https://") else source


def _counted(count: int | None) -> str:
    return "" if count is None else f"{count:,}"
