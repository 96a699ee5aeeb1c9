"""Part b of gpu.py: whole training steps on random activations, their memory, and where they wait for the device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_device import Bench, Table, shown
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.registry import get_sae_training_class
from train_job import llama_config

from sae_toolkit.model.loading import ModelSource
from sae_toolkit.steps.memory import plan_memory
from sae_toolkit.steps.trainer import Trainer
from sae_toolkit.training.run import create_sae

_DEAD_SHARES = (0.0, 0.02, 0.1, 0.5, 1.0)
_UNTIMED = 6  # steps; the trainer uses the number of dead features of four steps ago


def time_steps(bench: Bench) -> None:
    """Prints a row for each kind of SAE, number of features and share of dead features.

    The peak is what torch allocates in the steps, the batch included. The plan is what `--dry_run` says of them: the
    SAE, its gradients, Adam's moments and the step. It is for a step in which all features are dead.
    """
    table = Table("SAE", "features", "dead", "ms", "us a token", "peak, GiB", "planned, GiB", "off by", "waits a step")
    for architecture in ("topk", "batchtopk"):
        for d_sae in bench.widths:
            bench.free()
            _time_sae(bench, table, architecture, d_sae)


def _time_sae(bench: Bench, table: Table, architecture: str, d_sae: int) -> None:
    cfg = _configuration(bench, architecture, d_sae)
    trainer = Trainer(cfg.to_sae_trainer_config(), create_sae(cfg), iter(()))
    trainer.products_in_bfloat16 = bench.on_cuda  # as the training does where the language model is in bfloat16
    batch = torch.randn(bench.size["batch"], bench.size["d_in"], device=bench.device)
    planned = _planned_gib(bench, cfg)
    for share in _DEAD_SHARES:
        n_dead = int(share * d_sae)

        def step(n_dead: int = n_dead) -> None:
            trainer.n_forward_passes_since_fired[:n_dead] = 10**6
            trainer.step(batch)
            trainer.n_training_steps += 1

        trainer.n_forward_passes_since_fired.zero_()
        bench.free()
        ms = bench.milliseconds(step, 8, _UNTIMED)
        peak = bench.peak_gib()
        off = None if peak is None or share < 1 else planned / peak - 1
        if off is not None:
            bench.found["step plan off"] = max(bench.found.get("step plan off", 0.0), abs(off))
        us = ms / len(batch) * 1e3
        waits = _waits(bench, step)
        table.row(
            *(architecture, f"{d_sae:,}", f"{share:.0%}", f"{ms:.2f}", f"{us:.2f}"),
            *(shown(peak), shown(planned), shown(off, "+.0%"), waits),
        )


def _configuration(bench: Bench, architecture: str, d_sae: int) -> LanguageModelSAERunnerConfig[Any]:
    _, config_class = get_sae_training_class(architecture)
    size = bench.size
    return LanguageModelSAERunnerConfig(
        sae=config_class(d_in=size["d_in"], d_sae=d_sae, k=size["k"], device=bench.device),
        context_size=size["context"],
        train_batch_size_tokens=size["batch"],
        training_tokens=10**9,
        device=bench.device,
        dead_feature_window=1000,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )


def _planned_gib(bench: Bench, cfg: LanguageModelSAERunnerConfig[Any]) -> float:
    model = ModelSource("no model", llama_config(bench.size), {})
    plan = plan_memory(cfg, model, torch.bfloat16, n_parameters=(0, 0), cached=True)
    return (plan.sae + plan.gradients + plan.adam + plan.step) / 2**30


def _waits(bench: Bench, step: Callable[[], None]) -> str:
    """Returns how often a step waits for the device, with the places in the code; on a CPU there is nothing to say."""
    if not bench.on_cuda:
        return "not on a CPU"
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{Path(each.filename).name}:{each.lineno}" for each in found if "synchron" in str(each.message))
    return "; ".join(f"{n} at {place}" for place, n in places.items()) or "0"
