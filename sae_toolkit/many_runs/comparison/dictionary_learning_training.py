"""Trains one SAE of a comparison with dictionary_learning's own trainer, and searches the penalty for its target L0."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_toolkit.files.own_environments import OwnEnvironment
from sae_toolkit.many_runs.comparison.contenders import Entry
from sae_toolkit.many_runs.comparison.learning_rates import DEMO_LR, DEMO_STEPS
from sae_toolkit.many_runs.comparison.library_trainings import Batches, run_training
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
_MAX_TRIALS, _TOLERANCE = 4, 0.1


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
    for trial in range(1, _MAX_TRIALS + 1):
        penalty = next_penalty(tried, entry.l0, first, elsewhere, own)
        result, l0 = _train(entry, shared, entry.directory / f"trial{trial}", penalty)
        tried.append((penalty, l0))
        own.append((penalty, l0))
        log.info("%s: a penalty of %.3g gives an L0 of %.1f", entry.name, penalty, l0)
        if not best or _distance(l0, entry.l0) < _distance(best["l0"], entry.l0):
            best = result | {"penalty": penalty, "l0": l0}
        if _distance(l0, entry.l0) <= math.log(1 + _TOLERANCE):
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


def _distance(l0: float, target: float) -> float:
    return abs(math.log(max(l0, 1e-3) / target))


def tried_before(entry: Entry) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Returns penalty and L0 of all earlier trainings of the same kind, whatever their target L0 and seed.

    First those with the same learning rate, then those with others, each training once: the results of two searches
    can hold the same earlier one.
    """
    same: list[tuple[float, float]] = []
    others: list[tuple[float, float]] = []
    kind = entry.directory.name.partition("-l0_")[0]
    for path in sorted(entry.directory.parent.glob(f"dictionary_learning-{entry.contender.architecture}-*")):
        of_rate = same if path.name.startswith(f"{kind}-l0_") else others
        of_rate += [(penalty, l0) for penalty, l0 in (read_result(path) or {}).get("tried", [])]
    return list(dict.fromkeys(same)), list(dict.fromkeys(others))


def next_penalty(
    tried: Sequence[tuple[float, float]],
    target: float,
    first: float,
    elsewhere: Sequence[tuple[float, float]] = (),
    own: Sequence[tuple[float, float]] = (),
) -> float:
    """Returns the sparsity penalty to try next, read off a line of log penalty over log L0 at the target.

    The line goes through the trial with the L0 nearest to the target. Its slope comes from the next nearest trial that
    fits it, with a lower L0 at a higher penalty. If there is none, it comes from `elsewhere` in the same way, and else
    is -1. It is limited to [-3, -0.2]. A penalty that the search itself has tried is not tried again: where L0 does not
    fall with the penalty, the search goes on from its own nearest trial, by further steps of the same size.

    Args:
        tried: pairs of penalty and L0.
        target: the L0 that is wanted.
        first: the penalty to begin with.
        elsewhere: pairs of penalty and L0 with other learning rates, where the search begins if `tried` is empty.
        own: the pairs among `tried` that this search has trained, none of them near enough to the target to end it.
    """
    points = _nearest_first(tried or elsewhere, target)
    if not points:
        return first
    slope = min(max(_slope(points) or _slope(_nearest_first(elsewhere, target)) or -1.0, -3.0), -0.2)

    def step_from(point: tuple[float, float]) -> float:
        return slope * (math.log(target) - point[0])

    proposed = points[0][1] + step_from(points[0])
    if own and _is_among(proposed, own):
        nearest_own = _nearest_first(own, target)[0]
        proposed = nearest_own[1] + step_from(nearest_own)
        while _is_among(proposed, own):
            proposed += step_from(nearest_own)
    return math.exp(proposed)


def _is_among(log_penalty: float, tried: Sequence[tuple[float, float]]) -> bool:
    return any(abs(math.log(penalty) - log_penalty) < 0.01 for penalty, _ in tried)


def _nearest_first(tried: Sequence[tuple[float, float]], target: float) -> list[tuple[float, float]]:
    """Returns log L0 and log penalty of each trial, that with the L0 nearest to the target first."""
    points = {(math.log(max(l0, 1e-3)), math.log(penalty)) for penalty, l0 in tried}
    return sorted(points, key=lambda point: (abs(point[0] - math.log(target)), point))


def _slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Returns the slope from the first point to the next with which it falls; None if there is no such point."""
    for l0, penalty in points[1:]:
        run, rise = l0 - points[0][0], penalty - points[0][1]
        if abs(run) > 0.05 and rise * run < 0:
            return rise / run
    return None


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
