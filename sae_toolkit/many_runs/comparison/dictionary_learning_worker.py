"""Trains one SAE with dictionary_learning's own trainer, in the library's own environment.

It imports nothing of this project, and reads activations from its standard input:

    python sae_toolkit/many_runs/comparison/dictionary_learning_worker.py JOB.json < activations

JOB.json: `trainer` (a name in TRAINERS), `arguments` of it, `batch` and `d_in` of the activations, `norm_batches` that
come first, for the library's estimate of their norm, `steps` batches after them, and `directory`, which gets the
library's trainer_0/ae.pt and trainer_0/config.json, and trained.json: `l0` over the last batches of the training and
`peak_bytes` on a GPU.
"""

import json
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dictionary_learning.trainers import (
    BatchTopKTrainer,
    GatedSAETrainer,
    JumpReluTrainer,
    PAnnealTrainer,
    StandardTrainer,
    TopKTrainer,
)
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary

TRAINERS = {
    "standard": StandardTrainer,
    "topk": TopKTrainer,
    "batchtopk": BatchTopKTrainer,
    "jumprelu": JumpReluTrainer,
    "gated": GatedSAETrainer,
    "matryoshka": MatryoshkaBatchTopKTrainer,
    "p_anneal": PAnnealTrainer,
}
_LAST = 10  # batches on which L0 is measured


class Activations:
    """Batches [batch, d_in] in float32 from standard input: the first pass over it takes those for the norm."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.config = {"io": "out", "ctx_len": job["context_size"]}  # which the library saves
        self.shape = (job["batch"], job["d_in"])
        self.passes = [job["norm_batches"], job["steps"]]
        self.last: deque[torch.Tensor] = deque(maxlen=_LAST)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(self.passes.pop(0)):
            wanted = 4 * self.shape[0] * self.shape[1]
            if len(read := sys.stdin.buffer.read(wanted)) < wanted:
                sys.exit("error: the activations ended too early")
            batch = np.frombuffer(read, np.float32)
            acts = torch.from_numpy(batch.reshape(self.shape).copy())
            self.last.append(acts.clone())  # the library scales what it is given
            yield acts


def main(job: dict[str, Any]) -> None:
    directory, device = Path(job["directory"]), job["arguments"]["device"]
    torch.manual_seed(job["arguments"]["seed"])
    activations = Activations(job)
    trainSAE(
        activations,
        [{"trainer": TRAINERS[job["trainer"]], "steps": job["steps"], "layer": job["layer"], **job["arguments"]}],
        steps=job["steps"],
        save_dir=str(directory),
        normalize_activations=True,
        device=device,
    )
    dictionary, _ = load_dictionary(str(directory / "trainer_0"), device)
    with torch.no_grad():
        l0s = [(dictionary.encode(acts.to(device)) > 0).sum(1).double().mean().item() for acts in activations.last]
    peak = torch.cuda.max_memory_allocated() if device != "cpu" else None
    (directory / "trained.json").write_text(json.dumps({"l0": sum(l0s) / len(l0s), "peak_bytes": peak}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
