"""The checkpoints of a run: when they are saved, which of them are kept, and how to resume from them."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae_toolkit.activations.stream import ActivationStream
from sae_toolkit.errors import RunFailed
from sae_toolkit.files.whole_directory import NotSaved
from sae_toolkit.saes.checkpoints import finish_saes, save_final_checkpoint, save_training_checkpoint
from sae_toolkit.settings.values import Interval
from sae_toolkit.steps.multi_trainer import MultiTrainer
from sae_toolkit.training.prepared_run import PreparedRun

log = logging.getLogger(__name__)


class RunCheckpoints:
    """Saves the checkpoints of a run. If the run has several ranks, all of them call the methods, and rank 0 writes.

    Args:
        run: the run.
        trainer: the trainer whose state is saved.
        stream: the stream of activations whose position is saved.
    """

    def __init__(self, run: PreparedRun, trainer: MultiTrainer, stream: ActivationStream) -> None:
        self.run = run
        self.trainer = trainer
        self.stream = stream
        self.newest = run.resume_from
        self.final: Path | None = None
        self._every = Interval.parse(run.saving.checkpoint_every)
        self._saved_at = time.monotonic()
        self._saved_tokens = int(run.resume_from.name) if run.resume_from else 0

    @property
    def is_due(self) -> bool:
        """Whether --checkpoint_every asks for a checkpoint now."""
        n_tokens = self.trainer.n_training_samples - self._saved_tokens
        return self._every.is_over(time.monotonic() - self._saved_at, n_tokens)

    def save(self, milestone: bool = False) -> None:
        """Saves a checkpoint. If the disk has no room for it, the previous checkpoint is kept and the run continues.

        Args:
            milestone: whether this is a checkpoint of --n_checkpoints, which is kept after the run.
        """
        n_tokens, ranks = self.trainer.n_training_samples, self.run.ranks
        if milestone or self._saved_tokens != n_tokens:
            stream_state, trainer = self.stream.state_dict(), self.trainer.whole()  # all ranks take part in both
            if ranks.is_main and trainer:
                self._save(trainer, stream_state, milestone)
            self.newest = ranks.broadcast(self.newest)
        self._saved_at, self._saved_tokens = time.monotonic(), n_tokens

    def _save(self, trainer: MultiTrainer, stream_state: dict[str, Any], milestone: bool) -> None:
        key = self.run.run_directory.key
        try:
            self.newest = self._with_room(
                lambda: save_training_checkpoint(trainer, stream_state, self.run.cfgs, run=key, milestone=milestone)
            )
            self.run.run_directory.keep_newest(self.run.saving.keep)
        except NotSaved as error:
            kept = f"the last is {self.newest}" if self.newest else "there is no other yet"
            n_tokens = f"{trainer.n_training_samples:,}"
            log.warning("the checkpoint at %s tokens is not saved: %s; %s", n_tokens, error, kept)

    def save_final(self) -> Path:
        """Saves the finished SAE, or one for each hook, and deletes the checkpoints to resume from.

        Returns:
            Directory of the SAE, or of the SAEs.

        Raises:
            RunFailed: the disk has no room.
        """
        trainer = self.trainer.whole(finished=True)
        if self.run.ranks.is_main and trainer:
            self._save_final(trainer)
        self.final = self.run.ranks.broadcast(self.final)
        assert self.final is not None
        return self.final

    def _save_final(self, trainer: MultiTrainer) -> None:
        finish_saes(trainer)
        for sae in trainer.saes.values():
            sae.cfg.metadata["epochs"] = round(self.run.phases.passes(self.stream.passes), 3)
        directory = self.run.run_directory
        try:
            self.final = self._with_room(lambda: save_final_checkpoint(trainer, self.run.cfgs, run=directory.key))
        except NotSaved as error:
            raise RunFailed(
                f"{directory.path}: the finished SAE cannot be saved: {error}; make room, and {self.how_to_go_on()}"
            ) from None
        directory.keep_newest(0)

    def _with_room(self, save: Callable[[], Path]) -> Path:
        """Calls `save`; if there is no room, deletes all checkpoints to resume from but the newest, and tries again."""
        try:
            return save()
        except NotSaved:
            self.run.run_directory.keep_newest(1)
            return save()

    def how_to_go_on(self) -> str:
        """Returns a phrase with the command that resumes the run, or one that says why there is nothing to resume."""
        if self.final is not None:
            return f"the SAE is finished: {self.final}"
        if not self.run.directory.exists():
            return "nothing was trained yet; the same command begins again"
        if self.run.ranks.is_alone:
            python = Path(sys.executable)
            if python.is_relative_to(Path.cwd()):
                python = python.relative_to(Path.cwd())
            command = [str(python), "sae_lens_train.py"]
        else:
            command = ["./run_simple.sh", "NUM_GPUS", "GPU_IDS"]
        command += ["--resume", str(self.newest or self.run.directory)]
        if self.run.is_sharded:
            command.append("--shard_features")
        if self.run.model.trust_remote_code:
            command.append("--trust_remote_code")
        return f"to go on: {shlex.join(command)}"
