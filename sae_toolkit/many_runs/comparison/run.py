"""Trains the SAEs of a comparison one after the other, and evaluates them together."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence

from sae_toolkit.errors import UserError
from sae_toolkit.many_runs.comparison.contenders import Entry, Outcome
from sae_toolkit.many_runs.comparison.dictionary_learning_training import DEMO_LR, train_dictionary_learning
from sae_toolkit.many_runs.comparison.library_trainings import train_saelens, train_sparsify
from sae_toolkit.many_runs.comparison.shared_activations import Shared
from sae_toolkit.many_runs.directories import write_result
from sae_toolkit.many_runs.processes import failure_reason, script_command, start_process
from sae_toolkit.terminal.progress import Progress

log = logging.getLogger(__name__)

_TRAININGS = {
    "saelens": train_saelens,
    "sparsify": train_sparsify,
    "dictionary_learning": train_dictionary_learning,
}
_SECONDS_BETWEEN_LOOKS = 0.5
_EVALUATED = re.compile(r"^evaluating: ([\d.]+)% tokens=(\d+)", re.MULTILINE)  # the evaluation's line of progress


def describe(shared: Shared) -> list[str]:
    """Returns paragraphs that say how the SAEs of a comparison were trained and measured."""
    cfg, ours = shared.run.cfg, shared.settings.optimization
    memory = "resident memory, for SAELens with the mapped file of activations" if cfg.device == "cpu" else "GPU memory"
    return [
        f"{shared.run.model.name}, {cfg.hook_name}; {cfg.training_tokens:,} tokens of {shared.run.text.name} in"
        f" {shared.n_steps:,} steps of {cfg.train_batch_size_tokens:,}; {cfg.sae.d_sae:,} features on"
        f" {cfg.sae.d_in:,} dimensions. All SAEs are measured on the same held-out documents and at the same"
        " positions; none was trained on these documents.",
        f"SAELens: sae_lens_train.py with lr {ours.lr:g} where the table names no other, {ours.lr_warm_up_steps} steps"
        f" of warm-up, {ours.lr_decay_steps} of decay, a dead-feature window of {ours.dead_feature_window} and"
        f" activations normalized by {shared.settings.sae.normalize_activations}. Where k does not set the L0,"
        " --target_l0 finds it.",
        "sparsify: its own Trainer and defaults (signum, its own learning rate) on the same rows of tokens. It runs the"
        " language model itself, and its seconds include that. It trains at all positions except special tokens,"
        " since it cannot leave massive activations out.",
        "dictionary_learning: its own trainers on the same batches, with the settings of dictionary_learning_demo (lr"
        f" {DEMO_LR:g} where the table names no other). Warm-ups take the same share of the steps as there. Where k"
        " does not set the L0, whole trainings search the penalty, and the one with the nearest L0 counts.",
        "Seconds are those of the training process, its start included. The time to compute the activations counts for"
        f" sparsify alone. Peak memory is {memory}.",
    ]


def train_and_evaluate(entries: Sequence[Entry], shared: Shared, evaluation_flags: Sequence[str]) -> list[Outcome]:
    """Trains and evaluates the SAEs of a comparison, except those that an earlier call has trained or evaluated.

    Args:
        entries: from `make_entries`.
        shared: what the SAEs are trained and measured on.
        evaluation_flags: further flags of evaluate_sae_real_activations.py.

    Returns:
        The outcome of each SAE. A failure does not stop the others.
    """
    failed: dict[Entry, str] = {}
    for number, entry in enumerate(entries, 1):
        before = entry.trained()
        log.info("SAE %d of %d: %s%s", number, len(entries), entry.name, ", from before" if before else "")
        if before:
            continue
        entry.directory.mkdir(parents=True, exist_ok=True)
        try:
            write_result(entry.directory, _TRAININGS[entry.contender.library](entry, shared))
        except UserError as error:
            failed[entry] = str(error)
            log.warning("%s: %s", entry.name, error)
    failed |= _evaluate_all(entries, shared, evaluation_flags)
    return [Outcome(entry, entry.trained(), entry.evaluation(), failed.get(entry)) for entry in entries]


def _evaluate_all(entries: Sequence[Entry], shared: Shared, flags: Sequence[str]) -> dict[Entry, str]:
    """Evaluates the trained SAEs in one pass of the model. Returns why some could not be evaluated."""
    missing = [entry for entry in entries if entry.trained() and not entry.evaluation()]
    if not missing or _evaluate(missing, shared, flags) is None:
        return {}
    failed = {}
    for entry in missing:  # one SAE that cannot be evaluated stops the evaluation of all, so try each alone
        if not entry.evaluation() and (why := _evaluate([entry], shared, flags)):
            failed[entry] = why
    return failed


def _evaluate(entries: Sequence[Entry], shared: Shared, flags: Sequence[str]) -> str | None:
    """Evaluates trained SAEs in one process. Returns the reason if it failed, and otherwise None."""
    paths = [trained["sae"] for entry in entries if (trained := entry.trained())]
    log.info("evaluating %d SAEs", len(paths))
    output = shared.directory / "evaluation.log"
    command = [*script_command("evaluate_sae_real_activations.py"), "--sae_path", *paths, "--like", shared.reference]
    command += ["--no_diagnosis", "--n_features", "0", "--device", shared.run.cfg.device, *flags]
    with output.open("w") as out, Progress(f"evaluation of {len(paths)} SAEs", 1) as progress:
        process = start_process(command, output=out, log=out)
        while process.poll() is None:
            percent, tokens = (("0", "0"), *_EVALUATED.findall(output.read_text(errors="replace")))[-1]
            if float(percent):
                progress.total = round(100 * int(tokens) / float(percent))
                progress.advance(int(tokens) - progress.done)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    if process.returncode != 0:
        return failure_reason(output).removeprefix("error: ")
    return None if all(entry.evaluation() for entry in entries) else "was not evaluated"
