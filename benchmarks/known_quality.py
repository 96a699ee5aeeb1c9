#!/usr/bin/env python
"""Do the four metrics tell good dictionaries from bad ones? SAEs of known quality, on a model whose features are known.

    python benchmarks/known_quality.py runs/known          # trains, measures, prints tables; again: what is missing
    python benchmarks/known_quality.py runs/known --show   # only the tables

The SAEs differ in kind, L0, tokens, learning rate, width and seed, and are good to useless. The synthetic model is
`synthetic:small`. Each is trained by sae_lens_train.py and measured by evaluate_sae_real_activations.py --synthetic.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap, spearmanr

ROOT = Path(__file__).resolve().parent.parent

TRUTH = ("mcc", "f1", "uniqueness")
METRICS = {
    "loss_recovered": "Loss recovered",
    "l0_distance": "L0, log of its distance to the healthy range",
    "dead_features": "Dead features",
    "decoder_absorption": "Decoder absorption",
    "healthy": "Metrics that are healthy, of 4",
    "explained_variance": "Explained variance",
}
STANDARDS = ("loss_recovered", "l0", "dead_features", "decoder_absorption")
LOWEST_L0, HIGHEST_L0 = 40, 120  # of the healthy range
MOST_ALIKE = 0.5  # share of SAEs with one value, for a correlation


def runs() -> dict[str, str]:
    """Returns the flags of each run, by its name. They come after those of @presets/synthetic.args."""
    found = {f"k{k}": f"--k {k}" for k in (5, 10, 16, 23, 32, 46, 64, 92, 128)}
    found |= {f"tokens{n}_k{k}": f"--k {k} --training_tokens {n}" for n in (30_000, 100_000, 300_000) for k in (23, 64)}
    found |= {f"k23_seed{seed}": f"--k 23 --seed {seed} --held_out_seed 42" for seed in (43, 44)}
    found |= {f"k64_seed{seed}": f"--k 64 --seed {seed} --held_out_seed 42" for seed in (43, 44)}
    for kind in ("topk", "matryoshka_batchtopk"):
        found |= {f"{kind}_k{k}": f"--architecture {kind} --k {k}" for k in (23, 64)}
    for kind in ("jumprelu", "standard", "gated"):
        found |= {f"{kind}_l0_{l0}": f"--architecture {kind} --target_l0 {l0}" for l0 in (12, 23, 64)}
    found |= {f"lr{lr:g}_k{k}": f"--k {k} --lr {lr:g}" for lr in (3e-5, 2e-4, 6e-3, 2e-2) for k in (23, 64)}
    found |= {f"width{x}_k{k}": f"--k {k} --expansion_factor {x}" for x in (1, 2, 8, 16) for k in (23, 64)}
    return found


def train(directory: Path, name: str, flags: str) -> Path:
    """Trains an SAE if it is not there yet, and returns its directory."""
    of_run = directory / name
    if not list(of_run.glob("*/*/final_*")):
        n_tokens = dict(zip(words := shlex.split(flags), words[1:], strict=False)).get("--training_tokens", "1000000")
        command = [
            *(sys.executable, str(ROOT / "sae_lens_train.py"), "@" + str(ROOT / "presets/synthetic.args"), *words),
            *("--checkpoint_path", str(of_run), "--cache_activations", str(directory / f"activations_{n_tokens}")),
            *("--wandb_mode", "disabled", "--eval_every", "0"),
        ]
        print(name, flags, flush=True)
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return next(of_run.glob("*/*/final_*"))


def measure(directory: Path, name: str, sae: Path) -> dict[str, Any]:
    """Evaluates an SAE if that was not done yet, and returns its metrics and scores."""
    file = directory / name / "evaluation.json"
    if not file.exists():
        command = [
            *(sys.executable, str(ROOT / "evaluate_sae_real_activations.py"), "--sae_path", str(sae), "--synthetic"),
            *("--lm_dtype", "float32", "--no_diagnosis", "--n_features", "0", "--output_json", str(file)),
        ]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = json.loads(file.read_text())
    metrics = {name: found["metrics"][name] for name in ("l0", *METRICS) if name in found["metrics"]}
    l0 = max(metrics["l0"], 1e-3)
    metrics["l0_distance"] = max(0.0, math.log(LOWEST_L0 / l0), math.log(l0 / HIGHEST_L0))
    passed = {f"{name}_passed": found["health"][name] == "healthy" for name in STANDARDS}
    truth = {name: found["synthetic"][name] for name in TRUTH}
    return metrics | passed | {"healthy": found["health"]["healthy"]} | truth


def correlation(x: np.ndarray, y: np.ndarray) -> str:
    """Returns Spearman's correlation of two rows of numbers, with its 95% bootstrap interval over SAEs."""
    if np.unique(x.round(2), return_counts=True)[1].max() > MOST_ALIKE * len(x):
        return "too few differ"
    drawn = bootstrap(
        (x, y),
        lambda a, b: spearmanr(a, b).statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        rng=0,
        method="percentile",
    ).confidence_interval
    return f"{spearmanr(x, y).statistic:+.2f} ({drawn.low:+.2f} to {drawn.high:+.2f})"


def show(found: dict[str, dict[str, Any]]) -> None:
    """Prints the SAEs, and how each metric goes with what is known."""
    columns = ["l0", *METRICS, *TRUTH]
    print("| SAE | " + " | ".join(columns) + " |\n| --- |" + " ---: |" * len(columns))
    for name, row in sorted(found.items(), key=lambda item: -item[1]["mcc"]):
        print(f"| {name} | " + " | ".join(f"{row[column]:.3f}" for column in columns) + " |")
    of_width = {name: row for name, row in found.items() if not name.startswith("width")}
    show_correlations("all", found)
    show_correlations("1,024 features", of_width)
    for l0 in (23, 64):
        rows = {name: row for name, row in of_width.items() if abs(row["l0"] - l0) < 1}
        show_correlations(f"1,024 features, L0 {l0}", rows)
    show_standards(of_width)


def show_correlations(which: str, found: dict[str, dict[str, Any]]) -> None:
    """Prints how each metric of some SAEs goes with what is known."""
    values = {column: np.array([row[column] for row in found.values()], float) for column in (*METRICS, *TRUTH)}
    print(f"\n{which}: {len(found)} SAEs. Spearman's correlation over them, with 95% bootstrap intervals:\n")
    print("| | " + " | ".join(TRUTH) + " |\n| --- |" + " ---: |" * len(TRUTH))
    for column, label in METRICS.items():
        print(f"| {label} | " + " | ".join(correlation(values[column], values[truth]) for truth in TRUTH) + " |")


def show_standards(found: dict[str, dict[str, Any]]) -> None:
    """Prints the mean scores of SAEs that a standard calls healthy, and of the others."""
    print(f"\nMeans of the {len(found)} SAEs of 1,024 features, healthy by a standard or not:\n")
    print("| | SAEs | MCC | F1 |\n| --- |" + " ---: |" * 3)
    selections: dict[str, list[dict[str, Any]]] = {}
    for name in STANDARDS:
        selections[f"{name}: healthy"] = [row for row in found.values() if row[f"{name}_passed"]]
        selections[f"{name}: not"] = [row for row in found.values() if not row[f"{name}_passed"]]
    for n in range(len(STANDARDS) + 1):
        selections[f"{n} of 4 healthy"] = [row for row in found.values() if row["healthy"] == n]
    for label, rows in selections.items():
        means = [f"{np.mean([row[truth] for row in rows]):.3f}" if rows else "" for truth in ("mcc", "f1")]
        print(f"| {label} | {len(rows)} | {means[0]} | {means[1]} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="directory of the runs")
    parser.add_argument("--show", action="store_true", help="only print the tables of what is there")
    parser.add_argument("--only", nargs="*", help="only these runs")
    args = parser.parse_args()
    directory, found = args.directory.absolute(), {}
    for name, flags in runs().items():
        if args.only and name not in args.only:
            continue
        if not args.show:
            found[name] = measure(directory, name, train(directory, name, flags))
        elif (directory / name / "evaluation.json").exists():
            found[name] = measure(directory, name, directory)
    show(found)


if __name__ == "__main__":
    main()
