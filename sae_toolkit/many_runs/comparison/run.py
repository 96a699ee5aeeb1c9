"""The SAEs of a comparison, trained one after the other and evaluated together."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from sae_toolkit.errors import UserError
from sae_toolkit.many_runs.comparison.contenders import Entry
from sae_toolkit.many_runs.comparison.dictionary_learning_training import THEIR_LR, train_dictionary_learning
from sae_toolkit.many_runs.comparison.library_trainings import TrainingFailed, train_saelens, train_sparsify
from sae_toolkit.many_runs.comparison.shared_activations import Shared
from sae_toolkit.many_runs.processes import last_line_of, script, start_process, write_result
from sae_toolkit.terminal.progress import Progress

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LOOKS = 0.5
_EVALUATED = re.compile(r"^evaluating: ([\d.]+)% tokens=(\d+)", re.MULTILINE)  # the evaluation's line of progress


def describe(shared: Shared) -> list[str]:
    """What the numbers of a comparison are of, a paragraph each."""
    cfg, ours = shared.run.cfg, shared.settings.optimization
    return [
        f"{shared.run.model.name}, {cfg.hook_name}; {cfg.training_tokens:,} tokens of {shared.run.text.name} in"
        f" {shared.n_steps:,} steps of {cfg.train_batch_size_tokens:,}; {cfg.sae.d_sae:,} features on"
        f" {cfg.sae.d_in:,} dimensions. All are measured on the same documents, which none was trained on, and at the"
        " same positions.",
        f"SAELens is trained by sae_lens_train.py with lr {ours.lr:g} (or the one named), {ours.lr_warm_up_steps}"
        f" steps of warm-up, {ours.lr_decay_steps} of decay, a dead-feature window of {ours.dead_feature_window} and"
        f" activations normalized by {shared.settings.sae.normalize_activations}; an L0 that is an outcome by"
        " --target_l0.",
        "sparsify trains with its own Trainer and defaults (signum, its own learning rate) on the same rows of tokens"
        " but from the live model, whose time is in its seconds, at all positions but special tokens: it cannot leave"
        " massive activations out.",
        "dictionary_learning trains with its own trainers on the same batches and dictionary_learning_demo's settings"
        f" (lr {THEIR_LR:g} unless one is named); warm-ups are the share of the steps that they are there. Where L0 is"
        " an outcome its penalty is searched by whole trainings, of which the nearest counts.",
        "Seconds are of the process that trains, its start included; activations were computed before, but not for"
        " sparsify. Peak memory is "
        + ("resident, SAELens's with the file of activations, mapped." if cfg.device == "cpu" else "that of the GPU."),
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
        "saelens": train_saelens,
        "sparsify": train_sparsify,
        "dictionary_learning": train_dictionary_learning,
    }
    try:
        write_result(entry.directory, trainings[entry.contender.library](entry, shared))
    except TrainingFailed as error:
        raise UserError(f"{entry.name}: {error}") from None


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
    with said.open("w") as out, Progress(f"evaluation of {len(paths)} SAEs", 1) as progress:
        process = start_process(command, output=out, log=out)
        while process.poll() is None:
            percent, tokens = (("0", "0"), *_EVALUATED.findall(said.read_text(errors="replace")))[-1]
            if float(percent):
                progress.total = round(100 * int(tokens) / float(percent))
                progress.advance(int(tokens) - progress.done)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    if process.returncode != 0:
        return last_line_of(said).removeprefix("error: ")
    return None if all(entry.evaluation() for entry in entries) else "was not evaluated"
