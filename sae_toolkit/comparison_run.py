"""Trains and evaluates the SAEs of a comparison, one after the other, each by its own library's training code."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens.util import dtype_to_str

from sae_toolkit.comparison import ARCHITECTURES, Entry
from sae_toolkit.errors import UserError
from sae_toolkit.many_runs import (
    ROOT,
    finished_sae,
    last_line_of,
    read_result,
    readings_of,
    script,
    start_process,
    write_result,
)
from sae_toolkit.own_environments import OwnEnvironment
from sae_toolkit.prepared_run import PreparedRun
from sae_toolkit.progress import Progress
from sae_toolkit.token_rows import special_tokens
from sae_toolkit.training import Training, open_activations
from sae_toolkit.training_flags import parse_training_flags
from sae_toolkit.training_setup import prepare_run

log = logging.getLogger(__name__)

DICTIONARY_LEARNING = OwnEnvironment(
    "dictionary-learning",
    "dictionary_learning",
    "--libraries dictionary_learning",
    imports="dictionary_learning",
    python_versions=((3, 11), (3, 12)),
    because="the versions that dictionary_learning needs are listed for Python 3.11 and 3.12",
    takes="2 GB, some minutes",
)
# dictionary_learning_demo's settings, and the 500 M tokens in batches of 2,048 that they are for: schedules are a share
# of these steps. The threshold's memory is not under 20 steps, of which it would be noise.
_THEIR_STEPS = 500_000_000 // 2048
_THEIR_LR, _WARM_UP, _SPARSITY_WARM_UP, _THRESHOLD_START, _ANNEAL_START = 3e-4, 1000, 5000, 1000, 10_000
_DECAY_START, _NORM_BATCHES, _LEAST_MEMORY = 0.8, 100, 20
# Where the search for a penalty begins: the middle of what dictionary_learning_demo tries.
_PENALTIES = {"standard": 0.03, "gated": 0.024, "p_anneal": 0.01}
_MOST_TRIALS, _NEAR = 4, 0.1
_SECONDS_BETWEEN_LOOKS = 0.5


class _Failed(Exception):
    """A training that came to nothing; says why."""


@dataclass(frozen=True)
class Shared:
    """What all SAEs of a comparison have in common.

    Args:
        words: of the command line of sae_lens_train.py.
        flags: parsed from these.
        run: the same, prepared; not to be started.
        directory: of the comparison.
        reference: an SAE, not trained, whose record says on what all are measured.
    """

    words: list[str]
    flags: argparse.Namespace
    run: PreparedRun
    directory: Path
    reference: Path

    @property
    def n_steps(self) -> int:
        return -(-self.run.cfg.training_tokens // self.run.cfg.train_batch_size_tokens)

    def of_seed(self, seed: int) -> Training:
        """A training of ours at its first step, for its stream of batches."""
        words = [*self.words, "--seed", str(seed), "--held_out_seed", str(self.run.metadata()["held_out_seed"])]
        run = prepare_run(parse_training_flags(words))
        return Training(run, open_activations(run))


def share(words: Sequence[str], directory: Path) -> Shared:
    """Checks what all SAEs are trained on, and computes the activations that are not in the cache.

    Args:
        words: of the command line of sae_lens_train.py.
        directory: of the comparison.

    Raises:
        UserError: training would refuse the flags, or the cache is of other activations.
    """
    words = [*words, "--checkpoint_path", str(directory / "runs"), "--eval_every", "0"]
    flags = parse_training_flags(words)
    if flags.cache_activations is None:
        words += ["--cache_activations", str(directory / "activations")]
        flags = parse_training_flags(words)
    run = prepare_run(flags)
    activations = open_activations(run)
    rows = torch.from_numpy(run.rows_NT.astype(np.int64))
    with Progress("activations", len(rows), unit="contexts", device=run.cfg.device) as progress:
        for batch_BT in rows.split(flags.store_batch_size_prompts):
            activations.activations(batch_BT)
            progress.advance(len(batch_BT))
    reference = directory / ".measured_like"
    sae = next(iter(Training(run, activations).saes.values()))
    sae.save_inference_model(reference)
    return Shared(words, flags, run, directory, reference)


def describe(shared: Shared) -> list[str]:
    """What the numbers of a comparison are of, a paragraph each."""
    cfg, flags = shared.run.cfg, shared.flags
    return [
        f"{shared.run.model.name}, {cfg.hook_name}; {cfg.training_tokens:,} tokens of {shared.run.text.name} in"
        f" {shared.n_steps:,} steps of {cfg.train_batch_size_tokens:,}; {cfg.sae.d_sae:,} features on"
        f" {cfg.sae.d_in:,} dimensions. All are measured on the same documents, which none was trained on, and at the"
        " same positions.",
        f"SAELens is trained by sae_lens_train.py with lr {flags.lr:g} (or the one named), {flags.lr_warm_up_steps}"
        f" steps of warm-up, {flags.lr_decay_steps} of decay, a dead-feature window of {flags.dead_feature_window} and"
        f" activations normalized by {flags.normalize_activations}; an L0 that is an outcome by --target_l0.",
        "sparsify trains with its own Trainer and defaults (signum, its own learning rate) on the same rows of tokens"
        " but from the live model, whose time is in its seconds, at all positions but special tokens: it cannot leave"
        " massive activations out.",
        "dictionary_learning trains with its own trainers on the same batches and dictionary_learning_demo's settings"
        f" (lr {_THEIR_LR:g} unless one is named); warm-ups are the share of the steps that they are there. Where L0 is"
        " an outcome its penalty is searched by whole trainings, of which the nearest counts.",
        "Seconds are of the process that trains, its start included; activations were computed before, but not for"
        " sparsify. Peak memory is " + ("resident." if cfg.device == "cpu" else "that of the GPU."),
    ]


def train_entry(entry: Entry, shared: Shared) -> None:
    """Trains an SAE, unless that was done before; what it came to lies in its directory.

    Raises:
        UserError: it could not be trained.
    """
    if entry.trained():
        return
    entry.directory.mkdir(parents=True, exist_ok=True)
    trainings: dict[str, Callable[[Entry, Shared], dict[str, Any]]] = {
        "saelens": _train_saelens,
        "sparsify": _train_sparsify,
        "dictionary_learning": _train_dictionary_learning,
    }
    try:
        write_result(entry.directory, trainings[entry.contender.library](entry, shared))
    except _Failed as error:
        raise UserError(f"{entry.name}: {error}") from None


def _train_saelens(entry: Entry, shared: Shared) -> dict[str, Any]:
    architecture = ARCHITECTURES["saelens"][entry.contender.architecture]
    words = [*shared.words, "--architecture", architecture, "--output_name", "sae", "--resume"]
    words += ["--checkpoint_path", str(entry.directory), "--seed", str(entry.seed)]
    words += ["--held_out_seed", str(shared.run.metadata()["held_out_seed"])]
    searched = architecture in ("standard", "gated", "jumprelu")
    words += ["--target_l0" if searched else "--k", str(entry.l0)]
    if entry.contender.lr is not None:
        words += ["--lr", str(entry.contender.lr)]
    batch = shared.run.cfg.train_batch_size_tokens

    def done() -> int:
        readings = readings_of(entry.directory)
        return readings[-1]["details/n_training_samples"] if readings else 0

    work = _Work(entry, [*script("sae_lens_train.py"), *words], shared.n_steps * batch)
    seconds, peak = work.run(done, WANDB_RUN_GROUP=shared.directory.name)
    sae = finished_sae(entry.directory)
    if sae is None:
        raise _Failed("left no SAE")
    readings = readings_of(entry.directory)
    if shared.run.cfg.device != "cpu":
        peak = int(2**30 * max((reading["details/memory_gib"] for reading in readings), default=0.0))
    return {"sae": str(sae), "seconds": seconds, "peak_bytes": peak, "lr": _lr_of(words)}


def _lr_of(words: Sequence[str]) -> float:
    return parse_training_flags(list(words)).lr


def _train_sparsify(entry: Entry, shared: Shared) -> dict[str, Any]:
    if find_spec("sparsify") is None:
        raise _Failed("not installed: python -m pip install -c constraints.txt -r requirements-comparison.txt")
    run = shared.run
    layer = run.cfg.hook_name.removeprefix("blocks.").removesuffix(".hook_resid_post")
    if not layer.isdigit():
        raise _Failed(f"trains on outputs of modules, and not at {run.cfg.hook_name}")
    from sae_toolkit.models import load_tokenizer

    cfg = run.cfg
    rows = -(-cfg.train_batch_size_tokens // cfg.context_size)  # of a batch, which it counts in contexts
    order = np.random.default_rng((entry.seed, 0)).permutation(len(run.rows_NT))
    wanted = min(shared.n_steps * rows, len(order))
    np.save(entry.directory / "rows.npy", run.rows_NT[order[:wanted]])
    training: dict[str, Any] = {
        "batch_size": rows,
        "init_seeds": [entry.seed],
        "exclude_tokens": list(special_tokens(shared.flags.exclude_special_tokens, load_tokenizer(run.model))),
    }
    if entry.contender.lr is not None:
        training["lr"] = entry.contender.lr
    hookpoint = f"layers.{layer}"
    job = {
        "model_name": run.model.name,
        "model_kwargs": run.model.model_kwargs,
        "trust_remote_code": run.model.trust_remote_code,
        "lm_dtype": dtype_to_str(run.lm_dtype),
        "device": cfg.device,
        "hook_name": cfg.hook_name,
        "hookpoint": hookpoint,
        "rows": str(entry.directory / "rows.npy"),
        "sae": {"num_latents": cfg.sae.d_sae, "k": entry.l0},
        "training": training,
        "directory": str(entry.directory),
    }
    (entry.directory / "job.json").write_text(json.dumps(job, indent=1))
    command = [*script("")[:1], "-m", "sae_toolkit.sparsify_worker", str(entry.directory / "job.json")]

    def done() -> int:
        with suppress(OSError, ValueError):
            return int((entry.directory / "steps").read_text()) * rows * cfg.context_size
        return 0

    seconds, peak = _Work(entry, command, wanted * cfg.context_size).run(done, PYTHONPATH=str(ROOT))
    (entry.directory / "rows.npy").unlink()
    on_gpu = json.loads((entry.directory / "trained.json").read_text())["peak_bytes"]
    sae = entry.directory / "sae" / hookpoint
    return {"sae": str(sae), "seconds": seconds, "peak_bytes": on_gpu or peak, "lr": entry.contender.lr}


def _train_dictionary_learning(entry: Entry, shared: Shared) -> dict[str, Any]:
    python = DICTIONARY_LEARNING.python()
    name, cfg = entry.contender.architecture, shared.run.cfg
    tried = _penalties_known(entry) if name in _PENALTIES else []
    best: dict[str, Any] | None = None
    for trial in range(1, _MOST_TRIALS + 1):
        penalty = next_penalty(tried, entry.l0, _PENALTIES[name]) if name in _PENALTIES else None
        directory = entry.directory / f"trial{trial}"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        job = _dictionary_learning_job(entry, shared, directory, penalty)
        (directory / "job.json").write_text(json.dumps(job, indent=1))
        command = [python, ROOT / "sae_toolkit" / "dictionary_learning_worker.py", directory / "job.json"]
        work = _Work(entry, command, shared.n_steps * cfg.train_batch_size_tokens)
        seconds, peak = work.run_fed(shared, job)
        trained = json.loads((directory / "trained.json").read_text())
        result = {
            "sae": str(directory / "trainer_0"),
            "seconds": seconds,
            "peak_bytes": trained["peak_bytes"] or peak,
            "lr": job["arguments"]["lr"],
        }
        if penalty is None:
            return result
        tried.append((penalty, trained["l0"]))
        log.info("%s: a penalty of %.3g gives an L0 of %.1f", entry.name, penalty, trained["l0"])
        if best is None or _off(trained["l0"], entry.l0) < _off(best["l0"], entry.l0):
            best = result | {"penalty": penalty, "l0": trained["l0"]}
        if _off(trained["l0"], entry.l0) <= math.log(1 + _NEAR):
            break
    assert best is not None
    return best | {"tried": tried}


def _off(l0: float, target: float) -> float:
    return abs(math.log(max(l0, 1e-3) / target))


def _penalties_known(entry: Entry) -> list[tuple[float, float]]:
    """What trainings of the same kind came to, at any L0 and with any seed: pairs of penalty and L0."""
    kind = entry.directory.name.partition("-l0_")[0]
    results = [read_result(path) for path in sorted(entry.directory.parent.glob(f"{kind}-l0_*"))]
    return [(penalty, l0) for result in results if result for penalty, l0 in result.get("tried", [])]


def next_penalty(tried: Sequence[tuple[float, float]], target: float, first: float) -> float:
    """A sparsity penalty for an L0, from those that were tried: on the line through the two nearest, in logarithms.

    Args:
        tried: pairs of penalty and L0.
        target: the L0.
        first: the penalty where nothing was tried.
    """
    if not tried:
        return first
    points = sorted({(math.log(max(l0, 1e-3)), math.log(penalty)) for penalty, l0 in tried})
    wanted = math.log(target)
    nearest = sorted(points, key=lambda point: abs(point[0] - wanted))
    (l0, penalty), *others = nearest
    slope = -1.0  # of the penalty over L0, where there is one point alone
    for other_l0, other_penalty in others:
        if abs(other_l0 - l0) > 0.05 and (other_penalty - penalty) * (other_l0 - l0) < 0:
            slope = (other_penalty - penalty) / (other_l0 - l0)
            break
    return math.exp(penalty + min(max(slope, -3.0), -0.2) * (wanted - l0))


def _dictionary_learning_job(entry: Entry, shared: Shared, directory: Path, penalty: float | None) -> dict[str, Any]:
    cfg, n_steps, name = shared.run.cfg, shared.n_steps, entry.contender.architecture

    def scaled(steps: int) -> int:
        return max(1, round(steps * n_steps / _THEIR_STEPS))

    arguments: dict[str, Any] = {
        "activation_dim": cfg.sae.d_in,
        "dict_size": cfg.sae.d_sae,
        "lm_name": shared.run.model.name,
        "submodule_name": cfg.hook_name,
        "seed": entry.seed,
        "device": cfg.device,
        "lr": entry.contender.lr or _THEIR_LR,
        "warmup_steps": scaled(_WARM_UP),
        "decay_start": max(scaled(_WARM_UP) + 1, int(_DECAY_START * n_steps)),
    }
    if name in ("topk", "batchtopk", "matryoshka"):
        memory = max(_LEAST_MEMORY, scaled(_THRESHOLD_START))
        arguments |= {"k": entry.l0, "threshold_start_step": scaled(_THRESHOLD_START)}
        arguments |= {"threshold_beta": 1 - 1 / memory}
    else:
        arguments["sparsity_warmup_steps"] = scaled(_SPARSITY_WARM_UP)
    if name == "matryoshka":
        arguments["group_fractions"] = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32]
    if name == "jumprelu":
        arguments["target_l0"] = entry.l0
    if name in ("standard", "gated"):
        arguments["l1_penalty"] = penalty
    if name == "p_anneal":
        arguments |= {"initial_sparsity_penalty": penalty, "sparsity_function": "Lp^p", "p_end": 0.2}
        arguments |= {"anneal_start": scaled(_ANNEAL_START)}
    return {
        "trainer": name,
        "arguments": arguments,
        "layer": shared.flags.layer,
        "context_size": cfg.context_size,
        "batch": cfg.train_batch_size_tokens,
        "d_in": cfg.sae.d_in,
        "norm_batches": min(_NORM_BATCHES, n_steps),
        "steps": n_steps,
        "directory": str(directory),
    }


class _Work:
    """A training as a process of its own, with its progress.

    Args:
        entry: what is trained.
        command: of the process.
        total: tokens.
    """

    def __init__(self, entry: Entry, command: Sequence[str | Path], total: int) -> None:
        self.entry = entry
        self.command = command
        self.total = total
        self.log = entry.directory / "training.log"

    def run(self, done: Callable[[], int], **environment: str) -> tuple[float, int]:
        """Runs it to its end.

        Args:
            done: says how many tokens it has trained on.

        Returns:
            Seconds from its start to its end, and the most bytes of memory that it held.

        Raises:
            _Failed: it ended badly.
        """
        return self._run(done, lambda process: None, None, environment)

    def run_fed(self, shared: Shared, job: dict[str, Any]) -> tuple[float, int]:
        """Likewise, with batches of activations in its standard input: first those for the norm, then all."""
        n_done = 0
        norm_batches, all_batches = (shared.of_seed(self.entry.seed).stream for _ in range(2))

        def feed(process: subprocess.Popen[bytes]) -> None:
            nonlocal n_done
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin:
                for stream, n in ((norm_batches, job["norm_batches"]), (all_batches, job["steps"])):
                    for _ in range(n):
                        acts_ND = next(stream)
                        process.stdin.write(acts_ND.float().cpu().contiguous().numpy().data)
                        n_done += len(acts_ND) if stream is all_batches else 0

        def start(process: subprocess.Popen[bytes]) -> None:
            threading.Thread(target=feed, args=(process,), daemon=True).start()

        return self._run(lambda: n_done, start, subprocess.PIPE, {})

    def _run(
        self,
        done: Callable[[], int],
        start: Callable[[subprocess.Popen[bytes]], None],
        stdin: int | None,
        environment: dict[str, str],
    ) -> tuple[float, int]:
        started = time.monotonic()
        with self.log.open("w") as out, Progress(self.entry.name, self.total) as progress:
            process = start_process(self.command, output=out, log=out, stdin=stdin or subprocess.DEVNULL, **environment)
            start(process)
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                progress.advance(done() - progress.done)
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise _Failed(f"{last_line_of(self.log).removeprefix('error: ')} ({self.log})")
        return time.monotonic() - started, usage.ru_maxrss * 1024


def evaluate_entries(entries: Sequence[Entry], shared: Shared, words: Sequence[str]) -> dict[Entry, str]:
    """Evaluates the SAEs that were not yet, in one pass of the model.

    Args:
        entries: those that were trained.
        shared: what they were trained on.
        words: more flags of evaluate_sae_real_activations.py.

    Returns:
        Why some could not be.
    """
    missing = [entry for entry in entries if entry.trained() and not entry.evaluation()]
    if not missing or _evaluate(missing, shared, words) is None:
        return {}
    failed = {}
    for entry in missing:  # one of them stops them all
        if not entry.evaluation() and (why := _evaluate([entry], shared, words)):
            failed[entry] = why
    return failed


def _evaluate(entries: Sequence[Entry], shared: Shared, words: Sequence[str]) -> str | None:
    paths = [result["sae"] for entry in entries if (result := entry.trained())]
    log.info("evaluating %d SAEs", len(paths))
    said = shared.directory / "evaluation.log"
    command = [*script("evaluate_sae_real_activations.py"), "--sae_path", *paths, "--like", shared.reference]
    command += ["--no_diagnosis", "--n_features", "0", "--device", shared.run.cfg.device, *words]
    n_done = 0

    def all_done() -> int:
        return sum(entry.evaluation() is not None for entry in entries)

    with said.open("w") as out, Progress("evaluation", len(entries), unit="SAEs") as progress:
        process = start_process(command, output=out, log=out)
        while process.poll() is None:
            progress.advance(all_done() - progress.done)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        n_done = all_done()
    if process.returncode == 0:
        return None if n_done == len(entries) else "was not evaluated"
    return last_line_of(said).removeprefix("error: ")
