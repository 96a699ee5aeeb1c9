"""Trains one SAE of a comparison with dictionary_learning's own trainer."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

from sae_toolkit.files.own_environments import OwnEnvironment
from sae_toolkit.many_runs.comparison.contenders import Entry
from sae_toolkit.many_runs.comparison.learning_rates import DEMO_LR, DEMO_STEPS
from sae_toolkit.many_runs.comparison.library_trainings import Batches, run_training
from sae_toolkit.many_runs.comparison.penalty_search import MAX_TRIALS, TOLERANCE, distance, next_penalty, tried_before
from sae_toolkit.many_runs.comparison.shared_activations import Shared
from sae_toolkit.many_runs.directories import read_result, write_result

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
# The settings of dictionary_learning_demo, which are for 500 M tokens in batches of 2,048. In a shorter run, each
# schedule takes the same share of the steps. The running mean of the threshold spans at least 20 steps, because it
# would be noisy over fewer.
_WARM_UP, _SPARSITY_WARM_UP, _THRESHOLD_START, _ANNEAL_START = 1000, 5000, 1000, 10_000
_DECAY_START, _NORM_BATCHES, _MIN_MEMORY = 0.8, 100, 20
# The first penalty of a search: the middle of those that dictionary_learning_demo tries.
_FIRST_PENALTIES = {"standard": 0.03, "gated": 0.024, "p_anneal": 0.01}


def train_dictionary_learning(entry: Entry, shared: Shared) -> dict[str, Any]:
    """Trains with the library's own trainer. If a penalty sets the L0, trains several times to search for the penalty.

    Returns:
        The result that `train_saelens` describes, for the training whose L0 is nearest to the target. A search adds
        `penalty` and `l0` of this training, and `tried`: penalty and L0 of all trainings of the same kind and learning
        rate so far, those of other entries included.
    """
    first = _FIRST_PENALTIES.get(entry.contender.architecture)
    if first is None:
        result, _ = _train(entry, shared, entry.directory / "trial1", None)
        return result
    tried, elsewhere = tried_before(entry)
    own: list[tuple[float, float]] = []
    best: dict[str, Any] = {}
    for trial in range(1, MAX_TRIALS + 1):
        penalty = next_penalty(tried, entry.l0, first, elsewhere, own)
        result, l0 = _train(entry, shared, entry.directory / f"trial{trial}", penalty)
        tried.append((penalty, l0))
        own.append((penalty, l0))
        log.info("%s: a penalty of %.3g gives an L0 of %.1f", entry.name, penalty, l0)
        if not best or distance(l0, entry.l0) < distance(best["l0"], entry.l0):
            best = result | {"penalty": penalty, "l0": l0}
        if distance(l0, entry.l0) <= math.log(1 + TOLERANCE):
            break
    return best | {"tried": tried}


def _train(entry: Entry, shared: Shared, directory: Path, penalty: float | None) -> tuple[dict[str, Any], float]:
    """Trains once, on this project's batches. Returns the result as `train_saelens` does, and the L0.

    A training that an earlier search, which was stopped, has finished with the same settings is not repeated.
    """
    job = _job(entry, shared, directory, penalty)
    before = read_result(directory)
    if before and before["job"] == job and Path(before["result"]["sae"]).is_dir():
        return before["result"], before["l0"]
    python = DICTIONARY_LEARNING.python()
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    job_file = directory / "job.json"
    job_file.write_text(json.dumps(job, indent=1))
    batches = Batches(shared, entry.seed, [job["norm_batches"], job["steps"]])
    seconds, peak = run_training(
        entry,
        [python, Path(__file__).with_name("dictionary_learning_worker.py"), job_file],
        n_tokens=shared.n_steps * shared.run.cfg.train_batch_size_tokens,
        n_done=lambda: batches.n_tokens,
        environment=shared.environment,
        feed=batches.write,
    )
    trained = json.loads((directory / "trained.json").read_text())
    result = {
        "sae": str(directory / "trainer_0"),
        "seconds": seconds,
        "peak_bytes": trained["peak_bytes"] or peak,
        "lr": job["arguments"]["lr"],
    }
    write_result(directory, {"job": job, "result": result, "l0": trained["l0"]})
    return result, trained["l0"]


def _job(entry: Entry, shared: Shared, directory: Path, penalty: float | None) -> dict[str, Any]:
    """Returns what dictionary_learning_worker.py reads from JOB.json."""
    cfg, n_steps, name = shared.run.cfg, shared.n_steps, entry.contender.architecture

    def scaled(steps: int) -> int:
        return max(1, round(steps * n_steps / DEMO_STEPS))

    arguments: dict[str, Any] = {
        "activation_dim": cfg.sae.d_in,
        "dict_size": cfg.sae.d_sae,
        "lm_name": shared.run.model.name,
        "submodule_name": cfg.hook_name,
        "seed": entry.seed,
        "device": cfg.device,
        "lr": entry.lr or DEMO_LR,
        "warmup_steps": scaled(_WARM_UP),
        "decay_start": max(scaled(_WARM_UP) + 1, int(_DECAY_START * n_steps)),
    }
    if name in ("topk", "batchtopk", "matryoshka"):
        memory = max(_MIN_MEMORY, scaled(_THRESHOLD_START))
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
        "layer": shared.settings.model.layer,
        "context_size": cfg.context_size,
        "batch": cfg.train_batch_size_tokens,
        "d_in": cfg.sae.d_in,
        "norm_batches": min(_NORM_BATCHES, n_steps),
        "steps": n_steps,
        "directory": str(directory),
    }
