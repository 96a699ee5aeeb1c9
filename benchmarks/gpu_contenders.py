"""Part e of gpu.py: training by this project, stock SAELens and sparsify, beside one another, at 131,072 features.

All read the first thirteen layers of the saved model and the same rows of random tokens, as in train_speed.py.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from gpu_device import Bench, Table, shown
from gpu_model import save_model
from train_contenders import CONTENDERS
from train_job import llama_config, n_rows, random_rows, save_rows
from train_speed import ContenderFailed, measure

_TRAINED = ("this", "saelens", "saelens_fast", "sparsify_signum")


def time_contenders(bench: Bench, job: str, warm_up: int, steps: int) -> None:
    """Prints the speed and the peak memory of each contender, and how many times as fast this project is.

    Args:
        bench: the run.
        job: name of the job in `train_job.JOBS`.
        warm_up: steps before the timed ones.
        steps: timed steps. This project fills its buffer every 16 steps, so they are a multiple of 16.
    """
    save_model(bench)
    bench.free()
    flags = argparse.Namespace(device=bench.device, job=job, warm_up=warm_up, steps=steps, profile=False)
    directory = bench.work_dir / "contenders"
    if not directory.exists():
        _link_lower_layers(bench, directory / "model")
        save_rows(random_rows(bench.size, n_rows(flags)), directory)
    table = Table("trained by", "tokens/s", "us a token", "peak, GiB", "this project is faster by")
    failures = []
    for name in _TRAINED:
        if name.startswith("sparsify") and importlib.util.find_spec("sparsify") is None:
            table.row(CONTENDERS[name], "not installed (pip install eai-sparsify -c constraints.txt)", "", "", "")
            continue
        try:
            result = measure(flags, name, directory)
        except ContenderFailed as failed:
            table.row(CONTENDERS[name], "failed", "", "", "")
            failures.append(str(failed))
            continue
        rate = bench.found[f"tokens/s of {name}"] = result["tokens_per_second"]
        ours = bench.found.get("tokens/s of this")
        times = "" if name == "this" else shown(ours and ours / rate, ".2f") + " x"
        table.row(CONTENDERS[name], f"{rate:,.0f}", f"{1e6 / rate:.1f}", shown(result["peak_gib"]), times)
    for failure in failures:
        print(f"\n```text\n{failure}\n```", flush=True)


def _link_lower_layers(bench: Bench, directory: Path) -> None:
    """Makes a model directory of the saved model's layers up to the hook. Its weights are links, not copies."""
    directory.mkdir(parents=True)
    for file in bench.model_dir.iterdir():
        if file.name not in ("config.json", "complete"):
            (directory / file.name).symlink_to(file.absolute())
    config = llama_config(bench.size, bench.size["layer"] + 1)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "float32" if bench.device == "cpu" else "bfloat16"
    config.save_pretrained(directory)
