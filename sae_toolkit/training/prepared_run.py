"""A training run that is ready to start: what it trains on what, what that takes, and whether it fits."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.util import dtype_to_str

from sae_toolkit.activations.cache import check_cache_directory
from sae_toolkit.distributed.ranks import ALONE, Ranks
from sae_toolkit.errors import UserError
from sae_toolkit.model.devices import choose_lm_dtype, free_memory
from sae_toolkit.model.language_model import parameters_up_to_hook
from sae_toolkit.model.loading import ModelSource
from sae_toolkit.settings.training import RecordingSettings, RunSettings
from sae_toolkit.settings.values import Interval
from sae_toolkit.steps.memory import MemoryPlan, plan_memory, suggest_flags
from sae_toolkit.text.positions import PositionFilter
from sae_toolkit.text.sources import HeldOutSplit, TextSource
from sae_toolkit.training.directory import RunDirectory

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRun:
    """A run that is ready to start.

    Args:
        cfgs: of each SAE; they differ in the hook and its width.
        hook_flag: the flag that named the hooks.
        model: where the language model comes from.
        llm_device: of the language model.
        lm_dtype: of the language model.
        n_devices: over how many CUDA devices the language model is spread.
        cache_directory: where activations are kept; None to keep none.
        text: what is trained on.
        rows_NT: its token ids.
        held_out: which documents are kept for evaluation.
        held_out_NT: rows of held-out text to measure on; where there are ranks, rank 0 has them.
        positions: which positions are trained on.
        max_norm_multiple: times the median norm, above which activations are left out; None leaves none out.
        target_l0: the L0 that the sparsity weight is adjusted to; None leaves the weight as it is.
        shards_features: whether the ranks share the features.
        run_directory: of the run; it need not exist yet.
        resume_from: a checkpoint; None at the first step.
        saving: when the run is saved, and where.
        recording: where the run is recorded.
        started_with: the flags of the run by name, for the record.
        ranks: which train the SAE.
    """

    cfgs: list[LanguageModelSAERunnerConfig[Any]]
    hook_flag: str
    model: ModelSource
    llm_device: str
    lm_dtype: torch.dtype
    n_devices: int
    cache_directory: Path | None
    text: TextSource
    rows_NT: np.ndarray
    held_out: HeldOutSplit
    held_out_NT: np.ndarray | None
    positions: PositionFilter
    max_norm_multiple: float | None
    target_l0: float | None
    shards_features: bool
    run_directory: RunDirectory
    resume_from: Path | None
    saving: RunSettings
    recording: RecordingSettings
    started_with: Mapping[str, Any]
    ranks: Ranks = ALONE

    @property
    def cfg(self) -> LanguageModelSAERunnerConfig[Any]:
        """The first SAE's: in all but the hook and its width that of the others."""
        return self.cfgs[0]

    @property
    def hook_names(self) -> list[str]:
        return [cfg.hook_name for cfg in self.cfgs]

    @property
    def widths(self) -> list[int]:
        """d_in of each SAE."""
        return [cfg.sae.d_in for cfg in self.cfgs]

    @property
    def products_in_bfloat16(self) -> bool:
        """Whether an SAE's products on a CPU take bfloat16: where the language model does, and the hardware can."""
        return self.lm_dtype == choose_lm_dtype("auto", self.cfg.device) == torch.bfloat16

    @property
    def directory(self) -> Path:
        return self.run_directory.path

    def open_directory(self) -> None:
        """Makes the run's directory, unless it is there to be resumed; from now on the run's log is written there."""
        if not self.ranks.is_main:
            return
        if not self.directory.exists():
            self.run_directory.create(self.started_with, self.text, self.rows_NT, self.held_out_NT)
        self.run_directory.open_log()

    def metadata(self) -> dict[str, Any]:
        """What the saved SAE records of its training, beside what SAELens knows of."""
        return {
            "dataset_config": self.text.config,
            "dataset_split": self.text.split,
            "text_column": self.text.column,
            "fallback_from": self.text.fallback_from,
            "held_out_fraction": self.held_out.fraction,
            "held_out_seed": self.held_out.seed,
            "max_activation_norm_multiple": self.max_norm_multiple or 0.0,
        }

    def cache_parameters(self) -> dict[str, Any]:
        """What the activations of a row of tokens depend on."""
        return {
            "model_name": self.model.name,
            "model_from_pretrained_kwargs": self.model.model_kwargs,
            "model_files": self.model.files(),
            "hook_name": " ".join(self.hook_names),
            "lm_dtype": dtype_to_str(self.lm_dtype),
            "context_size": self.cfg.context_size,
            "d_in": sum(self.widths),
        }

    def plan_memory(self) -> MemoryPlan:
        """What each process takes."""
        return self._plan_memory(self.cfg)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds some of the features; else each holds all."""
        return self.shards_features and not self.ranks.is_alone

    def share_of_rank(self, cfg: LanguageModelSAERunnerConfig[Any]) -> LanguageModelSAERunnerConfig[Any]:
        """What one rank has of a configuration: of a batch, or of the features and the active ones among them."""
        share = copy.copy(cfg)
        for name in ("train_batch_size_tokens", "store_batch_size_prompts", "n_batches_in_buffer"):
            setattr(share, name, -(-getattr(cfg, name) // self.ranks.size))
        if self.is_sharded:
            share.train_batch_size_tokens = cfg.train_batch_size_tokens
            share.sae = copy.copy(cfg.sae)
            share.sae.d_sae = cfg.sae.d_sae // self.ranks.size
            share.sae.k = max(1, cfg.sae.k // self.ranks.size)
            share.from_pretrained_path = None  # its weights are of all features
        return share

    def _plan_memory(self, cfg: LanguageModelSAERunnerConfig[Any]) -> MemoryPlan:
        return plan_memory(
            self.share_of_rank(cfg),
            self.model,
            self.lm_dtype,
            n_parameters=self._n_parameters,
            cached=self.is_cached or not self._shares_device,
            n_saes=len(self.cfgs),
            evaluates=self.held_out_NT is not None,
        )

    @property
    def _shares_device(self) -> bool:
        """Whether the language model and the SAE are on one device."""
        both = (torch.device(name) for name in (self.llm_device, self.cfg.device))
        return len({(device.type, device.index or 0) for device in both}) == 1

    @cached_property
    def _n_parameters(self) -> tuple[int, int]:
        return self.model.n_parameters, parameters_up_to_hook(
            self.model.config, self.hook_names, self.model.trust_remote_code
        )

    @cached_property
    def is_cached(self) -> bool:
        """Whether an earlier run left activations in --cache_activations.

        Raises:
            UserError: the directory holds something else.
        """
        directory = self.cache_directory
        return directory is not None and check_cache_directory(directory, self.cache_parameters())

    def check_memory(self) -> None:
        """Warns where the run is not predicted to fit, with what to lower so that it does.

        Raises:
            UserError: it surely does not fit: on a CPU the kernel would end the process without a word.
        """
        if not self._shares_device and not self.is_cached:
            takes, there = self._n_parameters[0] * self.lm_dtype.itemsize, free_memory(self.llm_device)
            if takes > there * self.n_devices:
                log.warning(
                    "--llm_device %s: the language model takes about %.1f GiB, and %.1f GiB are free there",
                    self.llm_device,
                    takes / 2**30,
                    there / 2**30,
                )
        if self.is_sharded:
            self._check_memory_of_host()
        plan, free = self.plan_memory(), self._free_memory()
        if plan.peak <= free:
            return
        flags = suggest_flags(self.cfg, self._plan_memory, free)
        message = (
            f"{plan.largest_flag}: this run takes about {plan.peak / 2**30:.1f} GiB, and {self.cfg.device} has"
            f" {free / 2**30:.1f} GiB free; " + (f"it would fit with {flags}" if flags else "a smaller model is needed")
        )
        if plan.surely_above(free):
            raise UserError(message)
        log.warning(message)

    def _check_memory_of_host(self) -> None:
        plan = self.plan_memory()
        # beside weights and moments a copy of the encoder, as it is written
        gathers, there = self.ranks.size * (3 * plan.sae // 2 + plan.adam), free_memory("cpu")
        if gathers > there:
            log.warning(
                "--shard_features: for a checkpoint rank 0 gathers all features with Adam's moments in its host's"
                " memory, about %.1f GiB, and %.1f GiB are free there",
                gathers / 2**30,
                there / 2**30,
            )

    def _free_memory(self) -> int:
        """Bytes that one process can take: the processes of a machine share its memory, and each has its own GPU."""
        free = free_memory(self.cfg.device)
        return free // self.ranks.local_size if torch.device(self.cfg.device).type == "cpu" else free

    def disk_plan(self) -> dict[str, int]:
        """Bytes that the run takes on disk at the most, by item."""
        memory = self.plan_memory()
        sae, adam = (n * (self.ranks.size if self.is_sharded else 1) for n in (memory.sae, memory.adam))
        checkpoint = sae + adam + self.ranks.size * memory.buffer
        n_checkpoints = min(self.cfg.n_checkpoints, self.cfg.total_training_steps)
        if Interval.parse(self.saving.checkpoint_every) != Interval():
            n_checkpoints += self.saving.keep + 1  # the last go when the next is whole
        plan = {"final SAE": sae, "checkpoints": n_checkpoints * checkpoint}
        if self.resume_from is None:
            plan["tokens"] = self.rows_NT.nbytes + (0 if self.held_out_NT is None else self.held_out_NT.nbytes)
        return {item: size for item, size in plan.items() if size}

    def check_disk(self) -> None:
        """Warns where the disk has no room for all checkpoints.

        Raises:
            UserError: it has none even for the final SAE.
        """
        plan, free = self.disk_plan(), free_disk(Path(self.saving.checkpoint_path))
        least = sum(size for item, size in plan.items() if item != "checkpoints")
        if least > free:
            raise UserError(
                f"--checkpoint_path {self.saving.checkpoint_path}: the final SAE and the run's tokens take"
                f" {_size(least)}, and {_size(free)} are free there; make room or name another disk"
            )
        if sum(plan.values()) > free:
            log.warning(
                "--n_checkpoints %d --keep %d: the checkpoints take up to %s, and %s are free on the disk",
                self.cfg.n_checkpoints,
                self.saving.keep,
                _size(plan["checkpoints"]),
                _size(free),
            )

    def describe(self, *, details: bool) -> str:
        """Returns what will run and what it takes, in about ten lines.

        Args:
            details: whether to list the memory item by item.
        """
        cfg, sae = self.cfg, self.cfg.sae
        n_steps = -(-cfg.training_tokens // cfg.train_batch_size_tokens)
        left_out = [
            *(["special tokens"] if self.positions.special_token_ids else []),
            *([f"the first {n} positions"] if (n := self.positions.skip_positions) else []),
            *([f"norms above {m:g} x the median"] if (m := self.max_norm_multiple) else []),
        ]
        memory, disk = self.plan_memory(), self.disk_plan()
        disk_items = ", ".join(f"{item} {_size(size)}" for item, size in disk.items())
        hooks = " ".join(self.hook_names)
        saes = sae.architecture() if len(self.cfgs) == 1 else f"{len(self.cfgs)} x {sae.architecture()}"
        n_there = int(self.positions.keeps_tokens(self.rows_NT).sum())
        return "\n".join(
            (
                f"model   {self.model.name}, {hooks}, {dtype_to_str(self.lm_dtype)} on {self.llm_device}",
                f"text    {self.text.name}"
                + (f" ({self.text.config})" if self.text.config else "")
                + f", {len(self.rows_NT):,} contexts of {cfg.context_size},"
                f" {self.held_out.fraction:.0%} of documents held out",
                f"SAE     {saes}, {sae.d_sae:,} features on {sae.d_in:,} dimensions, {sae.dtype}",
                f"train   {cfg.training_tokens:,} tokens, {n_steps:,} steps of {cfg.train_batch_size_tokens:,},"
                f" lr {cfg.lr:g}" + self._processes(),
                f"without {', '.join(left_out) or 'leaving anything out'}",
                f"into    {self.directory}",
                f"tokens  {cfg.training_tokens:,} needed, {n_there:,} there;"
                f" {cfg.training_tokens / sae.d_sae:,.3g} for each feature",
                memory.describe()
                if details
                else f"memory  {memory.peak / 2**30:.2f} GiB at the peak, {self._free_memory() / 2**30:.1f} free"
                + ("" if self.ranks.is_alone else ", for each process"),
                f"disk    up to {_size(sum(disk.values()))} ({disk_items}),"
                f" {_size(free_disk(Path(self.saving.checkpoint_path)))} free",
            )
        )

    def _processes(self) -> str:
        if self.ranks.is_alone:
            return ""
        return f", on {self.ranks.size} processes" + (" that share its features" if self.is_sharded else "")


def existing(directory: Path) -> Path:
    """The directory, or the nearest one above it that is there."""
    return next(path for path in (directory, *directory.absolute().parents) if path.exists())


def free_disk(directory: Path) -> int:
    """Bytes that can be written into a directory, which need not be there yet."""
    return shutil.disk_usage(existing(directory)).free


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"
