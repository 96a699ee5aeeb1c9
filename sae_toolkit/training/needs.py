"""What a prepared run takes of memory and of the disk, and checks that it is there."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig

from sae_toolkit.errors import UserError
from sae_toolkit.model.devices import free_memory
from sae_toolkit.settings.values import Interval
from sae_toolkit.steps.memory import MemoryPlan, plan_memory
from sae_toolkit.training.lowered_run import lower_peak
from sae_toolkit.training.prepared_run import PreparedRun

log = logging.getLogger(__name__)


def memory_plan(
    run: PreparedRun, cfg: LanguageModelSAERunnerConfig[Any] | None = None, evaluates: bool | None = None
) -> MemoryPlan:
    """Returns the memory that one rank needs.

    Args:
        cfg: a configuration to plan for instead of that of the run.
        evaluates: whether to plan for measurements on held-out text, instead of what the run does.
    """
    return plan_memory(
        run.share_of_rank(cfg or run.cfg),
        run.model,
        run.lm_dtype,
        n_parameters=run.n_parameters,
        cached=run.is_cached or not run.shares_device,
        cfgs=run.cfgs,
        evaluates=run.evaluates if evaluates is None else evaluates,
        finetune_loss=run.optimization.finetune_loss,
        has_target_l0=run.sae.target_l0 is not None,
    )


def check_memory(run: PreparedRun) -> None:
    """Warns if the run is not predicted to fit into memory, and says which flags to lower so that it does.

    Raises:
        UserError: the run surely does not fit. On a CPU the kernel would kill the process without a message.
    """
    if not run.shares_device and not run.is_cached:
        takes, there = run.n_parameters[0] * run.lm_dtype.itemsize, free_memory(run.llm_device)
        if takes > there * run.n_devices:
            log.warning(
                "--llm_device %s: the language model takes about %.1f GiB, and %.1f GiB are free there",
                run.llm_device,
                takes / 2**30,
                there / 2**30,
            )
    if run.is_sharded:
        _check_memory_of_host(run)
    plan, free = memory_plan(run), free_memory_of_rank(run)
    if plan.peak <= free:
        return
    lowered = lower_peak(
        run.cfg,
        lambda *other: memory_plan(run, *other).peak,
        free,
        evaluates=run.evaluates,
        given=(
            *(("expansion_factor",) if run.initialized_from else ()),
            *(("train_batch_size_tokens",) if run.finetunes else ()),  # it must be a context or more
        ),
    )
    flags = " ".join(lowered.flags) if lowered.peak <= free else ""
    largest = run.sae.width_words[0] if plan.largest_flag == "--expansion_factor" else plan.largest_flag
    message = (
        f"{largest}: this run takes about {plan.peak / 2**30:.1f} GiB, and {run.cfg.device} has"
        f" {free / 2**30:.1f} GiB free; " + (f"it would fit with {flags}" if flags else "a smaller model is needed")
    )
    if plan.surely_above(free):
        raise UserError(message)
    log.warning(message)


def _check_memory_of_host(run: PreparedRun) -> None:
    """Warns if the host of rank 0 has no room for all features, which a checkpoint gathers there."""
    plan = memory_plan(run)
    # weights, Adam's moments, and a copy of the encoder while it is written
    gathers, there = run.ranks.size * (3 * plan.sae // 2 + plan.adam), free_memory("cpu")
    if gathers > there:
        log.warning(
            "--shard_features: for a checkpoint rank 0 gathers all features with Adam's moments in its host's"
            " memory, about %.1f GiB, and %.1f GiB are free there",
            gathers / 2**30,
            there / 2**30,
        )


def free_memory_of_rank(run: PreparedRun) -> int:
    """Returns the bytes that one rank may use. Ranks of a machine share its memory, but each has its own GPU."""
    free = free_memory(run.cfg.device)
    return free // run.ranks.local_size if torch.device(run.cfg.device).type == "cpu" else free


def disk_plan(run: PreparedRun) -> dict[str, int]:
    """Returns an upper bound of the bytes that the run takes on disk, by item."""
    memory = memory_plan(run)
    sae, adam = (n * (run.ranks.size if run.is_sharded else 1) for n in (memory.sae, memory.adam))
    sample = 0 if run.calibrates_on_held_out else memory.sample
    checkpoint = sae + adam + run.ranks.size * memory.buffer + sample
    n_checkpoints = min(run.cfg.n_checkpoints, run.cfg.total_training_steps)
    if Interval.parse(run.saving.checkpoint_every) != Interval():
        n_checkpoints += run.saving.keep + 1  # one more: an old one is deleted when the new one is complete
    plan = {"final SAE": sae, "checkpoints": n_checkpoints * checkpoint}
    if run.resume_from is None:
        plan["tokens"] = sum(array.nbytes for array in run.arrays().values())
    return {item: size for item, size in plan.items() if size}


def check_disk(run: PreparedRun) -> None:
    """Warns if the disk has no room for all checkpoints.

    Raises:
        UserError: the disk has no room for the final SAE.
    """
    plan, free = disk_plan(run), free_disk(Path(run.saving.checkpoint_path))
    least = sum(size for item, size in plan.items() if item != "checkpoints")
    if least > free:
        raise UserError(
            f"--checkpoint_path {run.saving.checkpoint_path}: the final SAE and the run's tokens take"
            f" {size_in_words(least)}, and {size_in_words(free)} are free there; make room or name another disk"
        )
    if sum(plan.values()) > free:
        log.warning(
            "--n_checkpoints %d --keep %d: the checkpoints take up to %s, and %s are free on the disk; lower them",
            run.cfg.n_checkpoints,
            run.saving.keep,
            size_in_words(plan["checkpoints"]),
            size_in_words(free),
        )


def existing(directory: Path) -> Path:
    """Returns the directory if it exists, and otherwise the nearest directory above it that exists."""
    return next(path for path in (directory, *directory.absolute().parents) if path.exists())


def free_disk(directory: Path) -> int:
    """Returns the bytes that are free on the disk of a directory, which need not exist yet."""
    return shutil.disk_usage(existing(directory)).free


def size_in_words(n_bytes: int) -> str:
    """Returns a number of bytes in MB, or in GB from one on."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"
