"""Flags and `--set` fields that a run has no use for. They are said before it begins, one in a line."""

from __future__ import annotations

from typing import Any

from sae_lens import LanguageModelSAERunnerConfig

from sae_toolkit.settings.checks import SPARSITY_WEIGHTS
from sae_toolkit.settings.training import SAESettings
from sae_toolkit.training.prepared_run import PreparedRun

# Fields of --set that SAELens reads only beside certain values of another field.
_READ_ONLY_WITH: dict[str, tuple[str, tuple[Any, ...]]] = {
    "lr_end": ("lr_scheduler_name", ("cosineannealing", "cosineannealingwarmrestarts")),
    "n_restart_cycles": ("lr_scheduler_name", ("cosineannealingwarmrestarts",)),
    "sae_compilation_mode": ("compile_sae", (True,)),
    "llm_compilation_mode": ("compile_llm", (True,)),
    "logger.log_weights_to_wandb": ("logger.log_to_wandb", (True,)),
    "sae.jumprelu_tanh_scale": ("sae.jumprelu_sparsity_loss_mode", ("tanh",)),
    "sae.target_l0": ("sae.jumprelu_sparsity_loss_mode", ("quadratic",)),
}


def without_effect(run: PreparedRun) -> list[str]:
    """Returns a line for each flag and each `--set KEY=VALUE` that differs from its default and changes nothing."""
    found = flags_of_other_architectures(run.sae)
    if (seed := run.flags["held_out_seed"]) is not None and run.held_out.fraction == 0:
        found.append(f"--held_out_seed {seed}: without effect, since --held_out_fraction 0 holds nothing out")
    for assignment in run.optimization.set:
        if reason := _why_not_read(run, assignment.partition("=")[0]):
            found.append(f"--set {assignment}: without effect, since {reason}")
    return found


def flags_of_other_architectures(sae: SAESettings) -> list[str]:
    """Returns a line for each flag that differs from its default and that the architecture has no use for."""
    used = {SPARSITY_WEIGHTS.get(sae.architecture), "k" if "topk" in sae.architecture else None}
    return [
        f"--{name} {getattr(sae, name):g}: without effect, since --architecture {sae.architecture} has no {name}"
        for name in ("k", "l1_coefficient", "l0_coefficient")
        if name not in used and getattr(sae, name) != getattr(SAESettings, name)
    ]


def _why_not_read(run: PreparedRun, key: str) -> str | None:
    if key == "n_batches_for_norm_estimate" and not run.measures_first_activations:
        return "nothing is measured on the first activations"
    if key == "logger.log_weights_to_wandb" and run.recording.logger != "wandb":
        return f"--logger {run.recording.logger} keeps no weights"
    if key in _READ_ONLY_WITH:
        other, values = _READ_ONLY_WITH[key]
        value = _value(run.cfg, other)
        if (value.lower() if isinstance(value, str) else value) not in values:
            return f"{other} is {value}"
    return None


def _value(cfg: LanguageModelSAERunnerConfig[Any], key: str) -> Any:
    prefix, _, name = key.rpartition(".")
    return getattr(getattr(cfg, prefix) if prefix else cfg, name)
