"""A training run that is ready to start."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.util import dtype_to_str

from sae_toolkit.activations.cache import holds_rows
from sae_toolkit.distributed.ranks import ALONE, Ranks
from sae_toolkit.model.devices import choose_lm_dtype
from sae_toolkit.model.hook_width import parameters_up_to_hook
from sae_toolkit.model.loading import ModelSource
from sae_toolkit.settings.training import OptimizationSettings, RecordingSettings, RunSettings, SAESettings
from sae_toolkit.steps.activation_sample import LEAST_HELD_OUT
from sae_toolkit.text.positions import PositionFilter
from sae_toolkit.text.sources import HeldOutSplit, TextSource
from sae_toolkit.training.directory import ASSISTANT, HELD_OUT, HELD_OUT_ASSISTANT, TOKENS, RunDirectory
from sae_toolkit.training.initial_sae import InitialSAE
from sae_toolkit.training.phases import Phases


@dataclass(frozen=True)
class PreparedRun:
    """A run that is ready to start.

    Args:
        cfgs: SAELens's configuration of each SAE. They differ only in the hook and its width, or only in the seed.
        hook_flag: the flag that chose the hooks.
        model: source of the language model.
        llm_device: device of the language model.
        lm_dtype: dtype of the language model.
        n_devices: number of CUDA devices that the language model is spread over.
        cache_directory: directory of the cached activations; None if they are not cached.
        text: the text that is trained on.
        rows_NT: token ids of that text.
        assistant_NT: booleans, True where the assistant speaks, if only what it says is trained on; otherwise None.
        held_out: the split that decides which documents are kept for the evaluation.
        held_out_NT: token ids of held-out text, to measure on during training and to calibrate L0 on; None if the run
            does neither, or if a run that only calibrates has no such text.
        held_out_assistant_NT: as `assistant_NT`, for `held_out_NT`.
        epochs: how often the run may train on each row.
        positions: the positions that are trained on.
        max_norm_multiple: activations whose norm is more than this many times the median are left out; None leaves
            none out.
        sae: settings of the SAE.
        optimization: settings of the steps and of the optimizer.
        run_directory: directory of the run; it need not exist yet.
        resume_from: checkpoint to resume from; None to begin at the first step.
        initial_saes: for each hook, the SAE that the run begins with, on the rank that loads it; empty on other ranks,
            for random weights, and if the run resumes from a checkpoint.
        initialized_from: for each hook, what the SAE is that the run began with; empty for random weights.
        saving: settings of the checkpoints.
        recording: settings of the record.
        flags: flags of the run by name, for the record.
        recipe: for each flag that the recipe chose, its value and why.
        ranks: the ranks that train the SAE.
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
    assistant_NT: np.ndarray | None
    held_out: HeldOutSplit
    held_out_NT: np.ndarray | None
    held_out_assistant_NT: np.ndarray | None
    epochs: int
    positions: PositionFilter
    max_norm_multiple: float | None
    sae: SAESettings
    optimization: OptimizationSettings
    run_directory: RunDirectory
    resume_from: Path | None
    initial_saes: Mapping[str, InitialSAE]
    initialized_from: Mapping[str, Mapping[str, Any]]
    saving: RunSettings
    recording: RecordingSettings
    flags: Mapping[str, Any]
    recipe: tuple[str, ...] = ()
    ranks: Ranks = ALONE

    @property
    def cfg(self) -> LanguageModelSAERunnerConfig[Any]:
        """The configuration of the first SAE."""
        return self.cfgs[0]

    @property
    def sae_names(self) -> list[str]:
        """The name of each SAE: that of its hook, or seed_N if the SAEs differ in their seeds."""
        of_seeds = self.optimization.seeds > 1
        return [f"seed_{cfg.seed}" if of_seeds else cfg.hook_name for cfg in self.cfgs]

    @property
    def hook_names(self) -> list[str]:
        return list(dict.fromkeys(cfg.hook_name for cfg in self.cfgs))

    @property
    def widths(self) -> list[int]:
        """The width of the activations at each hook."""
        return list({cfg.hook_name: cfg.sae.d_in for cfg in self.cfgs}.values())

    @cached_property
    def n_positions(self) -> int:
        """How many positions of the rows are trained on in one pass, before massive activations are left out."""
        return int(self._keeps_NT().sum())

    def _keeps_NT(self) -> np.ndarray:
        return self.positions.keeps_tokens(self.rows_NT, self.assistant_NT)

    @property
    def measures_first_activations(self) -> bool:
        """Whether the run measures the first activations: for its norm limit, its normalization or its first bias."""
        return (
            self.max_norm_multiple is not None
            or self.sae.b_dec_init_method == "mean"
            or self.cfg.sae.normalize_activations in ("expected_average_only_in", "covariance_whitening")
        )

    @property
    def passes(self) -> float:
        """How many passes over the rows the training tokens take, before massive activations are left out."""
        return self.cfg.training_tokens / self.n_positions

    @cached_property
    def phases(self) -> Phases:
        """The steps before fine-tuning, and those of it."""
        shuffled = self.cfg.activations_mixing_fraction > 0
        return Phases.of(self.optimization, self.rows_NT, self._keeps_NT, shuffled=shuffled)

    @property
    def finetunes(self) -> bool:
        """Whether the run ends with steps of --finetune_loss, for which it keeps the whole language model."""
        return self.optimization.finetune_loss != "none"

    @property
    def products_in_bfloat16(self) -> bool:
        """Whether products of the SAE on a CPU are in bfloat16: if the model is, and the hardware is faster in it."""
        return self.lm_dtype == choose_lm_dtype("auto", self.cfg.device) == torch.bfloat16

    @property
    def directory(self) -> Path:
        return self.run_directory.path

    def open_directory(self) -> None:
        """Creates the directory of the run, unless the run is resumed, and starts the log in it."""
        if not self.ranks.is_main:
            return
        if not self.directory.exists():
            self.run_directory.create(self.flags, self.text, self.arrays(), self.initialized_from)
        self.run_directory.open_log()

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays that the directory of the run keeps, by the names of their files."""
        arrays = {
            TOKENS: self.rows_NT,
            ASSISTANT: self.assistant_NT,
            HELD_OUT: self.held_out_NT,
            HELD_OUT_ASSISTANT: self.held_out_assistant_NT,
        }
        return {name: array for name, array in arrays.items() if array is not None}

    def metadata(self) -> dict[str, Any]:
        """Returns the metadata of the training that the saved SAE has, besides the fields that SAELens records."""
        return {
            "dataset_config": self.text.config,
            "dataset_split": self.text.split,
            "text_column": self.text.column,
            **({"chat_tokens": self.positions.chat_tokens} if self.text.is_chat else {}),
            "fallback_from": self.text.fallback_from,
            "held_out_fraction": self.held_out.fraction,
            "held_out_seed": self.held_out.seed,
            "max_activation_norm_multiple": self.max_norm_multiple or 0.0,
            **self._finetuning_metadata(),
        }

    def lineage(self) -> dict[str, Any]:
        """Returns `initialized_from` for the record; empty for random weights."""
        return {"initialized_from": dict(self.initialized_from)} if self.initialized_from else {}

    def _finetuning_metadata(self) -> dict[str, Any]:
        if not self.finetunes:
            return {}
        return {name: getattr(self.optimization, name) for name in ("finetune_loss", "finetune_fraction")}

    def cache_parameters(self) -> dict[str, Any]:
        """Returns the values that the activations depend on, besides the tokens."""
        return {
            "model_name": self.model.name,
            "model_from_pretrained_kwargs": self.model.model_kwargs,
            "model_files": self.model.files(),
            "hook_name": " ".join(self.hook_names),
            "lm_dtype": dtype_to_str(self.lm_dtype),
            "context_size": self.cfg.context_size,
            "d_in": sum(self.widths),
        }

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of the features. Otherwise each rank holds all of them."""
        return self.sae.shard_features and not self.ranks.is_alone

    def share_of_rank(self, cfg: LanguageModelSAERunnerConfig[Any]) -> LanguageModelSAERunnerConfig[Any]:
        """Returns the configuration of one rank's share: of a batch, and of the features if they are sharded."""
        share = copy.copy(cfg)
        for name in ("train_batch_size_tokens", "store_batch_size_prompts", "n_batches_in_buffer"):
            setattr(share, name, -(-getattr(cfg, name) // self.ranks.size))
        if self.is_sharded:
            share.train_batch_size_tokens = cfg.train_batch_size_tokens
            share.sae = copy.copy(cfg.sae)
            share.sae.d_sae = cfg.sae.d_sae // self.ranks.size
            share.sae.k = max(1, cfg.sae.k // self.ranks.size)
        return share

    @property
    def all_rows_NT(self) -> np.ndarray:
        """The rows of token ids whose activations the run needs: those that are trained on, and held-out text."""
        return self.rows_NT if self.held_out_NT is None else np.concatenate((self.rows_NT, self.held_out_NT))

    @property
    def calibrates_on_held_out(self) -> bool:
        """Whether there is enough held-out text to calibrate L0 on, if the SAEs have one to calibrate."""
        return self.held_out_NT is not None and self.held_out_NT.size >= LEAST_HELD_OUT

    @property
    def evaluates(self) -> bool:
        """Whether the run measures on held-out text during training, on this rank."""
        return self.recording.eval_every > 0 and self.ranks.is_main

    @property
    def shares_device(self) -> bool:
        """Whether the language model and the SAE are on the same device."""
        both = (torch.device(name) for name in (self.llm_device, self.cfg.device))
        return len({(device.type, device.index or 0) for device in both}) == 1

    @cached_property
    def n_parameters(self) -> tuple[int, int]:
        """Number of parameters of the language model, and of its part up to the hooks."""
        return self.model.n_parameters, parameters_up_to_hook(
            self.model.config, self.hook_names, self.model.trust_remote_code
        )

    @cached_property
    def is_cached(self) -> bool:
        """Whether earlier runs left all activations of this one in the cache.

        Raises:
            UserError: the directory holds something else.
        """
        directory = self.cache_directory
        return directory is not None and holds_rows(directory, self.cache_parameters(), self.all_rows_NT)
