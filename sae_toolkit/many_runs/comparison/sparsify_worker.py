"""Trains one SAE with sparsify's own Trainer, which runs the language model itself.

    python -m sae_toolkit.many_runs.comparison.sparsify_worker JOB.json

JOB.json holds:

    model_name, model_kwargs, trust_remote_code, lm_dtype, device   the language model
    hook_name, hookpoint   where the SAE is trained, by this project's name and by sparsify's
    rows                   a .npy file of token ids [N, T] in the order of training
    sae, training          arguments of sparsify's SaeConfig and TrainConfig
    directory              where the SAE goes, as sae/HOOKPOINT. The other files there are trained.json, with the
                           learning rate `lr` and `peak_bytes` of GPU memory (null on a CPU), and `steps`, the number
                           of steps so far
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sae_lens.util import str_to_dtype
from torch.optim.optimizer import register_optimizer_step_post_hook

from sae_toolkit.model.loading import find_model, load_language_model

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "0" if torch.cuda.is_available() else "1")


def main(job: dict[str, Any]) -> None:
    from sparsify import SaeConfig, TrainConfig, Trainer

    directory = Path(job["directory"])
    source = find_model(job["model_name"], job["model_kwargs"], trust_remote_code=job["trust_remote_code"])
    model = load_language_model(source, job["hook_name"], job["device"], str_to_dtype(job["lm_dtype"]))
    rows_NT = np.load(job["rows"]).astype(np.int64)
    dataset = Dataset.from_dict({"input_ids": list(rows_NT)}).with_format("torch")
    n_steps = 0

    def count(*_: Any) -> None:
        nonlocal n_steps
        n_steps += 1
        (directory / "steps").write_text(str(n_steps))

    register_optimizer_step_post_hook(count)
    config = TrainConfig(
        SaeConfig(**job["sae"]),
        hookpoints=[job["hookpoint"]],
        save_dir=str(directory),
        run_name="sae",
        save_every=10**9,
        log_to_wandb=False,
        **job["training"],
    )
    # Like sparsify's own command, this leaves out the head, because the Trainer does not use the logits.
    trainer = Trainer(config, dataset, model.model.base_model)
    lr = trainer.optimizers[0].param_groups[0]["lr"]
    trainer.fit()
    peak = torch.cuda.max_memory_allocated() if torch.device(job["device"]).type == "cuda" else None
    (directory / "trained.json").write_text(json.dumps({"lr": lr, "peak_bytes": peak}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
