"""dictionary_learning's trainers on our batches: its settings, and the penalty for an L0 that is an outcome."""

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
from sae_toolkit.many_runs.comparison.library_trainings import Work
from sae_toolkit.many_runs.comparison.shared_activations import Shared
from sae_toolkit.many_runs.processes import read_result

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
THEIR_LR, _WARM_UP, _SPARSITY_WARM_UP, _THRESHOLD_START, _ANNEAL_START = 3e-4, 1000, 5000, 1000, 10_000
_DECAY_START, _NORM_BATCHES, _LEAST_MEMORY = 0.8, 100, 20
# Where the search for a penalty begins: the middle of what dictionary_learning_demo tries.
_PENALTIES = {"standard": 0.03, "gated": 0.024, "p_anneal": 0.01}
_MOST_TRIALS, _NEAR = 4, 0.1


def train_dictionary_learning(entry: Entry, shared: Shared) -> dict[str, Any]:
    """Trains by the library's own trainer, with several penalties where L0 is an outcome, of which the nearest counts.

    Returns:
        What `train_saelens` does; with a penalty also `penalty`, `l0` and `tried`, pairs of both.
    """
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
        command = [python, Path(__file__).with_name("dictionary_learning_worker.py"), directory / "job.json"]
        work = Work(entry, command, shared.n_steps * cfg.train_batch_size_tokens)
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
        "lr": entry.contender.lr or THEIR_LR,
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
        "layer": shared.settings.model.layer,
        "context_size": cfg.context_size,
        "batch": cfg.train_batch_size_tokens,
        "d_in": cfg.sae.d_in,
        "norm_batches": min(_NORM_BATCHES, n_steps),
        "steps": n_steps,
        "directory": str(directory),
    }
