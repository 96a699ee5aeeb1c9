#!/usr/bin/env python
"""Do the same settings give the same SAEs as SAELens's runner for synthetic data? Both are scored by SAELens's code.

    python benchmarks/synthetic_runner.py runs/runner      # `synthetic:small`; again: what is missing

The settings are those of SAELens's published results (docs/synth_sae_bench.md and the experiments behind it): batches
of 1,024, a constant learning rate of 3e-4, no normalization, dead features after 1,000 steps, and for Matryoshka an
auxiliary loss on each inner width. Published are 200 million samples, 4,096 features and k 25 on synth-sae-bench-16k:

    python benchmarks/synthetic_runner.py runs/published --model synth-sae-bench-16k --samples 200000000 \\
        --d_sae 4096 --k 25 --matryoshka_widths 128 512 2048 4096

As in SAELens's results, what its runner trains is scored as a training SAE, which selects k features of each batch on
average; ours is scored as it is saved, with one threshold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from sae_lens import SAE, BatchTopKTrainingSAEConfig, LoggingConfig, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.synthetic import SyntheticModel, SyntheticSAERunner, SyntheticSAERunnerConfig, eval_sae_on_synthetic_data

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sae_toolkit.synthetic.directory import synthetic_directory
from sae_toolkit.terminal.console import run_script, set_up_logging

KINDS = ("batchtopk", "matryoshka_batchtopk")
SCORES = {"f1": "F1", "mcc": "MCC", "uniqueness": "uniqueness", "explained_variance": "explained variance", "l0": "L0"}


def train_there(args: argparse.Namespace, model: Path, kind: str, seed: int) -> SAE:
    """Trains by SAELens's runner."""
    shape = {"d_in": SyntheticModel.load_from_disk(model).cfg.hidden_dim, "d_sae": args.d_sae, "k": args.k}
    torch.manual_seed(seed)
    runner = SyntheticSAERunnerConfig(
        synthetic_model=str(model),
        sae=BatchTopKTrainingSAEConfig(**shape)
        if kind == "batchtopk"
        else MatryoshkaBatchTopKTrainingSAEConfig(
            **shape, matryoshka_widths=args.matryoshka_widths, use_matryoshka_aux_loss=True
        ),
        training_samples=args.samples,
        batch_size=args.batch,
        lr=args.lr,
        output_path=None,
        checkpoint_path=None,
        run_final_eval=False,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SyntheticSAERunner(runner).run().sae


def train_here(args: argparse.Namespace, model: Path, kind: str, seed: int) -> SAE:
    """Trains by sae_lens_train.py."""
    name = f"synthetic:{model}"
    flags: list[object] = [
        *("--model_name", name, "--dataset_path", name, "--layer", 0, "--lm_dtype", "float32", "--context_size", 1024),
        *("--skip_positions", 0, "--max_activation_norm_multiple", 0, "--normalize_activations", "none"),
        *("--architecture", kind, "--d_sae", args.d_sae, "--k", args.k, "--lr", args.lr),
        *("--lr_warm_up_steps", 0, "--lr_decay_steps", 0, "--dead_feature_window", 1000, "--device", "cpu"),
        *("--training_tokens", args.samples, "--train_batch_size_tokens", args.batch, "--seed", seed),
        *("--eval_every", 0, "--wandb_mode", "disabled", "--checkpoint_path", args.directory / "here"),
    ]
    if kind == "matryoshka_batchtopk":
        flags += ["--matryoshka_widths", *args.matryoshka_widths, "--set", "sae.use_matryoshka_aux_loss=true"]
    command = [sys.executable, str(ROOT / "sae_lens_train.py"), *map(str, flags)]
    return SAE.load_from_disk(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


def score(sae: SAE, model: Path, samples: int) -> dict[str, float]:
    """Scores an SAE by SAELens's code, on the same samples for every SAE."""
    synthetic = SyntheticModel.load_from_disk(model)
    torch.manual_seed(2**31)
    found = eval_sae_on_synthetic_data(
        sae=sae,
        feature_dict=synthetic.feature_dict,
        activations_generator=synthetic.activation_generator,
        num_samples=samples,
        batch_size=1024,
    )
    scores = {"f1": found.classification.f1_score, "mcc": found.mcc, "uniqueness": found.uniqueness}
    return scores | {"explained_variance": found.explained_variance, "l0": found.sae_l0}


def show(results: dict[str, dict[str, float]], kinds: list[str], seeds: list[int]) -> None:
    """Prints each score of both, its mean and standard deviation over the seeds."""
    print("| kind | by | " + " | ".join(SCORES.values()) + " |\n| --- | --- |" + " ---: |" * len(SCORES))
    for kind in kinds:
        for by in ("SAELens's runner", "sae_lens_train.py"):
            rows = [results[f"{kind} {seed} {by}"] for seed in seeds]
            cells = []
            for name in SCORES:
                values = [row[name] for row in rows]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}")
            print(f"| {kind} | {by} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="directory of the SAEs and of results.json")
    parser.add_argument("--model", default="small", help="name or directory of a synthetic model")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--d_sae", type=int, default=1024)
    parser.add_argument("--k", type=int, default=23)
    parser.add_argument("--matryoshka_widths", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--samples", type=int, default=1_000_000, help="samples to train on")
    parser.add_argument("--scored", type=int, default=100_000, help="samples to score on")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    set_up_logging()  # making a synthetic model is announced
    args.directory = args.directory.absolute()
    model = synthetic_directory(f"synthetic:{args.model}", "--model").absolute()
    args.directory.mkdir(parents=True, exist_ok=True)
    file = args.directory / "results.json"
    settings = {name: value for name, value in vars(args).items() if name not in ("directory", "kinds", "seeds")}
    kept = json.loads(file.read_text()) if file.exists() else {"settings": settings, "results": {}}
    if kept["settings"] != settings:
        parser.error(f"{file} is of other settings ({kept['settings']}); name another directory")
    results = kept["results"]
    for kind in args.kinds:
        for seed in args.seeds:
            for by, train in (("SAELens's runner", train_there), ("sae_lens_train.py", train_here)):
                if (name := f"{kind} {seed} {by}") not in results:
                    print(name, file=sys.stderr, flush=True)
                    results[name] = score(train(args, model, kind, seed), model, args.scored)
                    file.write_text(json.dumps(kept, indent=1))
    show(results, args.kinds, args.seeds)


if __name__ == "__main__":
    run_script(main)
