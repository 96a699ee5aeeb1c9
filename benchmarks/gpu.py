#!/usr/bin/env python
"""Measures this project on one CUDA device: operators, steps, language model, the whole job, and other tools beside it.

    python benchmarks/gpu.py                          # all of it: six minutes on an H200
    python benchmarks/gpu.py --parts ab               # only operators and steps
    python benchmarks/gpu.py --parts d --work_dir /scratch/gpu    # only the job, with the model that is saved there
    python benchmarks/gpu.py --tiny                   # all of it with tiny shapes on a CPU, to try the benchmark

The model has Llama-3-8B's shapes and random weights, and the text is this repository's own, so no network is needed.
The work directory takes 25 GB. The parts:

    a  the operators of a training step, each alone
    b  training steps at 32,768 and 131,072 features, with and without dead features: time, memory, waits
    c  the language model up to layer 12, as it is and with its layers compiled
    d  sae_lens_train.py with presets/llama3-8b.args, stopped and resumed, and the evaluation of its SAE
    e  training with this project, SAELens (its defaults, its fastest flags) and sparsify at 131,072 features

Each part prints Markdown as it goes, so a run that is cut short shows what it found. If a part fails, its traceback is
shown and the next part begins. At the end the figures are compared with the targets.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from floors import step_bytes, step_operations
from gpu_contenders import time_contenders
from gpu_device import Bench, Table, shown
from gpu_model import products_of_token, time_language_model
from gpu_operators import time_operators
from gpu_scripts import run_scripts
from gpu_steps import time_steps
from train_contenders import CONTENDERS
from train_job import JOBS
from train_speed import versions

# What the floor is computed with: products of the language model and of the SAE, and bytes that the SAE's step moves.
_OPERATIONS_A_SECOND, _BYTES_A_SECOND = 700e12, 3e12
_TOKENS = 50_000_000  # of presets/llama3-8b.args


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="abcde", help="which parts, in this order (default: abcde)")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a CPU; the figures mean nothing")
    parser.add_argument("--device", help="default: cuda, with --tiny cpu")
    parser.add_argument("--work_dir", type=Path, help="where model, text and runs are kept (default: a new folder)")
    flags = parser.parse_args()
    if unknown := sorted(set(flags.parts) - set("abcde")):
        parser.error(f"--parts {flags.parts}: there is no part {unknown[0]}; use letters of abcde")
    flags.device = flags.device or ("cpu" if flags.tiny else "cuda")
    if torch.device(flags.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(
            f"--device {flags.device}: torch {torch.__version__} sees no CUDA device; with --tiny a CPU is used"
        )
    return flags


def main() -> int:
    flags = parse_flags()
    print_heading(flags)
    with tempfile.TemporaryDirectory(prefix="gpu-") as temporary:
        job = "tiny" if flags.tiny else "llama3-8b"
        bench = Bench(JOBS[job], flags.device, (flags.work_dir or Path(temporary)).absolute())
        bench.work_dir.mkdir(parents=True, exist_ok=True)
        parts: dict[str, tuple[str, Callable[[], None]]] = {
            "a": ("operators", lambda: time_operators(bench)),
            "b": ("training steps", lambda: time_steps(bench)),
            "c": ("language model", lambda: time_language_model(bench)),
            "d": ("the whole job", lambda: run_scripts(bench)),
            "e": ("beside other tools", lambda: time_contenders(bench, job, *((2, 4) if flags.tiny else (16, 32)))),
        }
        failed = [name for name in flags.parts if not run_part(name, *parts[name])]
        print_targets(bench)
    return 1 if failed else 0


def run_part(name: str, title: str, part: Callable[[], None]) -> bool:
    """Runs a part. Returns whether it succeeded; if not, its traceback is printed."""
    print(f"\n## {name}. {title}\n", flush=True)
    started = time.perf_counter()
    try:
        part()
    except Exception as error:
        print(f"\nPart {name} failed: {type(error).__name__}\n\n```text\n{traceback.format_exc()}```", flush=True)
        return False
    print(f"\nPart {name} took {time.perf_counter() - started:.0f} s.", flush=True)
    return True


def print_heading(flags: argparse.Namespace) -> None:
    where = f"{os.cpu_count()} cores, no GPU; tiny shapes, whose figures mean nothing"
    if torch.device(flags.device).type == "cuda":
        card = torch.cuda.get_device_properties(flags.device)
        where = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    print(
        f"`python {shlex.join(sys.argv)}`, {datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {where};"
        f" {versions(())}; Python {platform.python_version()}",
        flush=True,
    )


def print_targets(bench: Bench) -> None:
    """Prints what was found beside what is aimed at. A figure that no part measured is left empty."""
    found, size = bench.found, bench.size
    model, sae = floor_of_token(size)
    ours, rate = found.get("tokens/s of this"), found.get("tokens/s of the job")
    print("\n## Targets\n")
    table = Table("", "target", "found")
    for name, target in (("saelens", 5), ("saelens_fast", 1.5), ("sparsify_signum", 1.2)):
        theirs = found.get(f"tokens/s of {name}")
        ratio = ours / theirs if ours and theirs else None
        table.row(f"times the speed of {CONTENDERS[name]}", f"at least {target}", shown(ratio))
    share = None if ours is None else ours * (model + sae)
    table.row(f"share of the floor, {size['d_sae']:,} features", "at least 60%", shown(share, ".0%"))
    of_job = max((abs(off) for name, off in found.items() if name.startswith("plan of")), default=None)
    table.row("peaks of the job off the plan", "at most 10%", shown(of_job, ".0%"))
    table.row("peaks of the steps off the plan", "at most 10%", shown(found.get("step plan off"), ".0%"))
    minutes = None if rate is None else _TOKENS / rate / 60
    whole = f"minutes for {_TOKENS / 1e6:.0f} M tokens, {bench.widths[0]:,} features"
    table.row(whole, "at most 15", shown(minutes, ".1f"))
    print(
        f"\nThe floor at {size['d_sae']:,} features is {1e6 * (model + sae):.2f} us a token: {1e6 * model:.2f} for the"
        f" products of the language model at {_OPERATIONS_A_SECOND / 1e12:.0f} TFLOP/s, {1e6 * sae:.2f} for the SAE's"
        f" step at the same rate and {_BYTES_A_SECOND / 1e12:.0f} TB/s.",
        flush=True,
    )


def floor_of_token(size: dict[str, int]) -> tuple[float, float]:
    """Returns the least seconds a token by arithmetic, of the language model and of the SAE's step."""
    of_step = step_operations(size) / _OPERATIONS_A_SECOND + step_bytes(size) / _BYTES_A_SECOND
    return products_of_token(size) / _OPERATIONS_A_SECOND, of_step / size["batch"]


if __name__ == "__main__":
    sys.exit(main())
