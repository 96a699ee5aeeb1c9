"""Causes that lie in how an SAE was evaluated. Until they are fixed, its numbers say nothing about its training.

Each function returns a finding if the evidence shows its cause, and None if not.
"""

from __future__ import annotations

import math
import re

from sae_toolkit.diagnosis.evidence import ALL_METRICS, Evidence, Finding, percent, standard_of, titles
from sae_toolkit.diagnosis.probes import MASSIVE
from sae_toolkit.evaluation.health import LEAST_REPLACED_SHARE, LEAST_SEQUENCES
from sae_toolkit.training.recipe_warnings import MOST_MASSIVE_SHARE

# The flags that choose positions, and where each comes from in `sources`.
_SOURCES = {
    "exclude_special_tokens": "exclude_special_tokens",
    "skip_positions": "skip_positions",
    "max_activation_norm_multiple": "max_activation_norm",
}
_CONTEXT = 128  # tokens, where contexts are too short for one position to be left out
# The median norms of a few thousand tokens of two texts differ by only a few percent.
_NORM_TOLERANCE = math.log(1.15)


def _too_small_a_sample(e: Evidence) -> Finding | None:
    """The sample is too small to settle the status of some metrics."""
    unsettled = [metric for metric in e.unhealthy if e.summary["health"][metric] == "unsettled"]
    if not unsettled or e.metrics["replaced_share"] < LEAST_REPLACED_SHARE:
        return None
    dead = e.summary["dead_feature_estimates"]
    flags: list[str] = []
    if by_rows := [metric for metric in unsettled if metric != "dead_features"]:
        flags += ["--num_samples", str(max(e.summary["sequences"], *(_rows_needed(e, metric) for metric in by_rows)))]
    if "dead_features" in unsettled:
        flags += ["--dead_tokens", str(max(dead["tokens_to_settle"], 2 * dead["tokens"]))]
    only = len(unsettled) == len(e.unhealthy)
    return Finding(
        "the evaluated sample is too small",
        tuple(unsettled),
        f"{e.summary['loss_sequences']} sequences for the loss, {e.summary['sequences']} for the rest, and"
        f" {dead['tokens']:,} tokens for dead features: {titles(unsettled)} could be of another status on more text",
        tuple(flags),
        len(unsettled) / len(e.unhealthy) if only else 0.0,
        of_training=False,
    )


def _rows_needed(e: Evidence, metric: str) -> int:
    """Returns how many rows to measure on so that a metric's interval crosses no limit: 1.5 to 16 times as many."""
    rows = e.summary["loss_sequences" if metric == "loss_recovered" else "sequences"]
    few = LEAST_SEQUENCES / e.summary["loss_sequences"]
    if metric not in e.summary["intervals"]:
        return math.ceil(max(4.0, few) * rows)
    low, high = e.summary["intervals"][metric]
    standard = standard_of(metric)
    value = e.metrics[metric]
    limits = [end for end in (*standard.healthy, *standard.borderline) if math.isfinite(end)]
    distance = min(abs(value - end) for end in limits)
    half = (high - low) / 2
    return math.ceil(min(max(1.5 * (half / distance) ** 2 if distance else 16.0, few, 1.5), 16.0) * rows)


def _wrong_layer(e: Evidence) -> Finding | None:
    """The SAE explains clearly more variance at another hook."""
    here_name = e.summary["hook_name"]
    here = e.probes.explained_at.get(here_name, math.nan)
    best_name = max(e.probes.explained_at, key=lambda name: e.probes.explained_at[name])
    best = e.probes.explained_at[best_name]
    if best_name == here_name or not best > max(here, 0) + 0.05:
        return None
    trained_at = e.metadata.get("hook_name")
    if trained_at == here_name and e.history is not None:  # a run of this project trained the SAE at this hook
        return None
    return Finding(
        "evaluated at another hook than it was trained at",
        ALL_METRICS,
        f"it explains {percent(here)} of the variance at {here_name} and {percent(best)} at {best_name}",
        _hook_flag(best_name, trained_at),
        (best - max(here, 0)) / (1 - max(here, 0)),
        of_training=False,
    )


def _hook_flag(hook_name: str, trained_at: str | None) -> tuple[str, str]:
    """Returns the flag that evaluates at a hook: --layer if it is of the kind that the record names, else --hook_name.

    Args:
        trained_at: the hook in the SAE's record, if there is one.
    """
    layer = next((part for part in hook_name.split(".") if part.isdigit()), None)
    of_record = trained_at or "blocks.0.hook_resid_post"
    if layer is not None and re.sub(r"\.\d+(?=\.|$)", f".{layer}", of_record, count=1) == hook_name:
        return "--layer", layer
    return "--hook_name", hook_name


def _massive_first_position(e: Evidence) -> Finding | None:
    """The first position is massive, and the SAE's record does not say whether it was trained there."""
    massive = e.summary.get("massive_first_position")
    if not massive or massive["metrics_without"].get("loss_recovered") is None:
        return None
    here, without = e.metrics["loss_recovered"], massive["metrics_without"]["loss_recovered"]
    if not without > here + 0.01:
        return None
    return Finding(
        "evaluated at a massive first position, of which the SAE's record says nothing",
        ("loss_recovered",),
        f"its norm is {massive['ratio']:.0f} times the median of the others; loss recovered is {percent(here)} with it"
        f" and {percent(without)} without it",
        ("--skip_positions", "1"),
        (without - here) / (1 - here),
        of_training=False,
    )


def _wrong_model(e: Evidence) -> Finding | None:
    """The norm of the activations differs from the norm in the training."""
    recorded = e.metadata.get("median_activation_norm")
    if not recorded or e.metadata.get("hook_name") != e.summary["hook_name"]:
        return None
    ratio = e.probes.median_norm / recorded
    if abs(math.log(ratio)) < _NORM_TOLERANCE:
        return None
    trained_on = e.metadata.get("model_name")
    what = f"{e.summary['model']}, and it was trained on {trained_on}"
    if trained_on == e.summary["model"]:
        what = f"{trained_on}, whose weights must be others than those that it was trained on"
    return Finding(
        "evaluated on another model than it was trained on",
        ALL_METRICS,
        f"the median norm of the activations is {e.probes.median_norm:.4g} here and was {recorded:.4g} in training:"
        f" this is {what}",
        ("--model_name", str(trained_on)),
        1.0,
        of_training=False,
    )


def _too_few_positions(e: Evidence) -> Finding | None:
    """The SAE replaces the activations of so few tokens that the evaluation gives no verdict."""
    share, median = e.metrics["replaced_share"], e.probes.median_norm
    if not share < LEAST_REPLACED_SHARE:
        return None
    positions, context = e.summary["positions"], e.summary["context_length"]
    limit, skipped = positions["max_activation_norm"], positions["skip_positions"]
    flag, value, source = "skip_positions", "1", "skip_positions"
    says = f"{skipped} of {context} positions, at the start"
    if limit is not None and limit < 4 * median:
        flag, value, source = "max_activation_norm_multiple", str(MASSIVE), "max_activation_norm"
        says = f"norms above {limit:.4g} where their median is {median:.4g}"
    elif skipped == 1 and skipped > (1 - LEAST_REPLACED_SHARE) * context:
        flag, value, source = "context_length", str(_CONTEXT), ""
    elif skipped <= 1:
        flag, value, source = "exclude_special_tokens", "false", "exclude_special_tokens"
        says = "special tokens"
    is_given, of_training = e.by_flag(source), flag != "context_length"
    return Finding(
        "it stands in at too few positions",
        ALL_METRICS,
        f"at {percent(share)} of the tokens, for it leaves out {says}",
        () if is_given else (f"--{flag}", value),
        1 - share,
        of_training=of_training and not is_given,
        leave_out=(flag,) if is_given else (),
    )


def _at_positions_that_training_left_out(e: Evidence) -> Finding | None:
    """Flags of the evaluation let activations in that the SAE was not trained on, which are most of the variance."""
    massive = e.probes.massive_share
    left_out = tuple(
        flag
        for flag, source in _SOURCES.items()
        if e.by_flag(source) and e.flag(flag) and getattr(e.evaluation.text, flag) != e.flag(flag)
    )
    if massive <= MOST_MASSIVE_SHARE or not left_out:
        return None
    return Finding(
        "evaluated at positions that its training left out",
        ALL_METRICS,
        f"a few activations of more than {MASSIVE} times the median norm are {massive:.1%} of the variance here, and"
        f" its training left such positions out; leave out {' '.join(f'--{flag}' for flag in left_out)}",
        (),
        massive,
        of_training=False,
        leave_out=left_out,
    )


CAUSES = (
    _too_small_a_sample,
    _wrong_layer,
    _massive_first_position,
    _at_positions_that_training_left_out,
    _wrong_model,
    _too_few_positions,
)
