#!/usr/bin/env python
"""Compares the memory that `--dry_run` predicts with the memory that a run then takes.

    python benchmarks/memory.py                  # the embedded model, on this machine
    python benchmarks/memory.py --device cuda --model_name meta-llama/Meta-Llama-3-8B --dataset_path wikitext

Each configuration runs for 24 steps in a process of its own. Its peak is the resident memory that the operating system
reports on a CPU, and the allocated memory that torch reports on a GPU. The constants of the prediction were fitted to
other configurations.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "sae_lens_train.py"

# The constants of sae_toolkit/steps/step_memory.py come from runs with 4 to 16 times as many features as dimensions,
# batch 1,024 and context 256.
CONFIGURATIONS = [
    "--architecture batchtopk --expansion_factor 32 --k 40 --train_batch_size_tokens 2048",
    "--architecture standard --expansion_factor 12 --train_batch_size_tokens 2048 --context_size 128",
    "--architecture jumprelu --expansion_factor 24 --train_batch_size_tokens 768 --layer 20 --context_size 512",
    "--architecture topk --expansion_factor 24 --k 32 --n_batches_in_buffer 256 --hook_name blocks.4.hook_mlp_out",
]

_CHILD = """
import atexit, json, resource, runpy, sys
import torch
def report():
    cuda = torch.cuda.is_available() and torch.cuda.max_memory_allocated()
    print(json.dumps({"peak": cuda or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
atexit.register(report)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model_name", default="embedded:smollm2-135m")
    parser.add_argument("--dataset_path", default="embedded:wikipedia")
    flags = parser.parse_args()
    print(f"{datetime.now(UTC):%Y-%m-%d}, {flags.device}, {flags.model_name}, 24 steps\n")
    print("| flags | predicted, GiB | measured, GiB | off by |\n| --- | --- | --- | --- |")
    for configuration in CONFIGURATIONS:
        batch = int(found[1]) if (found := re.search(r"tokens (\d+)", configuration)) else 1024
        with tempfile.TemporaryDirectory() as directory:
            more = f"--device {flags.device} --model_name {flags.model_name} --dataset_path {flags.dataset_path}"
            more += f" --normalize_activations expected_average_only_in --training_tokens {24 * batch}"
            more += f" --checkpoint_path {directory} --wandb_mode disabled"
            if "context_size" not in configuration:
                more += " --context_size 256"
            command = [sys.executable, "-c", _CHILD, str(SCRIPT), *more.split(), *configuration.split()]
            planned, ran = (
                subprocess.run([*command, *dry], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
                for dry in (["--dry_run"], [])
            )
        if planned.returncode or ran.returncode:
            sys.exit(f"{configuration} failed:\n{planned.stderr[-1000:]}\n{ran.stderr[-1000:]}")
        predicted = float(re.search(r"memory +([\d.]+) GiB", planned.stderr)[1])  # type: ignore[index]
        measured = json.loads(ran.stdout.splitlines()[-1])["peak"] / 2**30
        print(f"| `{configuration}` | {predicted:.2f} | {measured:.2f} | {predicted / measured - 1:+.0%} |", flush=True)


if __name__ == "__main__":
    main()
