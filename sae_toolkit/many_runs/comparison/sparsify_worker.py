"""Trains one SAE with sparsify's own Trainer, on activations that it is given.

It imports nothing of this project, and reads activations from its standard input:

    python sae_toolkit/many_runs/comparison/sparsify_worker.py JOB.json < activations

The activations are float32 batches [batch, d_in]. JOB.json holds:

    batch, d_in, steps   the shape and the number of the batches
    hookpoint            the name that sparsify gives to the place of the activations, such as `layers.12`
    device               where to train
    sae, training        arguments of sparsify's SaeConfig and TrainConfig
    directory            where the SAE goes, as sae/HOOKPOINT. This script adds trained.json, with the learning rate
                         `lr` and `peak_bytes` of GPU memory, null on a CPU
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "0" if torch.cuda.is_available() else "1")


class ReadActivations(nn.Module):
    """Stands where sparsify has a language model: each pass puts the next batch of standard input out at the hookpoint.

    sparsify's Trainer trains in a hook there, and takes nothing else from a pass.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__()
        self.device = torch.device(job["device"])
        self.shape = (job["batch"], job["d_in"])
        # The Trainer runs the model on these to find the width of what the hook gets.
        self.dummy_inputs = {"input_ids": None, "acts_1BD": torch.zeros(1, *self.shape)}
        self.hookpoint = job["hookpoint"]
        *parents, last = self.hookpoint.split(".")
        parent: nn.Module = self
        for name in parents:
            parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, nn.Identity())

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: torch.Tensor | None, acts_1BD: torch.Tensor | None = None) -> None:
        self.get_submodule(self.hookpoint)(self._next() if acts_1BD is None else acts_1BD)

    def _next(self) -> torch.Tensor:
        wanted = 4 * self.shape[0] * self.shape[1]
        if len(read := sys.stdin.buffer.read(wanted)) < wanted:
            sys.exit("error: the activations ended too early")
        return torch.from_numpy(np.frombuffer(read, np.float32).reshape(1, *self.shape).copy()).to(self.device)


class Sequences(Dataset):
    """A sequence of tokens for each batch. All tokens are 0: sparsify only looks which of them to leave out."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.n_sequences = job["steps"]
        self.item = {"input_ids": torch.zeros(job["batch"], dtype=torch.long)}

    def __len__(self) -> int:
        return self.n_sequences

    def __getitem__(self, _: int) -> dict[str, torch.Tensor]:
        return self.item


def main(job: dict[str, Any]) -> None:
    from sparsify import SaeConfig, TrainConfig, Trainer

    directory = Path(job["directory"])
    config = TrainConfig(
        SaeConfig(**job["sae"]),
        batch_size=1,
        hookpoints=[job["hookpoint"]],
        save_dir=str(directory),
        run_name="sae",
        save_every=10**9,
        log_to_wandb=False,
        **job["training"],
    )
    trainer = Trainer(config, Sequences(job), ReadActivations(job))
    lr = trainer.optimizers[0].param_groups[0]["lr"]
    trainer.fit()
    peak = torch.cuda.max_memory_allocated() if torch.device(job["device"]).type == "cuda" else None
    (directory / "trained.json").write_text(json.dumps({"lr": lr, "peak_bytes": peak}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
