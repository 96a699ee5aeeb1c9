"""A run's record in wandb: online, offline where there is no login or no connection, or none."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import wandb

from sae_toolkit.errors import one_line
from sae_toolkit.training_flags import FLAGS_FILENAME

log = logging.getLogger(__name__)

# Seconds that wandb may keep a run waiting at its start and at its end (by default 90, and for ever). Between them its
# own process retries in the background. WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT choose others.
_LIMITS = {"init_timeout": 20.0, "finish_timeout": 60.0}


class WandbRun:
    """One wandb run. With mode `disabled` every method does nothing; nothing that wandb raises ends the caller's run.

    Args:
        mode: `online`, `offline` or `disabled`; `online` becomes `offline` where there is no login or no connection.
        run_id: the same id continues the same run.
    """

    def __init__(
        self,
        mode: str,
        *,
        run_id: str,
        project: str,
        entity: str | None,
        name: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.run: wandb.Run | None = None
        self._has_warned = False
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
                config=config,
                settings=settings,
            )

        reason = None
        if mode == "online":
            try:
                if wandb.login(prompt=False):
                    self.run = start("online")
                    return
                log.info("wandb: no login (`wandb login`), so the run is recorded offline, under ./wandb")
            except Exception as error:  # wandb's, and those of its process
                reason = one_line(error)
        self._safely(lambda: setattr(self, "run", start("offline")))
        if reason and self.run is not None:
            log.warning("wandb: %s; the run is recorded offline; `wandb sync %s` uploads it", reason, self._directory)

    @property
    def _directory(self) -> Path:
        assert self.run is not None
        return Path(self.run.dir).parent

    def log(self, values: dict[str, Any], step: int) -> None:
        self._safely(lambda: self.run and self.run.log(values, step=step))

    def summarize(self, values: dict[str, Any]) -> None:
        """Sets values of the run's summary, which is what a table of runs shows."""
        self._safely(lambda: self.run and self.run.summary.update(values))

    def save_sae(self, directory: Path) -> None:
        """Records an SAE's directory as an artifact of type `model`."""

        def save() -> None:
            if self.run is not None:
                artifact = wandb.Artifact(re.sub(r"[^\w.-]", "_", f"sae_{self.run.name}"), type="model")
                artifact.add_dir(str(directory))
                self.run.log_artifact(artifact)

        self._safely(save)

    def finish(self) -> None:
        """Waits for the record to be uploaded; not for ever."""
        if self.run is None:
            return
        try:
            self.run.finish()
        except Exception as error:  # a host that is away ends in a TimeoutError; anything else may have come earlier
            what = "record is whole" if isinstance(error, TimeoutError) else "record up to then is"
            log.warning("wandb: %s; the %s on disk: `wandb sync %s` uploads it", one_line(error), what, self._directory)

    def _safely(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            if not self._has_warned:
                log.warning("wandb: %s; the run goes on, and its record may be incomplete", one_line(error))
            self._has_warned = True


def training_wandb_run(sae_path: Path) -> WandbRun:
    """The wandb run of the training that wrote an SAE, to go on recording into; disabled where it had none."""
    above = sae_path.absolute().parents[:2]  # one of several hooks lies a step deeper
    path = next((found for parent in above if (found := parent / FLAGS_FILENAME).is_file()), above[0] / FLAGS_FILENAME)
    try:
        flags = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):  # not there, or not ours
        flags = {}
    return WandbRun(
        flags.get("wandb_mode", "disabled"),
        run_id=path.parent.name,
        project=flags.get("wandb_project", ""),
        entity=flags.get("wandb_entity"),
    )
