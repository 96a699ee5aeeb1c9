"""The record of a run in wandb: online, or offline if there is no login or no connection."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import wandb
import xxhash

from sae_toolkit.errors import one_line
from sae_toolkit.training.record.run_record import RunRecord

log = logging.getLogger(__name__)

# Switches off wandb's reports of its own errors. At the end of a process they wait half a minute for a host that
# does not answer.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")

# Most seconds that a run waits for wandb at its start and at its end. wandb's own limits are 90 seconds at the start
# and none at the end. In between, wandb's process retries in the background. WANDB_INIT_TIMEOUT and
# WANDB_FINISH_TIMEOUT set other limits.
_LIMITS = {"init_timeout": 20.0, "finish_timeout": 60.0}


class WandbRun(RunRecord):
    """Records a run in wandb.

    Args:
        mode: `online`, `offline` or `disabled`. `online` becomes `offline` if there is no login or no connection, and
            with `disabled` nothing is recorded.
        run_id: id of the wandb run; the same id continues the same run.
        uses: inputs of the run, by kind. Each becomes an artifact that the run uses. Offline, wandb does not
            allow that, and the inputs are only in the configuration and in the artifact of the SAE.
    """

    service = "wandb"

    def __init__(
        self,
        mode: str,
        *,
        run_id: str,
        project: str,
        entity: str | None,
        name: str | None = None,
        job_type: str | None = None,
        config: dict[str, Any] | None = None,
        uses: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.run: wandb.Run | None = None
        self.uses = uses or {}
        self._artifacts: threading.Thread | None = None  # sends artifacts to a host that may not answer
        self._artifact_error: str | None = None
        if mode == "disabled":
            return
        limits: dict[str, Any] = {
            name: value for name, value in _LIMITS.items() if f"WANDB_{name.upper()}" not in os.environ
        }
        settings = wandb.Settings(silent=True, finish_timeout_raises=True, **limits)

        def start(mode: str) -> wandb.Run:
            return wandb.init(
                mode=mode,  # type: ignore[arg-type]
                id=run_id,
                resume="allow" if mode == "online" else None,
                project=project,
                entity=entity,
                name=name,
                job_type=job_type,
                config=config,
                settings=settings,
            )

        reason = None
        if mode == "online":
            try:
                if wandb.login(prompt=False):
                    self.run = start("online")
                    self._in_background(self._use)
                    return
                log.info("wandb: no login (`wandb login`), so the run is recorded offline, under ./wandb")
            except Exception as error:  # of wandb or of its process
                reason = one_line(error)
        self._safely(lambda: setattr(self, "run", start("offline")))
        if reason and self.run is not None:
            log.warning("wandb: %s; the run is recorded offline; `wandb sync %s` uploads it", reason, self._directory)

    @property
    def _directory(self) -> Path:
        assert self.run is not None
        return Path(self.run.dir).parent

    def _use(self) -> None:
        assert self.run is not None
        for kind, metadata in self.uses.items():
            name = _name(f"{kind}_{_digest(metadata)}")
            self.run.use_artifact(wandb.Artifact(name, kind, metadata=dict(metadata)))

    def log(self, values: dict[str, Any], step: int) -> None:
        self._safely(lambda: self.run and self.run.log(values, step=step))

    def log_histogram(self, name: str, values: np.ndarray, step: int) -> None:
        counts, edges = np.histogram(values, bins=64)
        self.log({name: wandb.Histogram(np_histogram=(counts, edges))}, step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        self._safely(lambda: self.run and self.run.summary.update({name: table}))

    def summarize(self, values: dict[str, Any]) -> None:
        self._safely(lambda: self.run and self.run.summary.update(values))

    def save_sae(self, directory: Path, metadata: dict[str, Any], *, with_weights: bool) -> None:
        def save() -> None:
            if self.run is not None:
                artifact = wandb.Artifact(_name(f"sae_{self.run.name}"), "model", metadata=metadata | dict(self.uses))
                if with_weights:
                    artifact.add_dir(str(directory))
                else:
                    for file in sorted(directory.rglob("*.json")):
                        artifact.add_file(str(file), str(file.relative_to(directory)))
                    artifact.add_reference(directory.absolute().as_uri(), "files", checksum=False)
                self.run.log_artifact(artifact)

        if self._artifacts is None:
            self._safely(save)
        else:
            self._in_background(save)

    def _in_background(self, action: Callable[[], None]) -> None:
        """Calls `action`, which waits for the host, in a thread, after the earlier actions have ended."""
        before = self._artifacts

        def work() -> None:
            if before is not None:
                before.join()
            try:
                action()
            except Exception as error:
                self._artifact_error = one_line(error)

        self._artifacts = threading.Thread(target=work, daemon=True)
        self._artifacts.start()

    def finish(self) -> None:
        """Waits until the record is uploaded, up to a time limit, or until a signal comes."""
        if self.run is None:
            return
        try:
            if self._artifacts is not None:
                self._artifacts.join(_LIMITS["init_timeout"])
            self.run.finish()
            if self._artifact_error:
                log.warning("wandb: %s; the run's artifacts may be missing from its record", self._artifact_error)
        except Exception as error:  # a TimeoutError if the host does not answer; others may be from earlier calls
            what = "record is whole" if isinstance(error, TimeoutError) else "record up to then is"
            log.warning("wandb: %s; the %s on disk: `wandb sync %s` uploads it", one_line(error), what, self._directory)
        except BaseException:
            for process in psutil.Process().children():
                if "wandb" in process.name():  # otherwise this process would wait for it before it exits
                    process.kill()
            with suppress(Exception):
                wandb.teardown()
            raise


def _name(text: str) -> str:
    """Returns a text with `_` for each character that the name of an artifact must not have."""
    return re.sub(r"[^\w.-]", "_", text)


def _digest(metadata: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(metadata, sort_keys=True).encode())
