"""The directory of a run: how it is created, locked by one process, and found again by --resume."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from sae_toolkit.errors import UserError
from sae_toolkit.files.names import FLAGS_FILENAME, HELD_OUT_METRICS_FILENAME, METRICS_FILENAME
from sae_toolkit.files.whole_directory import (
    MANIFEST_FILENAME,
    NotSaved,
    check_manifest,
    remove_partial_directories,
    whole_directory,
)
from sae_toolkit.settings.command_line import run_directory_of, save_flags
from sae_toolkit.terminal.console import open_run_log
from sae_toolkit.text.sources import TextSource

log = logging.getLogger(__name__)

_TEXT, _LOG, _LOCK = "text.json", "run.log", ".lock"
_INITIALIZED_FROM = "initialized_from.json"
_OF_TEXT = (
    *("name", "config", "split", "column", "tokenized", "fallback_from", "row_length"),
    *("is_chat", "joined_by", "sample"),
)

# The files of arrays [n_rows, context_size]: token ids to train on and held-out ones, and for each booleans that are
# True where the assistant speaks. A run that does not need one has no such file.
TOKENS, ASSISTANT = "tokens.npy", "assistant.npy"
HELD_OUT, HELD_OUT_ASSISTANT = "held_out.npy", "held_out_assistant.npy"


class RunDirectory:
    """The directory of one run. It holds its flags, text, tokens, log, metrics, checkpoints and the finished SAE.

    Args:
        path: path of the directory. It need not exist before `create`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key = ""  # random; also in the manifest of each checkpoint, to recognize those of other runs
        self._lock: IO[str] | None = None

    def create(
        self,
        flags: Mapping[str, Any],
        text: TextSource,
        arrays: Mapping[str, np.ndarray],
        initialized_from: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Creates the directory, writes all that a resumed run needs besides a checkpoint, and claims it.

        Args:
            flags: flags of the run, by name.
            text: the text that the tokens are from.
            arrays: arrays [n_rows, context_size] by the name of their file, such as `TOKENS`.
            initialized_from: for each hook, what the SAE is that the run begins with; empty for random weights.

        Raises:
            UserError: the directory cannot be written.
        """
        try:
            with whole_directory(self.path, run=secrets.token_hex(8)) as directory:
                save_flags(flags, directory)
                (directory / _TEXT).write_text(json.dumps({name: getattr(text, name) for name in _OF_TEXT}) + "\n")
                for name, array in arrays.items():
                    np.save(directory / name, array)
                if initialized_from:
                    (directory / _INITIALIZED_FROM).write_text(json.dumps(initialized_from, indent=1) + "\n")
        except NotSaved as error:
            raise UserError(f"--checkpoint_path {self.path.parent.parent}: cannot be written to ({error})") from None
        self.claim()

    def claim(self) -> None:
        """Makes this process the only one that may write into the directory, until `release` or the process's end.

        Raises:
            UserError: another process has claimed the directory, or the files that `create` wrote are damaged.
        """
        where = f"--resume {self.path}"
        try:
            self._lock = (self.path / _LOCK).open("a+")
        except OSError as error:
            raise UserError(f"{where}: cannot be written to ({error.strerror})") from None
        try:
            self._take_lock(self._lock, where)
            manifest = check_manifest(self.path, where)
            if not manifest:
                raise UserError(f"{where}: incomplete: {MANIFEST_FILENAME} is missing; start a new run")
        except BaseException:
            self.release()
            raise
        self.key = str(manifest.get("run"))
        remove_partial_directories(self.path)

    @staticmethod
    def _take_lock(lock: IO[str], where: str) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise UserError(f"{where}: {owner} is writing to this run; wait for it, or stop it") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}")
        lock.flush()

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def open_log(self) -> None:
        """Writes the log into run.log: the lines since the start of the script, and all later ones."""
        open_run_log(self.path / _LOG)

    def keep_metrics_up_to(self, step: int) -> None:
        """Deletes the metrics of `step` and later steps, which a resumed run repeats, and a line that was cut off."""
        for name in (METRICS_FILENAME, HELD_OUT_METRICS_FILENAME):
            path = self.path / name
            with suppress(OSError):
                kept = [line for line in path.read_text().splitlines() if _step_of(line) < step]
                path.write_text("".join(f"{line}\n" for line in kept))

    def record_metrics(self, step: int, values: dict[str, Any], name: str = METRICS_FILENAME) -> None:
        """Adds a line to metrics.jsonl, or to the file `name`. On a full disk the line is lost."""
        with suppress(OSError), (self.path / name).open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")

    def text(self) -> TextSource:
        """Returns the text that `create` was given. Its documents cannot be read again; `array` has their tokens."""
        return TextSource(**json.loads((self.path / _TEXT).read_text()), read=tuple)

    def array(self, name: str) -> np.ndarray | None:
        """Returns an array that `create` was given, memory-mapped; None if it was given none of this name."""
        path = self.path / name
        return np.load(path, mmap_mode="r") if path.exists() else None

    def initialized_from(self) -> dict[str, dict[str, Any]]:
        """Returns for each hook what the SAE is that the run began with; empty for random weights."""
        path = self.path / _INITIALIZED_FROM
        return json.loads(path.read_text()) if path.exists() else {}

    @property
    def is_finished(self) -> bool:
        return any(self.path.glob("final_*"))

    def checkpoints(self) -> list[Path]:
        """Returns the checkpoints, without the finished SAE; the one with the most tokens is first."""
        found = [path for path in self.path.iterdir() if path.name.isdigit() and path.is_dir()]
        return sorted(found, key=lambda path: int(path.name), reverse=True)

    def check_checkpoint(self, checkpoint: Path) -> dict[str, Any]:
        """Checks that a checkpoint belongs to this run and that no byte of it has changed, and returns its manifest.

        Raises:
            UserError: the checkpoint belongs to another run, or is damaged.
        """
        where = f"--resume {checkpoint}"
        manifest = check_manifest(checkpoint, where)
        if not manifest:
            raise UserError(f"{where}: incomplete: {MANIFEST_FILENAME} is missing; --resume {self.path} uses another")
        if manifest.get("run") != self.key:
            raise UserError(f"{where}: belongs to another run; --resume {self.path} uses one of this run")
        return manifest

    def newest_checkpoint(self) -> Path | None:
        """Returns the checkpoint with the most tokens. Damaged checkpoints are skipped with a warning."""
        for checkpoint in self.checkpoints():
            try:
                self.check_checkpoint(checkpoint)
            except UserError as error:
                log.warning("%s; trying the one before it", error)
            else:
                return checkpoint
        return None

    def keep_newest(self, n: int) -> None:
        """Deletes the checkpoints to resume from, except for the newest n. Those of `--n_checkpoints` all stay."""
        for_resuming = [c for c in self.checkpoints() if not _is_milestone(c)]
        for checkpoint in for_resuming[n:]:
            shutil.rmtree(checkpoint, ignore_errors=True)


def find_resumption(resume: str | None, output_directory: Path) -> tuple[RunDirectory, Path | None] | None:
    """Finds the run that `--resume` asks for and claims its directory.

    Args:
        resume: value of the flag.
        output_directory: directory of the runs with the same settings, where `auto` looks.

    Returns:
        The directory, and the checkpoint to go on from; without a checkpoint, the run begins at the first step. None
        if the flag is not given, or is `auto` and there is no unfinished run.

    Raises:
        UserError: the run is finished or damaged, or another process has claimed it.
    """
    if resume is None:
        return None
    if resume == "auto":
        unfinished = sorted(_unfinished_runs(output_directory), key=_progress, reverse=True)
        if not unfinished:
            log.info("no unfinished run with these flags in %s; beginning a new one", output_directory)
            return None
        directory = unfinished[0]
    else:
        directory = RunDirectory(run_directory_of(Path(resume)))
    if directory.is_finished:
        raise UserError(f"--resume {resume}: this run is finished; its SAE is {next(directory.path.glob('final_*'))}")
    directory.claim()
    try:
        if resume == "auto" or directory.path == Path(resume):
            return directory, directory.newest_checkpoint()
        directory.check_checkpoint(Path(resume))
        return directory, Path(resume)
    except BaseException:
        directory.release()
        raise


def find_run_directory(sae_path: Path) -> Path | None:
    """Returns the directory of the run that wrote an SAE; None if no run of this project wrote it."""
    above = sae_path.absolute().parents[:2]  # the SAEs of a run with several hooks are one level deeper
    return next((parent for parent in above if (parent / FLAGS_FILENAME).is_file()), None)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _unfinished_runs(directory: Path) -> Iterator[RunDirectory]:
    for path in directory.glob("[!.]*"):  # a name with a dot is incomplete: the run was killed while creating it
        if (path / FLAGS_FILENAME).is_file() and not RunDirectory(path).is_finished:
            yield RunDirectory(path)


def _progress(run: RunDirectory) -> tuple[int, float]:
    newest = next(iter(run.checkpoints()), None)
    return int(newest.name) if newest else 0, run.path.stat().st_mtime


def _is_milestone(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / MANIFEST_FILENAME).read_text())["milestone"])
    except (OSError, ValueError, KeyError, TypeError):
        return True  # not a checkpoint that this project wrote, so not one to delete
