"""Trains the SAEs of a comparison, chooses their learning rates, and evaluates them together."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from sae_toolkit.errors import UserError
from sae_toolkit.many_runs.comparison.contenders import Contender, Entry, Outcome, make_entry
from sae_toolkit.many_runs.comparison.dictionary_learning_training import train_dictionary_learning
from sae_toolkit.many_runs.comparison.evaluations import (
    MeasuredOn,
    forget_evaluations,
    keep_evaluation,
    read_evaluation,
)
from sae_toolkit.many_runs.comparison.learning_rates import Choice
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
_NOTHING_RECOVERED = "no learning rate can be chosen: zeros at the hook do not raise the loss"
_EVALUATED = re.compile(r"^evaluating: ([\d.]+)% tokens=(\d+)", re.MULTILINE)  # the evaluation's line of progress


def choose_learning_rates(
    contenders: Sequence[Contender], l0s: Sequence[int], seed: int, shared: Shared, num_samples: int | None
) -> list[Choice]:
    """Trains each contender that has several learning rates with all of them, and measures them on validation text.

    Args:
        contenders: from `with_learning_rates`. Those without several learning rates are left out.
        l0s: the target L0s.
        seed: the seed of these trainings. `train_and_evaluate` takes over the chosen ones.
        shared: what the SAEs are trained and measured on.
        num_samples: the number of sequences to evaluate on; None for those of the evaluation's losses.
    """
    tried = {
        (contender, l0): [make_entry(contender, l0, lr, seed, shared.directory) for lr in contender.rates]
        for l0 in l0s
        for contender in contenders
        if contender.rates
    }
    entries = [entry for each in tried.values() for entry in each]
    if not entries:
        return []
    on = MeasuredOn.by(shared.reference, "validation", num_samples)
    log.info("%d SAEs to choose %d learning rates by, on validation text", len(entries), len(tried))
    failed = _train_all(entries, shared)
    failed |= _evaluate_all(entries, shared, on)
    choices = []
    for (contender, l0), of_choice in tried.items():
        choice = Choice(contender, l0, tuple(_outcome(entry, on, failed) for entry in of_choice))
        choices.append(choice)
        if choice.chosen is None:
            log.warning("%s, L0 %d: no learning rate could be chosen", contender.name_at(None), l0)
            continue
        log.info("%s, L0 %d: lr %g is chosen", contender.name_at(None), l0, choice.chosen.lr)
        if choice.border:
            log.warning(
                "%s, L0 %d: %g is the %s learning rate that was tried; a %s one may be better",
                *(contender.name_at(None), l0, choice.chosen.lr, choice.border, choice.border.replace("est", "er")),
            )
    return choices


def train_and_evaluate(
    contenders: Sequence[Contender],
    l0s: Sequence[int],
    seeds: Sequence[int],
    choices: Sequence[Choice],
    shared: Shared,
    num_samples: int | None,
) -> list[Outcome]:
    """Trains and evaluates the SAEs of a comparison, except those that an earlier call has trained or evaluated.

    Args:
        contenders: from `with_learning_rates`.
        l0s: the target L0s.
        seeds: the seeds.
        choices: from `choose_learning_rates`. If there are any, all SAEs are measured on the text that none was chosen
            by: the test half of the held-out documents.
        shared: what the SAEs are trained and measured on.
        num_samples: the number of sequences to evaluate on; None for that of the evaluation.

    Returns:
        The outcome of each SAE: the contender varies fastest, and the seed slowest. A failure does not stop the others.
    """
    chosen = {(choice.contender, choice.l0): choice for choice in choices}
    on = MeasuredOn.by(shared.reference, "test" if choices else None, num_samples)
    entries, failed = [], {}
    for seed in seeds:
        for l0 in l0s:
            for contender in contenders:
                choice = chosen.get((contender, l0))
                best = choice and choice.chosen
                entry = make_entry(contender, l0, best.entry.lr if best else contender.lr, seed, shared.directory)
                entries.append(entry)
                if choice and not best:
                    failed[entry.directory] = next(
                        (each.failed for each in choice.tried if each.failed), _NOTHING_RECOVERED
                    )
    to_train = [entry for entry in entries if entry.directory not in failed]
    failed |= _train_all(to_train, shared)
    failed |= _evaluate_all(to_train, shared, on)
    return [_outcome(entry, on, failed) for entry in entries]


def _outcome(entry: Entry, on: MeasuredOn, failed: Mapping[Path, str]) -> Outcome:
    return Outcome(entry, entry.trained(), read_evaluation(entry, on), failed.get(entry.directory))


def _train_all(entries: Sequence[Entry], shared: Shared) -> dict[Path, str]:
    """Trains SAEs that are not trained yet. Returns, by directory, why some could not be trained."""
    distinct = list({entry.directory: entry for entry in entries}.values())

    def train(numbered: tuple[int, Entry]) -> tuple[Path, str] | None:
        number, entry = numbered
        before = entry.trained()
        log.info("SAE %d of %d: %s%s", number, len(distinct), entry.name, ", from before" if before else "")
        if before:
            return None
        entry.directory.mkdir(parents=True, exist_ok=True)
        forget_evaluations(entry)
        try:
            result = _TRAININGS[entry.contender.library](entry, shared)
        except UserError as error:
            log.warning("%s: %s", entry.name, error)
            return entry.directory, str(error)
        write_result(entry.directory, result | {"at_a_time": shared.at_a_time})
        return None

    # Its threads are daemons: they do not keep this process from ending when it is stopped, which ends the trainings.
    with ThreadPool(shared.at_a_time) as pool:
        return dict(failure for failure in pool.imap(train, enumerate(distinct, 1)) if failure)


def _evaluate_all(entries: Sequence[Entry], shared: Shared, on: MeasuredOn) -> dict[Path, str]:
    """Evaluates trained SAEs in one pass of the model. Returns, by directory, why some could not be evaluated."""
    distinct = {entry.directory: entry for entry in entries}.values()
    missing = [entry for entry in distinct if entry.trained() and not read_evaluation(entry, on)]
    if not missing or _evaluate(missing, shared, on) is None:
        return {}
    failed = {}
    for entry in missing:  # one SAE that cannot be evaluated stops the evaluation of all, so try each alone
        if not read_evaluation(entry, on) and (why := _evaluate([entry], shared, on)):
            failed[entry.directory] = why
    return failed


def _evaluate(entries: Sequence[Entry], shared: Shared, on: MeasuredOn) -> str | None:
    """Evaluates trained SAEs in one process. Returns the reason if it failed, and otherwise None."""
    paths = [trained["sae"] for entry in entries if (trained := entry.trained())]
    log.info("evaluating %d SAEs%s", len(paths), f" on the {on.part} half of the held-out documents" if on.part else "")
    output = shared.directory / "evaluation.log"
    command = [*script_command("evaluate_sae_real_activations.py"), "--sae_path", *paths, "--like", shared.reference]
    command += ["--no_diagnosis", "--n_features", "0", "--device", shared.run.cfg.device, *on.flags]
    command += ["--trust_remote_code"] if shared.run.model.trust_remote_code else []
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
    for entry in entries:
        keep_evaluation(entry, on)
    return None if all(read_evaluation(entry, on) for entry in entries) else "was not evaluated"
