"""Trains one SAE of each kind with dictionary_learning itself and writes down what it computes with them.

It runs in an environment of its own (requirements/dictionary-learning.txt) and imports nothing of this project:
    python tests/support/write_dictionary_learning_saes.py OUT_DIR ACTS.npy

ACTS.npy holds float32 activations [N, D]. For each kind, OUT_DIR/<kind>/trainer_0 gets `ae.pt` and `config.json`, which
the library writes, and beside them
    expected.safetensors   features [64, F] and reconstruction [64, D] of the first 64 activations
    evaluation.json        the library's `evaluation.evaluate` on all activations, in one batch
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from dictionary_learning.evaluation import evaluate
from dictionary_learning.trainers import (
    BatchTopKTrainer,
    GatedSAETrainer,
    JumpReluTrainer,
    StandardTrainer,
    TopKTrainer,
)
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
from dictionary_learning.training import trainSAE
from dictionary_learning.utils import load_dictionary
from safetensors.torch import save_file

STEPS = 60
BATCH = 256
K = 8
EXPECTED_ROWS = 64

# Their default schedules are for many thousand steps.
SPARSITY = {"lr": 1e-3, "warmup_steps": 5, "sparsity_warmup_steps": 5}
TOP_K = {"k": K, "lr": 1e-3, "warmup_steps": 5, "threshold_start_step": 10}
TRAINERS = {
    "standard": {"trainer": StandardTrainer, **SPARSITY},
    "standard_april": {"trainer": StandardTrainerAprilUpdate, **SPARSITY},  # its decoder's norms are not 1
    "gated": {"trainer": GatedSAETrainer, **SPARSITY},
    "jumprelu": {"trainer": JumpReluTrainer, **SPARSITY},
    "topk": {"trainer": TopKTrainer, **TOP_K},
    "batchtopk": {"trainer": BatchTopKTrainer, **TOP_K},
    "batchtopk_no_threshold": {"trainer": BatchTopKTrainer, **TOP_K, "threshold_start_step": STEPS},
    "matryoshka": {"trainer": MatryoshkaBatchTopKTrainer, **TOP_K, "group_fractions": [0.25, 0.25, 0.5]},
}


class Activations:
    """Batches [BATCH, D] drawn from the activations, with the `config` that `trainSAE` saves of a buffer."""

    config = {"io": "out", "ctx_len": 64}  # noqa: RUF012

    def __init__(self, acts_ND: torch.Tensor) -> None:
        self.acts_ND = acts_ND

    def __iter__(self) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield self.acts_ND[torch.randint(len(self.acts_ND), (BATCH,), generator=generator)]


def main(out_dir: Path, acts_file: Path) -> None:
    acts_ND = torch.from_numpy(np.load(acts_file))
    d_in = acts_ND.shape[1]
    for kind, trainer_config in TRAINERS.items():
        torch.manual_seed(0)
        trainSAE(
            Activations(acts_ND),
            [
                {
                    "steps": STEPS,
                    "activation_dim": d_in,
                    "dict_size": 4 * d_in,
                    "layer": 1,
                    "lm_name": "owner/model",
                    "submodule_name": "resid_post_layer_1",
                    "seed": 0,
                    "device": "cpu",
                    **trainer_config,
                }
            ],
            steps=STEPS,
            save_dir=str(out_dir / kind),
            normalize_activations=kind == "batchtopk",
            device="cpu",
        )
        directory = out_dir / kind / "trainer_0"
        dictionary, _ = load_dictionary(str(directory), "cpu")
        with torch.no_grad():
            features = dictionary.encode(acts_ND[:EXPECTED_ROWS])
            expected = {"features": features, "reconstruction": dictionary.decode(features)}
            scores = evaluate(dictionary, iter([acts_ND]), device="cpu")
        save_file({name: tensor.contiguous() for name, tensor in expected.items()}, directory / "expected.safetensors")
        (directory / "evaluation.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
