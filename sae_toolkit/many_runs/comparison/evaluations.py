"""The evaluation of each SAE of a comparison, kept in the SAE's directory with what it was measured on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sae_toolkit.evaluation.text import LOSS_TOKENS, rows_of_evaluation
from sae_toolkit.many_runs.comparison.contenders import Entry

_MEASURED_ON = "measured_on"  # beside the results in the file that is kept; older ones lack it


@dataclass(frozen=True)
class MeasuredOn:
    """What SAEs are measured on.

    Args:
        part: the half of the held-out documents, as in `HeldOutSplit`.
        num_samples: the number of sequences; None for that of the evaluation.
        like: the metadata of the SAE that names the text and the positions.
    """

    part: str | None
    num_samples: int | None
    like: Mapping[str, Any]

    @classmethod
    def by(cls, reference: Path, part: str | None, num_samples: int | None) -> MeasuredOn:
        """Returns what SAEs are measured on that are evaluated like the SAE in the directory `reference`.

        All of a choice's losses are measured on the same rows: on validation text, `num_samples` is never None.
        """
        like = json.loads((reference / "cfg.json").read_text())["metadata"]
        if part == "validation" and num_samples is None:
            num_samples = math.ceil(LOSS_TOKENS / _usable(like))
        return cls(part, num_samples, like)

    @property
    def flags(self) -> list[str]:
        """The flags of evaluate_sae_real_activations.py, besides --like."""
        flags = [] if self.part is None else ["--held_out_part", self.part]
        return flags if self.num_samples is None else [*flags, "--num_samples", str(self.num_samples)]

    def certainly_gave(self, results: Mapping[str, Any]) -> bool:
        """Whether an evaluation.json that does not say what it was measured on was certainly measured on this."""
        like, usable = self.like, _usable(self.like)
        wanted = {
            "protocol": "health",
            "model": like["model_name"],
            "hook_name": like["hook_name"],
            "dataset": like["dataset_path"],
            "dataset_config": like.get("dataset_config"),
            "dataset_split": like.get("dataset_split"),
            "held_out": {"fraction": like["held_out_fraction"], "seed": like["held_out_seed"], "part": self.part},
            "context_length": like["context_size"],
            "loss_sequences": self.num_samples or math.ceil(LOSS_TOKENS / usable),
            "sequences": self.num_samples or rows_of_evaluation(usable),
        }
        positions, sources = results.get("positions") or {}, results.get("sources") or {}
        return (
            all(results.get(name) == value for name, value in wanted.items())
            and positions.get("skip_positions") == like["context_size"] - usable
            and positions.get("max_activation_norm") == like.get("max_activation_norm")
            and sources.get("hook_name") == "--like"
            and set(sources.values()) <= {"--like", "default"}
        )


def _usable(like: Mapping[str, Any]) -> int:
    """Returns how many positions of each context are measured at."""
    return like["context_size"] - ((like.get("seqpos_slice") or (None,))[0] or 0)


def read_evaluation(entry: Entry, on: MeasuredOn) -> dict[str, Any] | None:
    """Returns the content of an SAE's evaluation.json; None where it is not evaluated on this yet.

    Older comparisons kept only the results on validation text, and left the others beside the weights.
    """
    if (trained := entry.trained()) is None:
        return None
    for path in (_kept(entry, on.part), Path(trained["sae"]) / "evaluation.json"):
        found = _read(path)
        if found is None:
            continue
        if found.pop(_MEASURED_ON, None) == asdict(on) or on.certainly_gave(found):
            return found
    return None


def keep_evaluation(entry: Entry, on: MeasuredOn) -> None:
    """Keeps the results beside the weights in the SAE's own directory, where no later evaluation replaces them.

    Those on validation text are moved, since the results on the table's text go beside the weights.
    """
    if (trained := entry.trained()) is None:
        return
    sae = Path(trained["sae"])
    results = _read(sae / "evaluation.json")
    if results is None or (results.get("held_out") or {}).get("part") != on.part:
        return
    kept = _kept(entry, on.part)
    partial = kept.with_name(f".{kept.name}")
    partial.write_text(json.dumps(results | {_MEASURED_ON: asdict(on)}) + "\n")
    partial.replace(kept)
    if on.part == "validation":
        for name in ("evaluation.json", "report.html", "report.md"):
            (sae / name).unlink(missing_ok=True)


def forget_evaluations(entry: Entry) -> None:
    """Removes what is kept of an earlier training."""
    for part in (None, "validation"):
        _kept(entry, part).unlink(missing_ok=True)


def _kept(entry: Entry, part: str | None) -> Path:
    return entry.directory / ("validation.json" if part == "validation" else "evaluation.json")


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
