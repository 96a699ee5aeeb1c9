#!/usr/bin/env python
"""Times training with this project, stock SAELens and sparsify on the same job, against the floor of the hardware.

    python benchmarks/train_speed.py                             # the embedded model on this machine, half an hour
    python benchmarks/train_speed.py --device cuda               # Llama-3-8B's shapes, random weights, on one GPU
    python benchmarks/train_speed.py --repeats 1 --steps 24      # a first look
    python benchmarks/train_speed.py --profile                   # where this project's time goes

The job: layer 12, TopK with k 64. On a CPU 4,608 features, contexts of 256, batches of 1,024, the embedded model; on
a GPU 131,072 features, contexts of 2,048, batches of 4,096, thirteen Llama-3-8B layers of random weights. All
contenders read the same model directory and the same rows of tokens, each in a process of its own, interleaved:

    this project               sae_lens_train.py; and again from the activations that --cache_activations left
    SAELens                    its own CLI with its defaults; and again with its fastest flags (see SAELENS_FAST)
    sparsify                   its Trainer with Adam; and again with its default optimizer, signum

The clock runs from one optimizer step to another, after warm-up, in every contender through torch's own hook. Prints
medians, spread, peak memory (resident on a CPU, allocated on a GPU) and ratios as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from train_contenders import CONTENDERS, run_contender
from train_job import JOBS, ROWS_PER_FORWARD, job, prepare


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--job", choices=list(JOBS), help="default: embedded on a CPU, llama3-8b on a GPU")
    parser.add_argument("--steps", type=int, default=104, help="timed steps (default: 104, 13 mixing buffers)")
    parser.add_argument("--warm_up", type=int, default=16, help="steps before them (default: 16)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each contender (default: 5)")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--profile", action="store_true", help="only show where this project's time goes")
    parser.add_argument("--work_dir", default=None, help="where model, tokens and runs go (default: a new folder)")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    flags.job = flags.job or ("embedded" if flags.device == "cpu" else "llama3-8b")
    return flags


class ContenderFailed(RuntimeError):
    """A contender ended before its last step. The message has the end of what it wrote."""


def measure(flags: argparse.Namespace, contender: str, work_dir: Path) -> dict[str, Any]:
    """Runs a contender, or the measurement of the floors, in a process of its own.

    Raises:
        ContenderFailed: it did not get to its last step.
    """
    command = [sys.executable, __file__, "--contender", contender, "--work_dir", str(work_dir)]
    for name in ("device", "job", "steps", "warm_up"):
        command += [f"--{name}", str(getattr(flags, name))]
    command += ["--profile"] if flags.profile else []
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(work_dir), "WANDB_SILENT": "true"}
    if contender == "floors":  # else glibc returns memory to the system after each layer, and that time would count
        environment |= {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**25)}
    done = subprocess.run(command, cwd=work_dir, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise ContenderFailed(f"{contender} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_here(flags: argparse.Namespace) -> dict[str, Any]:
    """Runs a contender, or the measurement of the floors, in this process."""
    work_dir = Path(flags.work_dir)
    if flags.contender != "floors":
        return run_contender(flags, work_dir)
    from floors import measure_floors

    return measure_floors(job(flags), flags.device, work_dir / "model", ROWS_PER_FORWARD, flags.steps)


def main() -> None:
    flags = parse_flags()
    if flags.contender:
        print("\n" + json.dumps(measure_here(flags)), flush=True)
        os._exit(0)  # the contender was stopped in the middle of its run
    with tempfile.TemporaryDirectory(prefix="train_speed-") as temporary:
        work_dir = Path(flags.work_dir or temporary).absolute()
        work_dir.mkdir(parents=True, exist_ok=True)
        if not (work_dir / "tokens").exists():
            print("saving the model and the tokens", file=sys.stderr)
            prepare(flags, work_dir)
        if flags.profile:
            show_profile(measure(flags, "this", work_dir))
            return
        if "this_cached" in flags.contenders and not (work_dir / "activations").exists():
            print("caching the activations", file=sys.stderr)
            measure(flags, "this_cached", work_dir)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in ["floors", *flags.contenders]}
        for repeat in range(flags.repeats):
            for name, runs in results.items():
                runs.append(measure(flags, name, work_dir))
                figure = runs[-1].get("tokens_per_second")
                print(
                    f"repeat {repeat + 1} of {flags.repeats}: {name}" + (f" {figure:.0f} tokens/s" if figure else ""),
                    file=sys.stderr,
                )
        report(flags, results)


def show_profile(result: dict[str, Any]) -> None:
    print("| part | share of the time |\n| --- | --- |")
    for name, seconds in sorted(result["spent"].items()):
        print(f"| {name} | {seconds / result['seconds']:.1%} |")


def report(flags: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    """Prints the machine and the job, a table of contenders and floors, and the ratios to this project."""
    print_heading(flags)
    print("| | tokens/s | spread | peak memory, GiB | of the floor | of the lower |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in flags.contenders:
        print_contender(name, results[name], results["floors"])
    print_floors(results["floors"])
    for name in flags.contenders:
        if not name.startswith("this") and "this" in flags.contenders:
            pairs = [
                a["tokens_per_second"] / b["tokens_per_second"]
                for a, b in zip(results["this"], results[name], strict=True)
            ]
            print(f"{statistics.median(pairs):.2f} x {CONTENDERS[name]} ({min(pairs):.2f} to {max(pairs):.2f})")


def print_heading(flags: argparse.Namespace) -> None:
    import torch

    size = job(flags)
    where = torch.cuda.get_device_name() if flags.device != "cpu" else f"{os.cpu_count()} cores, {_processor()}"
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {where}; {versions(flags.contenders)};"
        f" {flags.job} job: layer {size['layer']}, {size['d_sae']:,} features, TopK k {size['k']},"
        f" context {size['context']}, batch {size['batch']:,}; {flags.steps} steps after {flags.warm_up},"
        f" medians of {flags.repeats}\n"
    )


def versions(contenders: Sequence[str]) -> str:
    """Returns the versions of torch, Transformers and the contenders' libraries."""
    from importlib.metadata import version

    packages = ["torch", "sae-lens", "transformers"]
    if any(name.startswith("sparsify") for name in contenders):
        packages.append("eai-sparsify")
    return ", ".join(f"{package} {version(package)}" for package in packages)


def print_contender(name: str, runs: list[dict[str, Any]], floors: list[dict[str, Any]]) -> None:
    """Prints a contender's row. Each run is compared with the floor that was measured in the same repeat."""
    figures = [run["tokens_per_second"] for run in runs]
    shares = [
        [run["tokens_per_second"] * (floor["lm"] + floor[sae]) for run, floor in zip(runs, floors, strict=True)]
        for sae in ("sae", "sae_bfloat16")
    ]
    print(
        f"| {CONTENDERS[name]} | {statistics.median(figures):,.0f} | {min(figures):,.0f} to {max(figures):,.0f} |"
        f" {statistics.median(run['peak_gib'] for run in runs):.2f} |"
        + "".join(f" {'' if name == 'this_cached' else _with_spread(each)} |" for each in shares)
    )


def print_floors(runs: list[dict[str, Any]]) -> None:
    """Prints the floors' rows, and the measured peaks behind them."""
    lm, sae, sae_bfloat16 = (statistics.median(run[name] for run in runs) for name in ("lm", "sae", "sae_bfloat16"))
    print(
        f"| floor: both parts | {1 / (lm + sae):,.0f} | | | | |\n"
        f"| floor: language model alone, {runs[0]['dtype']} | {1 / lm:,.0f} | | | | |\n"
        f"| floor: SAE step alone | {1 / sae:,.0f} | | | | |\n"
        "| lower floor: both parts, the SAE's products in the language model's dtype |"
        f" {1 / (lm + sae_bfloat16):,.0f} | | | | |\n"
    )
    peaks = runs[0]
    print(
        f"Measured peaks: {peaks['gflops']:.0f} GFLOP/s in the encoder's product ({peaks['gflops_bfloat16']:.0f} in the"
        f" language model's dtype), {peaks['gigabytes']:.0f} GB/s\n"
    )


def _with_spread(shares: list[float]) -> str:
    return f"{statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    flags = next((line for line in lines if line.startswith("flags")), "")
    return model + (", AVX512-BF16" if "avx512_bf16" in flags else ", no bfloat16 arithmetic")


if __name__ == "__main__":
    try:
        main()
    except ContenderFailed as failed:
        sys.exit(str(failed))
