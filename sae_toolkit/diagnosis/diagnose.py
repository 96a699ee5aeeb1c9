"""Finds the causes that make an SAE unhealthy, and the flags to change.

Causes come in three tiers, in this order:

1. Mistakes in the evaluation: at the wrong layer, for instance, the metrics of an SAE say nothing about its training.
2. The activations that the SAE was trained on.
3. The settings of the training.

Within a tier, the cause with the largest effect comes first.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from sae_toolkit.diagnosis import evaluation_causes, training_causes
from sae_toolkit.diagnosis.evidence import Evidence, Finding
from sae_toolkit.diagnosis.history import TrainingHistory
from sae_toolkit.errors import UserError
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.settings.evaluation import EvaluatedSAESettings, EvaluationSettings, EvaluationTextSettings
from sae_toolkit.settings.fields import as_flags, as_words
from sae_toolkit.training.configuration import build_runner_config

_HOOK_FLAGS = {"layer", "hook_name"}
_TIERS = (evaluation_causes.CAUSES, training_causes.GIVEN, training_causes.SETTINGS)


def diagnose(evidence: Evidence) -> list[Finding]:
    """Returns the causes that the evidence shows, the one to fix first at the front; an empty list for a healthy SAE.

    Causes with an effect of 0 or less come last, whatever their tier.
    """
    found = []
    for tier, causes in enumerate(_TIERS):
        of_tier = [finding for cause in causes if (finding := cause(evidence))]
        of_tier = [finding for finding in of_tier if set(finding.metrics) & set(evidence.unhealthy)]
        found += [(tier, finding) for finding in of_tier]
    found.sort(key=lambda pair: (pair[0] if pair[1].effect > 0 else len(_TIERS), -pair[1].effect))
    return [replace(finding, effect=min(max(finding.effect, 0.0), 1.0)) for _, finding in found]


def command(finding: Finding, evidence: Evidence) -> str:
    """Returns the command that applies the flags of a finding; only the flags if the training run is not known."""
    history = evidence.history
    if not finding.of_training:
        return shlex.join(["python", "evaluate_sae_real_activations.py", *_words_of_evaluation(finding, evidence)])
    if history is None or not _is_accepted(history, evidence, finding.flags):
        return f"in its training: {shlex.join(finding.flags)}"
    run = history.directory
    if run.is_relative_to(Path.cwd()):
        run = run.relative_to(Path.cwd())
    return shlex.join(["./run_saelens_training.sh", "--like", str(run), *finding.flags])


def _words_of_evaluation(finding: Finding, evidence: Evidence) -> list[str]:
    """Returns the flags of the evaluation that say what is measured, with what the finding changes of them."""
    changed = {word[2:] for word in finding.flags if word.startswith("--")} | set(finding.leave_out)
    if changed & _HOOK_FLAGS:
        changed |= _HOOK_FLAGS
    kept = {each.name for group in (EvaluatedSAESettings, EvaluationTextSettings) for each in fields(group)}
    values = as_flags(evidence.evaluation)
    leave_out = values.keys() - (kept - changed - {"sae_path"})
    given = as_words(EvaluationSettings, values, leave_out=leave_out)
    return ["--sae_path", evidence.sae_name, *given, *finding.flags]


def _is_accepted(history: TrainingHistory, evidence: Evidence, flags: Sequence[str]) -> bool:
    """Returns whether a training like that of the SAE takes these flags."""
    try:
        settings = parse_training_flags(["--like", str(history.directory), *flags])
        hook_name = evidence.metadata.get("hook_name") or evidence.summary["hook_name"]
        build_runner_config(settings, hook_name, d_in=evidence.d_in, device="cpu", run_id="any")
    except UserError:
        return False
    return True


def as_records(findings: Sequence[Finding], evidence: Evidence) -> list[dict[str, Any]]:
    """Returns findings as evaluation.json stores them."""
    return [
        {
            "cause": finding.cause,
            "metrics": list(finding.metrics),
            "says": finding.says,
            "effect": finding.effect,
            "command": command(finding, evidence),
        }
        for finding in findings
    ]
