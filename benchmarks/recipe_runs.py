#!/usr/bin/env python
"""The runs behind --recipe auto (docs/recipes.md): SAEs over budgets, widths, k, hooks and settings.

    python benchmarks/recipe_runs.py collect runs/recipe                     # once: the activations; 4 minutes, 7 GB
    python benchmarks/recipe_runs.py train runs/recipe steps width hooks     # these parts; again: what is missing
    python benchmarks/recipe_runs.py show runs/recipe steps                  # a table

A run is given as flags of sae_lens_train.py, beginning with `@presets/demo.args`. Some parts have the settings of
before the recipe, others those that the recipe chooses. Activations are read from disk, and Ray Tune trains one SAE on
each core. Loss recovered is not measured here, since it needs the language model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(ROOT := Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from ray import tune
from sae_lens import LoggingConfig

from sae_toolkit.evaluation.decoder_cosines import measure_cosines
from sae_toolkit.model.tokenizer import load_tokenizer
from sae_toolkit.saes.checkpoints import finished_copy
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.settings.training import TrainingSettings
from sae_toolkit.steps.trainer import Trainer
from sae_toolkit.text.rows import ContextFormat, collect_evaluation_rows
from sae_toolkit.training.configuration import build_runner_config
from sae_toolkit.training.recipe import with_recipe
from sae_toolkit.training.run import create_sae, load_model
from sae_toolkit.training.setup import prepare_run

HOOK = "blocks.12.hook_resid_post"
FITTED_ON = (
    *(HOOK, "blocks.2.hook_resid_post", "blocks.20.hook_resid_post"),
    *("blocks.12.hook_mlp_out", "blocks.12.hook_attn_out"),
)
NOT_FITTED_ON = (
    *("blocks.6.hook_resid_post", "blocks.16.hook_resid_post", "blocks.28.hook_resid_post"),
    *("blocks.6.hook_attn_out", "blocks.18.hook_mlp_out"),
)
TOKENS, HELD_OUT_ROWS = 535_000, 205
ATTENTION = {"hook": "blocks.6.hook_attn_out", "tokens": 150_000, "batch": 128, "window": 23}
MEASURED = ("explained_variance", "l0", "dead", "absorption", "seconds")


def over(**values: Any) -> list[dict[str, Any]]:
    """Returns the combinations of values; a list has several. What is not among them is chosen by the recipe."""
    lists = [each if isinstance(each, list) else [each] for each in values.values()]
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*lists)]


def before(**values: Any) -> list[dict[str, Any]]:
    """Returns runs with the settings of before the recipe: schedules and window in shares of the steps."""
    common = {"tokens": 100_000, "factor": 4, "batch": 256, "lr": 2e-3, "window": 0.04, "init_norm": 0.1}
    return over(**common | values)


def spread(**values: Any) -> list[dict[str, Any]]:
    """Returns runs whose features grow more evenly, with windows in steps."""
    return before(**{"init_norm": 0.3, "window": 8} | values)


def grown(**values: Any) -> list[dict[str, Any]]:
    """Returns runs that begin as the recipe's, at the mean of the activations, with rates of their own."""
    common = {"tokens": 500_000, "batch": 512, "k": 64, "window": 20, "init_norm": 0.5, "b_dec": "mean"}
    return spread(**common | values)


PARTS: dict[str, list[dict[str, Any]]] = {
    # Batch and learning rate of 100,000 tokens.
    "steps": before(batch=[128, 256, 512], lr=[1e-3, 2e-3, 4e-3]),
    # One change each.
    "change": [
        *before(init_norm=[0.03, 0.3, 1.0]),
        *before(window=[2, 4, 8, 39]),
        *before(aux=[0.03, 0.3, 3.0]),
        *before(decoder=["data", "a third data", "half data"]),
        *before(b_dec="mean"),
        *before(batch=128, lr=1.5e-3, init_norm=0.3, window=16, decay=[0.2, 0.5, 0.9]),
    ],
    "window": [
        *before(window=[2, 4], lr=[2e-3, 4e-3], init_norm=[0.1, 0.3]),
        *before(window=2, batch=[128, 256, 512], lr=[7e-4, 1.4e-3]),
    ],
    "width": [
        *before(factor=16, batch=128, lr=[7e-4, 1.4e-3, 2.8e-3]),
        *before(factor=16, lr=1.4e-3, window=[4, 16], init_norm=[0.1, 0.3]),
        *spread(factor=16, batch=128, lr=[0.8e-3, 1.2e-3], window=[16, 32]),
        *spread(factor=16, lr=2.2e-3, window=16, init_norm=[0.3, 1.0]),
        *spread(factor=16, batch=128, lr=[1.1e-3, 1.5e-3], window=45),
        *spread(factor=16, tokens=200_000, window=16, lr=[0.8e-3, 1.2e-3]),
    ],
    "hooks": spread(hook=list(FITTED_ON[1:]), lr=[1.4e-3, 2.4e-3]),
    "k": [*spread(k=[16, 128], lr=[1.4e-3, 2.4e-3]), *spread(k=16, batch=[128, 256], window=22)],
    "norm": [
        *spread(**ATTENTION, lr=1.3e-3, init_norm=[0.3, 0.6, 1.0]),
        *spread(**ATTENTION, lr=0.9e-3, init_norm=[0.3, 0.6]),
        *spread(batch=128, lr=1.5e-3, window=16, init_norm=[0.3, 0.6, 1.0]),
        *spread(hook="blocks.12.hook_attn_out", batch=128, lr=1.5e-3, window=16, init_norm=[0.3, 1.0]),
    ],
    # The decoder's bias from the mean of the activations, as the recipe has it.
    "mean": [
        *spread(b_dec="mean", batch=128, lr=[1e-3, 1.8e-3], window=16, init_norm=[0.1, 0.3]),
        *spread(b_dec="mean", batch=128, lr=1.5e-3, window=16, init_norm=0.6),
        *spread(b_dec="mean", factor=16, batch=128, lr=[0.6e-3, 1e-3], window=45, init_norm=[0.1, 0.3]),
        *spread(b_dec="mean", factor=16, batch=128, lr=1.1e-3, window=[22, 45], init_norm=0.6),
        *spread(b_dec="mean", **ATTENTION, lr=1.3e-3, init_norm=[0.3, 0.6]),
        *spread(b_dec="mean", tokens=500_000, batch=512, lr=1.4e-3, window=20, init_norm=[0.3, 0.6]),
        *spread(b_dec="mean", tokens=500_000, factor=32, batch=1024, lr=0.8e-3, window=11),
    ],
    "long": [*spread(tokens=500_000, batch=512, lr=1.4e-3), *spread(tokens=500_000, batch=1024, lr=2e-3)],
    # The learning rate by k, batch, steps and width, and at other hooks.
    "rate": [
        *grown(k=20, lr=2e-3),
        *grown(k=40, lr=[2e-3, 2.8e-3]),
        *grown(lr=[1.4e-3, 2e-3, 2.8e-3, 4e-3]),
        *grown(k=80, lr=[2.8e-3, 4e-3]),
        *grown(k=80, lr=[1.4e-3, 2.8e-3], init_norm=0.1),
        *grown(k=160, lr=[2.8e-3, 4e-3, 5.6e-3]),
        *grown(tokens=50_000, batch=64, window=22, lr=[1.1e-3, 1.6e-3]),
        *grown(tokens=100_000, batch=128, window=16, lr=[1e-3, 1.5e-3, 2.1e-3, 3e-3]),
        *grown(tokens=200_000, batch=256, window=16, lr=[1.8e-3, 2.5e-3]),
        *grown(batch=256, window=40, lr=2e-3),
        *grown(batch=1024, window=10, lr=[2.8e-3, 4e-3]),
        *grown(tokens=1_000_000, batch=1024, lr=[2.4e-3, 3.4e-3]),
        *grown(factor=8, init_norm=0.59, lr=[1.2e-3, 2.2e-3]),
        *grown(factor=16, init_norm=0.71, window=23, lr=[1.6e-3, 2.4e-3]),
        *grown(factor=16, init_norm=0.71, tokens=100_000, batch=128, window=45, lr=1.1e-3),
        *grown(factor=32, init_norm=0.84, batch=1024, window=11, lr=1.9e-3),
    ],
    "rate at hooks": [
        *grown(hook=["blocks.12.hook_mlp_out", "blocks.28.hook_resid_post"], lr=2.5e-3),
        *grown(hook=[f"blocks.{layer}.hook_resid_post" for layer in (2, 6, 20)], lr=2.5e-3, seed=5),
        *grown(hook="blocks.18.hook_mlp_out", lr=2.5e-3, seed=5),
        *grown(hook=ATTENTION["hook"], lr=2.5e-3, init_norm=[0.5, 0.8]),
        *grown(hook="blocks.12.hook_attn_out", lr=2.5e-3),
        *grown(hook=ATTENTION["hook"], tokens=300_000, batch=256, window=23, lr=1.8e-3, init_norm=[0.5, 0.8]),
        *grown(hook=[ATTENTION["hook"], "blocks.12.hook_attn_out"], lr=[1e-3, 1.4e-3], seed=5),
        *grown(hook=ATTENTION["hook"], lr=1e-3, init_norm=0.8, seed=5),
        *grown(hook=ATTENTION["hook"], lr=1.4e-3, init_norm=1.0, seed=5),
    ],
    # Settings that the rule was not fitted on: other hooks, budgets and seeds.
    "rule": [
        *over(tokens=100_000, factor=[4, 8], hook=list(NOT_FITTED_ON), seed=[1, 2]),
        *over(tokens=300_000, factor=[4, 16], hook=["blocks.6.hook_attn_out", "blocks.16.hook_resid_post"], seed=3),
        *over(tokens=500_000, factor=4, hook=["blocks.6.hook_attn_out", "blocks.16.hook_resid_post"], seed=3),
        *over(tokens=1_000_000, factor=8, hook="blocks.6.hook_resid_post", seed=4),
        *over(tokens=2_000_000, factor=4, hook="blocks.16.hook_resid_post", seed=4),
    ],
    # How few tokens suffice.
    "bound": [*over(tokens=[6_000, 12_000, 25_000, 50_000], factor=4), *over(tokens=50_000, factor=[8, 16, 32])],
    # What other trainers have: more active features at the beginning, other momentum, another scale of the encoder.
    "others": [
        *over(tokens=500_000, factor=4, seed=[0, 1, 2]),
        *over(tokens=500_000, factor=4, k_from=[128, 256], seed=[0, 1, 2]),
        *over(tokens=500_000, factor=4, beta1=[0.0, 0.5], seed=[0, 1, 2]),
        *over(tokens=500_000, factor=4, encoder=[0.5, 2.0], seed=[0, 1, 2]),
    ],
    "others wide": [
        *over(tokens=500_000, factor=32, seed=0),
        *over(tokens=500_000, factor=32, k_from=256, seed=0),
        *over(tokens=500_000, factor=32, beta1=0.0, seed=0),
        *over(tokens=500_000, factor=32, encoder=0.5, seed=0),
    ],
    "kinds": over(tokens=[100_000, 500_000], factor=4, architecture=["topk", "matryoshka_batchtopk"]),
}


def flags_of(run: dict[str, Any]) -> list[str]:
    """Returns the command line of a run, without the flags that say where files go."""
    words = ["@" + str(ROOT / "presets" / "demo.args")]
    if "hook" in run:
        words += ["--hook_name", run["hook"]]
    n_steps = run["tokens"] // run["batch"] if "batch" in run else 0
    named = {"tokens": "training_tokens", "factor": "expansion_factor", "batch": "train_batch_size_tokens"}
    for name in ("tokens", "factor", "batch", "lr", "k", "seed", "architecture"):
        if name in run:
            words += [f"--{named.get(name, name)}", str(run[name])]
    if "batch" in run:
        window = run["window"] if run["window"] >= 1 else max(2, round(run["window"] * n_steps))
        decay = round(run.get("decay", 0.2) * n_steps)
        words += ["--lr_warm_up_steps", str(max(1, round(0.04 * n_steps))), "--lr_decay_steps", str(decay)]
        words += ["--dead_feature_window", str(window), "--set", f"sae.decoder_init_norm={run['init_norm']}"]
        words += ["--b_dec_init_method", run.get("b_dec", "zeros")]
    if "beta1" in run:
        words += ["--set", f"adam_beta1={run['beta1']}"]
    if "aux" in run:
        words += ["--set", f"sae.aux_loss_coefficient={run['aux']}"]
    return words


def collect(directory: Path) -> None:
    """Writes the activations at all hooks, of training rows in random order and of held-out rows, in bfloat16."""
    hooks = [*FITTED_ON, *NOT_FITTED_ON]
    words = [*flags_of({"tokens": TOKENS}), "--eval_every", "0", "--checkpoint_path", str(directory)]
    settings = parse_training_flags([*words, "--hook_names", *hooks])
    run = prepare_run(settings)
    model = load_model(run)
    model.keep_only_up_to_hook()
    context, wanted = ContextFormat(run.cfg.context_size), {"n_rows": HELD_OUT_ROWS, "seed": 0, "flag": "held out"}
    held_out_NT, _ = collect_evaluation_rows(run.text, load_tokenizer(run.model), context, run.held_out, **wanted)
    shuffled = np.random.default_rng(0).permutation(run.rows_NT)
    limits_H = None
    for part, rows_NT in (("training", shuffled), ("held_out", held_out_NT)):
        files = [(directory / f"{part}_{hook}.bin").open("wb") for hook in hooks]
        for start in range(0, len(rows_NT), 8):
            tokens_BT = rows_NT[start : start + 8].astype(np.int64)
            keeps = torch.from_numpy(run.positions.keeps_tokens(tokens_BT).ravel())
            acts_ND = model.activations(torch.from_numpy(tokens_BT)).flatten(0, 1)[keeps]
            each = acts_ND.split(run.widths, dim=-1)
            norms_HN = torch.stack([acts.float().norm(dim=-1) for acts in each])
            limits_H = 10 * norms_HN.median(dim=1).values if limits_H is None else limits_H
            kept = (norms_HN <= limits_H[:, None]).all(dim=0)
            for file, acts in zip(files, each, strict=True):
                acts[kept].to(torch.bfloat16).contiguous().view(torch.uint16).numpy().tofile(file)
            if start % 400 == 0:
                print(f"{part}: {start:,} of {len(rows_NT):,} contexts", flush=True)
        for file in files:
            file.close()


def activations(directory: Path, part: str, hook: str, d_in: int) -> torch.Tensor:
    values = np.memmap(directory / f"{part}_{hook}.bin", np.uint16, "c").reshape(-1, d_in)
    return torch.from_numpy(values).view(torch.bfloat16)


def train(run: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Trains one SAE and returns what it is like on held-out activations."""
    torch.set_num_threads(1)
    hook, d_in = run.get("hook", HOOK), 576
    settings = with_recipe(parse_training_flags(flags_of(run)), d_in).settings
    cfg = build_runner_config(settings, hook, d_in=d_in, device="cpu", run_id="run")
    n_steps, batch = cfg.training_tokens // cfg.train_batch_size_tokens, cfg.train_batch_size_tokens
    all_ND = activations(directory, "training", hook, d_in)
    pool_ND = all_ND[: min(n_steps * batch, len(all_ND))]
    generator = torch.Generator().manual_seed(cfg.seed)
    passes = -(-n_steps * batch // len(pool_ND))
    order = torch.cat([torch.randperm(len(pool_ND), generator=generator) for _ in range(passes)])
    sae = create_sae(cfg)
    trainer_cfg = cfg.to_sae_trainer_config()
    trainer_cfg.logger = LoggingConfig(log_to_wandb=False)
    trainer = Trainer(trainer_cfg, sae, iter(()))
    trainer.products_in_bfloat16 = True
    first_ND = pool_ND[order[: 20 * 1024]].float()
    trainer.activation_scaler.scaling_factor = math.sqrt(d_in) / first_ND.norm(dim=-1).mean().item()
    _begin(sae, run, settings, first_ND * trainer.activation_scaler.scaling_factor, generator)
    started = time.perf_counter()
    k_end = sae.cfg.k
    for step, batch_rows in enumerate(order[: n_steps * batch].split(batch)):
        if "k_from" in run:  # falls evenly over the first half of the steps
            sae.cfg.k = max(k_end, run["k_from"] + (k_end - run["k_from"]) * 2 * step / n_steps)
        trainer.step(pool_ND[batch_rows].float())
        trainer.n_training_steps += 1
    seconds = time.perf_counter() - started
    optimization = settings.optimization
    chosen = {"steps": n_steps, "batch": batch, "lr": cfg.lr, "window": optimization.dead_feature_window}
    return chosen | {"seconds": round(seconds, 1)} | measure(trainer, activations(directory, "held_out", hook, d_in))


@torch.no_grad()
def _begin(
    sae: Any, run: dict[str, Any], settings: TrainingSettings, acts_ND: torch.Tensor, generator: torch.Generator
) -> None:
    """Sets the weights at the first step from scaled activations, where the run asks for it."""
    mean_D = acts_ND.mean(dim=0)
    if settings.sae.b_dec_init_method == "mean":
        sae.b_dec.copy_(mean_D)
    share = {"data": 1.0, "a third data": 0.3, "half data": 0.5}.get(run.get("decoder", ""))
    if share is not None:
        drawn = torch.randint(len(acts_ND), (sae.cfg.d_sae,), generator=generator)
        data_FD = torch.nn.functional.normalize(acts_ND[drawn] - mean_D, dim=-1)
        noise_FD = torch.nn.functional.normalize(sae.W_dec, dim=-1)
        mixed_FD = torch.nn.functional.normalize(share * data_FD + (1 - share) * noise_FD, dim=-1)
        sae.W_dec.copy_(mixed_FD * sae.cfg.decoder_init_norm)
        sae.W_enc.copy_(sae.W_dec.t())
    sae.W_enc.mul_(run.get("encoder", 1.0))


@torch.no_grad()
def measure(trainer: Trainer, held_out_ND: torch.Tensor) -> dict[str, float]:
    """Returns the evaluation's metrics, but for loss recovered, of the SAE as the run would save it."""
    if trainer.sample is not None:
        trainer.sample.hold(held_out_ND)
    sae = finished_copy(trainer, trainer.calibrate())
    mean_D = held_out_ND.float().mean(dim=0)
    firings_F = torch.zeros(sae.cfg.d_sae)
    squared_error = variance = 0.0
    for acts_ND in held_out_ND.split(2048):
        acts_ND = acts_ND.float()
        features_NF = sae.encode(acts_ND)
        firings_F += (features_NF > 0).sum(dim=0)
        squared_error += (sae.decode(features_NF) - acts_ND).square().sum().item()
        variance += (acts_ND - mean_D).square().sum().item()
    alive_F = firings_F > 0
    return {
        "explained_variance": round(1 - squared_error / variance, 4),
        "l0": round(firings_F.sum().item() / len(held_out_ND), 2),
        "dead": round(1 - alive_F.float().mean().item(), 4),
        "absorption": round(measure_cosines(sae.W_dec, alive_F, seed=0).mean, 4),
    }


def results(directory: Path) -> dict[str, dict[str, Any]]:
    """Returns the finished runs, by their settings as JSON."""
    file = directory / "results.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return {json.dumps(each["run"], sort_keys=True): each for each in map(json.loads, lines)}


def train_parts(directory: Path, parts: list[str]) -> None:
    done = results(directory)
    runs = {key: run for part in parts for run in PARTS[part] if (key := json.dumps(run, sort_keys=True)) not in done}

    def trial(config: dict[str, str]) -> None:
        os.chdir(ROOT)
        run = json.loads(config["run"])
        line = json.dumps({"run": run} | train(run, directory))
        with (directory / "results.jsonl").open("a") as file:  # a line is written at once
            file.write(line + "\n")
        tune.report({"done": 1})

    if runs:
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        tuner = tune.Tuner(
            tune.with_resources(trial, {"cpu": 1}),
            param_space={"run": tune.grid_search(list(runs))},
            run_config=tune.RunConfig(storage_path=str(directory / "ray"), verbose=1),
        )
        tuner.fit()


def rows(directory: Path, parts: list[str]) -> Iterator[str]:
    """Yields a Markdown table of the finished runs of some parts."""
    done = results(directory)
    found = [done[key] for part in parts for run in PARTS[part] if (key := json.dumps(run, sort_keys=True)) in done]
    names = list(dict.fromkeys(name for each in found for name in each["run"]))
    names = [name for name in names if len({json.dumps(each["run"].get(name)) for each in found}) > 1]
    names += [name for name in ("steps", "batch", "lr", "window") if name not in names]
    yield f"| {' | '.join([*names, *MEASURED])} |"
    yield f"|{' --- |' * len(names)}{' ---: |' * len(MEASURED)}"
    for each in found:
        values = [each.get(name, each["run"].get(name, "")) for name in names] + [each[name] for name in MEASURED]
        yield f"| {' | '.join(map(str, values))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("collect", "train", "show"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("parts", nargs="*", help=f"of {' '.join(PARTS)}")
    flags = parser.parse_args()
    if unknown := set(flags.parts) - PARTS.keys():
        parser.error(f"no part {' '.join(sorted(unknown))}; the parts are {' '.join(PARTS)}")
    directory, parts = flags.directory.absolute(), flags.parts or list(PARTS)
    directory.mkdir(parents=True, exist_ok=True)
    if flags.what == "collect":
        collect(directory)
    elif flags.what == "train":
        train_parts(directory, parts)
    print("\n".join(rows(directory, parts)))


if __name__ == "__main__":
    main()
