"""docs/flags.md from the settings: python -m sae_toolkit.settings.document > docs/flags.md"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from sae_toolkit.settings.comparison import ComparisonSettings
from sae_toolkit.settings.evaluation import EvaluationSettings
from sae_toolkit.settings.fields import Flag, Scope, flags_of, groups_of, title_of
from sae_toolkit.settings.sweep import SweepSettings
from sae_toolkit.settings.training import TrainingSettings

_LEAD = """\
# Flags

Every flag of every script, as `--help` shows them. This page is generated from `sae_toolkit/settings/`:
`python -m sae_toolkit.settings.document > docs/flags.md`.

A flag file holds flags as one types them, several a line if one likes, and comments after a `#`:
`python sae_lens_train.py @presets/demo.args --k 32`. A flag that stands twice has its last value.
"""
_SCRIPTS = {
    "sae_lens_train.py": (
        TrainingSettings,
        "The last column says whether the flag may differ when a run is resumed (`--resume`), and whether `--like`"
        " takes it from the earlier run.",
    ),
    "evaluate_sae_real_activations.py": (EvaluationSettings, ""),
    "sweep_saes.py": (SweepSettings, "All flags of sae_lens_train.py are accepted too, and hold for every trial."),
    "compare_sae_libraries.py": (
        ComparisonSettings,
        "All flags of sae_lens_train.py are accepted too, and hold for every training.",
    ),
}
_ON_RESUME = {
    Scope.SAE: "fixed",
    Scope.RUN: "fixed",
    Scope.PROCESS: "may differ",
    Scope.COMMAND: "may differ; not by `--like`",
}


def flags_page() -> str:
    """Returns the page in Markdown."""
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
    arguments = flag.arguments
    if arguments.get("action") == "store_true":
        return ""
    if "choices" in arguments:
        return ", ".join(f"`{choice}`" for choice in arguments["choices"])
    if "metavar" in arguments:
        one = f"`{arguments['metavar']}`"
    else:
        one = {str: "text", int: "a whole number"}.get(arguments["type"]) or (
            "a path" if isinstance(arguments["type"], type) else str(arguments["type"].__doc__)
        )
    return f"one or more: {one}" if arguments.get("nargs") == "+" else one


def _default(flag: Flag) -> str:
    if flag.default is dataclasses.MISSING:
        return "required"
    return f"`{flag.shown_default}`" if flag.shown_default else ""


if __name__ == "__main__":
    print(flags_page(), end="")
