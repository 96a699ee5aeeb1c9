"""Writes docs/flags.md from the settings: python -m sae_toolkit.settings.document > docs/flags.md"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from sae_toolkit.settings.comparison import ComparisonSettings
from sae_toolkit.settings.evaluation import EvaluationSettings
from sae_toolkit.settings.fields import Flag, Scope, flags_of, groups_of, title_of
from sae_toolkit.settings.inspection import InspectionSettings
from sae_toolkit.settings.sweep import SweepSettings
from sae_toolkit.settings.training import TrainingSettings

_LEAD = """\
# Flags

All flags of all scripts, as `--help` shows them. This page is generated from `sae_toolkit/settings/`:
`python -m sae_toolkit.settings.document > docs/flags.md`.

sae_lens_train.py also reads flags from files: `python sae_lens_train.py @presets/demo.args --k 32`. A file holds flags
as you would type them, one or more on a line, and comments after a `#`. If a flag is given twice, the last value holds.
"""
_SCRIPTS = {
    "sae_lens_train.py": (
        TrainingSettings,
        "The last column says whether you may change the flag when you resume a run (`--resume`), and whether `--like`"
        " takes it from the earlier run.",
    ),
    "evaluate_sae_real_activations.py": (EvaluationSettings, ""),
    "inspect_sae_features.py": (InspectionSettings, ""),
    "sweep_saes.py": (SweepSettings, "You can also give any flag of sae_lens_train.py. It then holds for all trials."),
    "compare_sae_libraries.py": (
        ComparisonSettings,
        "You can also give any flag of sae_lens_train.py. It then holds for all trainings.",
    ),
}
_ON_RESUME = {
    Scope.SAE: "fixed",
    Scope.RUN: "fixed",
    Scope.PROCESS: "may differ",
    Scope.COMMAND: "may differ; not taken by `--like`",
}


def flags_page() -> str:
    """Returns the page, in Markdown."""
    parts = [_LEAD]
    for script, (settings, note) in _SCRIPTS.items():
        parts += [f"## {script}\n", f"{note}\n"] if note else [f"## {script}\n"]
        for group in groups_of(settings).values():
            parts += [f"### {title_of(group)}\n", *_table(list(flags_of(group).values()), settings), ""]
    return "\n".join(parts).rstrip() + "\n"


def _table(flags: list[Flag], settings: type) -> Iterator[str]:
    with_scope = settings is TrainingSettings
    columns = ["flag", "takes", "default", "meaning", *(["resumed"] if with_scope else [])]
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    for flag in flags:
        cells = [f"`--{flag.name}`", _takes(flag), _default(flag), flag.help]
        cells += [_ON_RESUME[flag.scope]] if with_scope else []
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _takes(flag: Flag) -> str:
    """Returns in words what the value of a flag can be."""
    arguments = flag.arguments
    if arguments.get("action") == "store_true":
        return ""
    if "choices" in arguments:
        return ", ".join(f"`{choice}`" for choice in arguments["choices"])
    if "metavar" in arguments:
        one = f"`{arguments['metavar']}`"
    else:
        plain = {str: "text", int: "a whole number", Path: "a path"}
        one = plain.get(arguments["type"]) or str(arguments["type"].__doc__)
    return f"one or more: {one}" if arguments.get("nargs") == "+" else one


def _default(flag: Flag) -> str:
    if flag.default is dataclasses.MISSING:
        return "required"
    return f"`{flag.shown_default}`" if flag.shown_default else ""


if __name__ == "__main__":
    print(flags_page(), end="")
