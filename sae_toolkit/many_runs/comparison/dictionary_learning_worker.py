"""Trains one SAE with dictionary_learning's own trainer, in the library's own environment.

It imports nothing of this project, and reads activations from its standard input:

    python sae_toolkit/many_runs/comparison/dictionary_learning_worker.py JOB.json < activations

The activations are float32 batches [batch, d_in]: first `norm_batches`, from which the library estimates their norm,
then `steps` to train on. JOB.json holds these numbers, and:

    trainer       a name in TRAINERS
    arguments     the arguments of that trainer
    layer         the layer of the hook, which the library records
    context_size  the tokens in a context, which the library records
    directory     where the library writes trainer_0/ae.pt and trainer_0/config.json. This script adds trained.json,
                  with `l0` on the last batches, and `peak_bytes` of GPU memory, null on a CPU
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
_L0_BATCHES = 10  # the last batches of the training, on which L0 is measured


class Activations:
    """Batches [batch, d_in] in float32 from standard input: first those for the norm, then those to train on."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.config = {"io": "out", "ctx_len": job["context_size"]}  # trainSAE saves it
        self.shape = (job["batch"], job["d_in"])
        self.passes = [job["norm_batches"], job["steps"]]
        self.last: deque[torch.Tensor] = deque(maxlen=_L0_BATCHES)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(self.passes.pop(0)):
            wanted = 4 * self.shape[0] * self.shape[1]
            if len(read := sys.stdin.buffer.read(wanted)) < wanted:
                sys.exit("error: the activations ended too early")
            batch = np.frombuffer(read, np.float32)
            acts = torch.from_numpy(batch.reshape(self.shape).copy())
            self.last.append(acts.clone())  # trainSAE scales `acts` in place
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
