"""A run's record in wandb: online, offline where there is no login, or none."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import wandb

from sae_toolkit.training_flags import FLAGS_FILENAME

log = logging.getLogger(__name__)


class WandbRun:
    """One wandb run. With mode `disabled` every method does nothing.

    Args:
        mode: `online`, `offline` or `disabled`; `online` becomes `offline` where there is no login.
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
        if mode == "disabled":
            return
        if mode == "online" and not wandb.login(prompt=False):
            log.info("wandb: no login (`wandb login`), so the run is recorded offline, under ./wandb")
            mode = "offline"
        self.run = wandb.init(
            mode=mode,  # type: ignore[arg-type]
            id=run_id,
            resume="allow" if mode == "online" else None,
            project=project,
            entity=entity,
            name=name,
            config=config,
            settings=wandb.Settings(silent=True),
        )

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.run is not None:
            self.run.log(values, step=step)

    def summarize(self, values: dict[str, Any]) -> None:
        """Sets values of the run's summary, which is what a table of runs shows."""
        if self.run is not None:
            self.run.summary.update(values)

    def save_sae(self, directory: Path) -> None:
        """Records an SAE's directory as an artifact of type `model`."""
        if self.run is not None:
            artifact = wandb.Artifact(re.sub(r"[^\w.-]", "_", f"sae_{self.run.name}"), type="model")
            artifact.add_dir(str(directory))
            self.run.log_artifact(artifact)

    def finish(self) -> None:
        if self.run is not None:
            self.run.finish()


def training_wandb_run(sae_path: Path) -> WandbRun:
    """The wandb run of the training that wrote an SAE, to go on recording into; disabled where it had none."""
    path = sae_path.absolute().parent / FLAGS_FILENAME
    flags = json.loads(path.read_text()) if path.is_file() else {"wandb_mode": "disabled"}
    return WandbRun(
        flags["wandb_mode"],
        run_id=path.parent.name,
        project=flags.get("wandb_project", ""),
        entity=flags.get("wandb_entity"),
    )
