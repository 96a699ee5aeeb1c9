"""Writes docs/models.md from what `all_classes.py` found."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from datetime import date
from importlib.metadata import version
from typing import Any

from models.trial import HOOKS, MODULE

_LETTERS = {"trains": "T", "evaluates": "E", "agrees": "A", "opens": "S"}

_HEAD = """\
# Models: which classes and hooks work

<!-- Written by ./run_tests.sh --models. Do not edit. -->

`./run_tests.sh --models` wrote this page on {date}, with Transformers {transformers}, TransformerLens
{transformer_lens}, SAELens {sae_lens} and torch {torch}, on CPUs. It goes over all {n_classes} configuration classes
for which Transformers has a causal language model (`MODEL_FOR_CAUSAL_LM_MAPPING`) or a model of images and text
(`MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING`). {n_tried} of them could be tried: {n_yes:,} hooks work, and {n_refused:,} are
refused in one line each. {n_not_tried} classes could not be tried, for the reasons below. No hook ends in a traceback,
and none gives other activations than TransformerLens's where TransformerLens computes the same model.

Each model has its class's default configuration at width 64, with a few layers and **random weights**: the page says
what the code does with a class, and nothing about the quality of SAEs on it. Your model is checked in the same way
before a run: `python sae_lens_train.py --model_name MODEL --hook_name HOOK --dry_run`.

A row is a kind of layer. If the layers of a class have different parts, as in hybrids and mixtures of experts, the
class has several rows, and `n` says how many layers of the tried model are of this kind. The columns are the hooks of a
block (`blocks.N.hook_resid_pre`, ...). The last one is the layer's own name in Transformers, such as `model.layers.1`.

| in a cell | meaning |
| --- | --- |
| `T` | `sae_lens_train.py` trains an SAE there |
| `E` | the saved SAE is evaluated, with losses of the model with the SAE in place |
| `A` | the activations agree with TransformerLens's (float32, 1e-5 of the largest); under `layer`, with SAELens's |
| `-` | in place of `A`: not compared, and the column `A` names the reason |
| `S` | SAELens opens the saved SAE (`SAE.load_from_disk`) and runs it |
| a number | refused in one line, with this reason |
"""


def page(results: list[dict[str, Any]]) -> str:
    """Returns the text of docs/models.md."""
    notes = _Notes()
    rows = [line for result in results if not result["not_tried"] for line in _rows(result, notes)]
    cells = [cell for result in results for row in result["rows"] for cell in row["cells"].values()]
    not_tried = [result for result in results if result["not_tried"]]
    head = _HEAD.format(
        date=date.today().isoformat(),
        transformers=version("transformers"),
        transformer_lens=version("transformer-lens"),
        sae_lens=version("sae-lens"),
        torch=version("torch"),
        n_classes=len(results),
        n_tried=len(results) - len(not_tried),
        n_yes=sum(cell["refused"] is None for cell in cells),
        n_refused=sum(cell["refused"] is not None for cell in cells),
        n_not_tried=len(not_tried),
    )
    columns = [hook.replace("hook_", "") for hook in HOOKS]
    table = [
        f"| configuration | class | n | {' | '.join(columns)} | layer | `A` |",
        "| --- " * (len(columns) + 5) + "|",
        *rows,
    ]
    parts = [head, "## The classes", "\n".join(table), "## The reasons", notes.text()]
    if not_tried:
        why = ["| configuration | class | why it was not tried |", "| --- | --- | --- |"]
        why += [f"| {r['config']} | {r['model']} | {_escaped(_shortened(r['not_tried']))} |" for r in not_tried]
        said = (
            "Transformers itself does not build or run most of these from their default configurations at a small"
            " size, on text alone and with the packages that are installed here."
        )
        parts += ["## Not tried", said, "\n".join(why)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def failures(results: list[dict[str, Any]]) -> list[str]:
    """Returns the tracebacks, differences, crashes and classes that took too long among the results."""
    failed = [
        f"{result['config']}, {cell['hook_name']}, {name}: {cell[name]}"
        for result in results
        for row in result["rows"]
        for cell in row["cells"].values()
        for name in _LETTERS
        if cell[name] not in ("yes", None)
    ]
    crashed = [
        f"{r['config']}: {r['not_tried']}"
        for r in results
        if (r["not_tried"] or "").startswith(("crash", "took more than"))
    ]
    return failed + crashed


class _Notes:
    """The reasons of the page, numbered in the order in which they appear."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def number(self, reason: str) -> int:
        self.counts[reason] += 1
        return list(self.counts).index(reason) + 1

    def text(self) -> str:
        lines = [
            f"{i}. {_escaped(reason)} ({n:,} hook{'s' if n > 1 else ''})"
            for i, (reason, n) in enumerate(self.counts.items(), 1)
        ]
        return "\n".join(lines)


def _rows(result: dict[str, Any], notes: _Notes) -> list[str]:
    lines = []
    for row in result["rows"]:
        cells = [_cell(row["cells"][hook], result, row, notes) for hook in (*HOOKS, MODULE)]
        unknown = {
            notes.number(_general(cell["unknown"], result, row))
            for cell in row["cells"].values()
            if cell["unknown"] and cell["refused"] is None
        }
        compared = ", ".join(map(str, sorted(unknown)))
        lines.append(
            f"| {result['config']} | {result['model']} | {row['n_layers']} | {' | '.join(cells)} | {compared} |"
        )
    return lines


def _cell(cell: dict[str, Any], result: dict[str, Any], row: dict[str, Any], notes: _Notes) -> str:
    if cell["refused"] is not None:
        return str(notes.number(_general(cell["refused"], result, row)))
    return "".join(letter if cell[name] == "yes" else "-" for name, letter in _LETTERS.items())


def _general(reason: str, result: dict[str, Any], row: dict[str, Any]) -> str:
    """Returns a reason without the names that it has in one class only."""
    reason = re.sub(r"^--(hook_name|hook_names|layer) \S+: ", "", reason)
    names = {
        row["cells"][MODULE]["hook_name"] + ".": "LAYER.",
        row["cells"][MODULE]["hook_name"]: "LAYER",
        row["layer"].split()[0]: "the layer's class",
        result["model"]: "the model's class",
        result["config"]: "its configuration",
    }
    for name, general in names.items():
        reason = reason.replace(name, general)
    reason = re.sub(re.escape(tempfile.gettempdir()) + r"/\w+", "MODEL", reason)
    return re.sub(r"by \d\S* of the largest", "by more than 1e-4 of the largest", reason)


def _shortened(reason: str) -> str:
    return reason if len(reason) < 200 else reason[:200] + "..."


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
