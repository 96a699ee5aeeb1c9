#!/usr/bin/env python
"""Times this project's evaluation against sae-lens's `run_evals`, and several SAEs together against one by one.

    python benchmarks/eval_speed.py --sae_path checkpoints/demo_1a2b3c4d/k3j2h1g0/final_500224
    python benchmarks/eval_speed.py --sae_path checkpoints/demo_1a2b3c4d/k3j2h1g0 --repeats 5

Every contender measures the same rows, in the same dtype, at the same batch size, in a process of its own. The clock
starts after the model is loaded. Contenders are interleaved. Given several SAEs, it also compares one pass for all of
them with a pass for each. Prints medians, spread, peak memory and ratios as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae_path", nargs="+", required=True, help="as in evaluate_sae_real_activations.py")
    parser.add_argument("--num_samples", type=int, default=40, help="rows (default: 40)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--lm_dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contender", choices=("this", "run_evals"), help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(flags: argparse.Namespace) -> Any:
    from sae_toolkit.evaluation.setup import prepare_evaluations
    from sae_toolkit.settings.evaluation import parse_evaluation_flags

    sizes = (f"--{name}={getattr(flags, name)}" for name in ("num_samples", "batch_size", "lm_dtype", "device"))
    settings = parse_evaluation_flags("", ["--sae_path", *flags.sae_path, *sizes])
    groups = prepare_evaluations(settings.saes, settings.text, settings.measurements)
    if len(groups) > 1:
        sys.exit("error: --sae_path: the SAEs do not share model, hook and text")
    return groups[0]


def run_this(flags: argparse.Namespace) -> dict[str, float]:
    """Runs this project's evaluation: both passes, intervals, estimates and the data of the feature browser."""
    from sae_toolkit.evaluation.run import evaluate_saes
    from sae_toolkit.model.devices import choose_lm_dtype
    from sae_toolkit.model.loading import load_language_model

    prepared = prepare(flags)
    dtype = choose_lm_dtype(flags.lm_dtype, prepared.device)
    model = load_language_model(prepared.model, prepared.hook_name, prepared.device, dtype)
    start = time.perf_counter()
    evaluations = evaluate_saes(prepared, model, batch_size=flags.batch_size)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "l0": evaluations[0].metrics["l0"], **model.sequences_run}


def run_evals_inputs(flags: argparse.Namespace, prepared: Any, model: Any) -> tuple[Any, Any, Any, Any]:
    """Returns what sae-lens's `run_evals` takes: model, store, scaler and configuration.

    The store holds the rows twice, because the second pass of `run_evals` reads on where the first one ended.
    """
    import datasets
    from sae_lens import ActivationsStore
    from sae_lens.evals import get_eval_everything_config
    from sae_lens.training.activation_scaler import ActivationScaler
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        "benchmark", hf_model=model.model, tokenizer=prepared.tokenizer, dtype=model.dtype
    )
    rows = prepared.rows_NT.tolist()
    store = ActivationsStore.from_sae(
        bridge,
        prepared.saes[0].sae,
        datasets.Dataset.from_dict({"input_ids": [*rows, *rows]}),
        context_size=prepared.context.context_size,
        store_batch_size_prompts=flags.batch_size,
        device=prepared.device,
    )
    n_batches = len(rows) // flags.batch_size
    config = get_eval_everything_config(flags.batch_size, n_batches, n_batches)
    return bridge, store, ActivationScaler(), config


def run_run_evals(flags: argparse.Namespace) -> dict[str, float]:
    """Runs sae-lens's `run_evals` with all metrics on."""
    from sae_lens import run_evals

    from sae_toolkit.model.devices import choose_lm_dtype
    from sae_toolkit.model.loading import load_language_model

    prepared = prepare(flags)
    dtype = choose_lm_dtype(flags.lm_dtype, prepared.device)
    model = load_language_model(prepared.model, prepared.hook_name, prepared.device, dtype)
    bridge, store, scaler, config = run_evals_inputs(flags, prepared, model)
    sae = prepared.saes[0].sae
    start = time.perf_counter()
    special = list(prepared.saes[0].positions.special_token_ids)
    metrics, _ = run_evals(sae, store, bridge, scaler, config, exclude_special_tokens=special)
    return {"seconds": time.perf_counter() - start, "l0": metrics["sparsity"]["l0"]}


def measure(flags: argparse.Namespace, contender: str, sae_paths: list[str]) -> dict[str, float]:
    """Runs a contender in a process of its own."""
    command = [sys.executable, __file__, "--contender", contender, "--sae_path", *sae_paths]
    for name in ("num_samples", "batch_size", "lm_dtype", "device"):
        command += [f"--{name}", str(getattr(flags, name))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode:
        sys.exit(f"{contender} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    flags = parse_flags()
    if flags.num_samples % flags.batch_size:
        sys.exit("error: --num_samples: must be a multiple of --batch_size, as run_evals counts whole batches")
    if flags.contender:
        result = {"this": run_this, "run_evals": run_run_evals}[flags.contender](flags)
        result["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(result))
        return

    from sae_toolkit.saes.search import find_saes

    paths = [str(file.path) for file in find_saes(flags.sae_path)]
    contenders = {"run_evals, one SAE": ("run_evals", paths[-1:]), "this project, one SAE": ("this", paths[-1:])}
    if len(paths) > 1:
        contenders |= {f"this project, {len(paths)} SAEs together": ("this", paths)}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for repeat in range(flags.repeats):
        for name, (contender, saes) in contenders.items():
            print(f"repeat {repeat + 1} of {flags.repeats}: {name}", file=sys.stderr)
            results[name].append(measure(flags, contender, saes))
    report(flags, results, len(paths))


def report(flags: argparse.Namespace, results: dict[str, list[dict[str, float]]], n_saes: int) -> None:
    import sae_lens
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {os.cpu_count()} cores, {gpu},"
        f" torch {torch.__version__}, sae-lens {sae_lens.__version__}; {flags.num_samples} rows,"
        f" batch {flags.batch_size}, {flags.lm_dtype}, medians of {flags.repeats}\n"
    )
    print("| | seconds | spread | peak memory, GiB | L0 | sequences: whole model / after the hook |")
    print("| --- | --- | --- | --- | --- | --- |")
    medians = {}
    for name, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        medians[name] = statistics.median(seconds)
        passes = f"{runs[0]['whole']} / {runs[0]['after_hook']}" if "whole" in runs[0] else "not counted"
        print(
            f"| {name} | {medians[name]:.1f} | {min(seconds):.1f} to {max(seconds):.1f} |"
            f" {statistics.median(run['peak_gib'] for run in runs):.2f} | {runs[0]['l0']:.3f} | {passes} |"
        )
    theirs, one, *together = medians.values()
    print(f"\nrun_evals takes {theirs / one:.2f} x the time of this project")
    for seconds in together:
        print(f"{n_saes} SAEs together take {seconds / (n_saes * one):.2f} of the time of {n_saes} one by one")


if __name__ == "__main__":
    main()
