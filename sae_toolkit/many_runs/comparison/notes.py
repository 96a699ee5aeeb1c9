"""Says how the SAEs of a comparison were trained and measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sae_toolkit.many_runs.comparison.contenders import Outcome
from sae_toolkit.many_runs.comparison.learning_rates import DEMO_LR, Choice
from sae_toolkit.many_runs.comparison.library_trainings import saelens_settings
from sae_toolkit.many_runs.comparison.shared_activations import Shared


def describe(shared: Shared, outcomes: Sequence[Outcome], choices: Sequence[Choice]) -> list[str]:
    """Returns paragraphs that say how the SAEs of a comparison were trained and measured.

    Args:
        shared: what the SAEs were trained and measured on.
        outcomes: from `train_and_evaluate`.
        choices: from `choose_learning_rates`.
    """
    cfg = shared.run.cfg
    memory = "resident memory, for SAELens with the mapped file of activations" if cfg.device == "cpu" else "GPU memory"
    return [
        f"{shared.run.model.name}, {cfg.hook_name}; {cfg.training_tokens:,} tokens of {shared.run.text.name} in"
        f" {shared.n_steps:,} steps of {cfg.train_batch_size_tokens:,}; {cfg.sae.d_sae:,} features on"
        f" {cfg.sae.d_in:,} dimensions. All SAEs are measured on the same held-out documents and at the same"
        " positions; none was trained on these documents.",
        *([_of_choices(outcomes, choices)] if choices else []),
        *_of_saelens(outcomes),
        "sparsify: its own Trainer and defaults (signum, and its own learning rate where the table names no other) on"
        " the same batches. Its own command runs the language model, and cannot leave massive activations out.",
        "dictionary_learning: its own trainers on the same batches, with the settings of dictionary_learning_demo (lr"
        f" {DEMO_LR:g} where the table names no other). Warm-ups take the same share of the steps as there. Where k"
        " does not set the L0, whole trainings search the penalty, and the one with the nearest L0 counts.",
        "Seconds are those of the training process, its start included, without the time to compute the activations."
        f" Peak memory is {memory}.{_at_a_time(outcomes)}",
    ]


def _of_choices(outcomes: Sequence[Outcome], choices: Sequence[Choice]) -> str:
    seeds = sorted({tried.entry.seed for choice in choices for tried in choice.tried})
    validation = _numbers(o.evaluation["loss_tokens"] for choice in choices for o in choice.tried if o.evaluation)
    test = _numbers(outcome.evaluation["loss_tokens"] for outcome in outcomes if outcome.evaluation)
    return (
        'Where the table says "lr chosen", several learning rates were tried with seed'
        f" {', '.join(map(str, seeds))}, and the one that recovers most of the loss on validation text was chosen for"
        " each target L0, among those whose L0 was at most 10% above the target if there were any. The held-out"
        " documents are divided by their hash into two halves without a document in common: learning rates are chosen"
        f" on one half ({validation} tokens for the losses), and everything else is measured on the other ({test})."
    )


def _of_saelens(outcomes: Sequence[Outcome]) -> list[str]:
    settings = [
        saelens_settings(Path(outcome.trained["sae"]))
        for outcome in outcomes
        if outcome.trained and outcome.entry.contender.library == "saelens"
    ]
    if not settings:
        return []

    def of(name: str) -> str:
        return _numbers(each[name] for each in settings)

    normalization = sorted({each["sae"]["normalize_activations"] for each in settings})
    return [
        f"SAELens: sae_lens_train.py with lr {of('lr')}, {of('lr_warm_up_steps')} steps of warm-up,"
        f" {of('lr_decay_steps')} of decay, a dead-feature window of {of('dead_feature_window')} and activations"
        f" normalized by {' or '.join(normalization)}. Where k does not set the L0, --target_l0 finds it. Where it is a"
        " mean over tokens, it was set on activations of held-out documents, as no other library's was."
    ]


def _at_a_time(outcomes: Sequence[Outcome]) -> str:
    """Returns a sentence about the trainings that ran beside others; empty if each ran alone."""
    numbers = {outcome.trained.get("at_a_time", 1) for outcome in outcomes if outcome.trained}
    if numbers <= {1}:
        return ""
    return (
        f" Trainings ran {_numbers(numbers)} at a time on the same machine, each with its share of the cores; alone,"
        " each takes other seconds."
    )


def _numbers(values: Iterable[Any]) -> str:
    """Returns the lowest and the highest of some numbers, as in `20 to 40`, or the one number that they all are."""
    distinct = sorted(set(values))
    if not distinct:
        return "none"
    lowest, highest = (
        f"{value:,}" if isinstance(value, int) else f"{value:g}" for value in (distinct[0], distinct[-1])
    )
    return lowest if lowest == highest else f"{lowest} to {highest}"
