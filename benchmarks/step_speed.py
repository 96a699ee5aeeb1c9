#!/usr/bin/env python
"""Times a training step of this project against SAELens's own, by width and k, to find where sparse products pay.

    python benchmarks/step_speed.py                                         # this machine's CPU, some minutes
    python benchmarks/step_speed.py --device cuda --d_in 4096 --batch 4096 --d_sae 32768 131072

Activations and weights are random, since only shapes matter. Both steps, optimizer included, are timed in turn on
equal SAEs. The sparse step is faster where the number of features for each active one is above the crossover.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, SAETrainer, TrainingSAE
from sae_lens.registry import get_sae_training_class

from sae_toolkit.steps import sparse_topk
from sae_toolkit.steps.trainer import Trainer


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--d_in", type=int, default=576)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--d_sae", type=int, nargs="+", default=[2304, 4608, 18432])
    parser.add_argument("--ratio", type=int, nargs="+", default=[4, 8, 16, 32, 72], help="features per active one")
    parser.add_argument("--architecture", nargs="+", default=["topk", "batchtopk"], choices=("topk", "batchtopk"))
    parser.add_argument("--autocast", action="store_true", help="SAELens's step in bfloat16 autocast")
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


def trainers(flags: argparse.Namespace, architecture: str, d_sae: int, k: int) -> list[SAETrainer[Any, Any]]:
    _, config_class = get_sae_training_class(architecture)
    sae_class = {"topk": sparse_topk.SparseTopKTrainingSAE, "batchtopk": sparse_topk.SparseBatchTopKTrainingSAE}
    cfg = LanguageModelSAERunnerConfig(
        sae=config_class(d_in=flags.d_in, d_sae=d_sae, k=k, device=flags.device),
        train_batch_size_tokens=flags.batch,
        training_tokens=10**9,
        device=flags.device,
        autocast=flags.autocast,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    theirs = TrainingSAE.from_dict(cfg.get_training_sae_cfg_dict())
    ours = sae_class[architecture](copy.deepcopy(theirs.cfg))
    ours.load_state_dict(theirs.state_dict())
    trainer_cfg = cfg.to_sae_trainer_config()
    our_cfg = copy.copy(trainer_cfg)
    our_cfg.autocast = False
    return [SAETrainer(trainer_cfg, theirs, iter(())), Trainer(our_cfg, ours, iter(()))]


def seconds(trainer: SAETrainer[Any, Any], batch: torch.Tensor) -> float:
    start = time.perf_counter()
    trainer.step(batch)
    if batch.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    flags = parse_flags()
    if flags.device != "cpu":
        torch.set_float32_matmul_precision("high")
    where = torch.cuda.get_device_name() if flags.device != "cpu" else f"{os.cpu_count()} cores"
    print(f"{datetime.now(UTC):%Y-%m-%d}, {where}, torch {torch.__version__}, batch {flags.batch}, d_in {flags.d_in}\n")
    print("| | features | k | features / k | SAELens, ms | this project, ms | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    batch = torch.randn(flags.batch, flags.d_in, device=flags.device)
    for architecture in flags.architecture:
        for d_sae in flags.d_sae:
            for ratio in flags.ratio:
                k = d_sae // ratio
                pair = trainers(flags, architecture, d_sae, k)
                times = [[seconds(trainer, batch) for trainer in pair] for _ in range(flags.repeats + 6)][6:]
                theirs, ours = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
                print(
                    f"| {architecture} | {d_sae:,} | {k} | {ratio} | {theirs:.0f} | {ours:.0f} | {theirs / ours:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
