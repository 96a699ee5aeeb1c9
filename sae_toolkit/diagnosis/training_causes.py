"""Causes that lie in the training of an SAE: the activations that it was trained on, and the settings.

Each function returns a finding if the evidence shows its cause, and None if not.
"""

from __future__ import annotations

import math

import numpy as np

from sae_toolkit.diagnosis.evidence import ALL_METRICS, Evidence, Finding, outside, percent, standard_of
from sae_toolkit.diagnosis.history import TrainingHistory
from sae_toolkit.diagnosis.probes import MASSIVE, STRONGEST
from sae_toolkit.evaluation.decoder_cosines import NEAR_DUPLICATE
from sae_toolkit.training.recipe import OWN_TARGET
from sae_toolkit.training.recipe_warnings import (
    LARGEST_WINDOW_SHARE,
    MOST_MASSIVE_SHARE,
    MOST_TURN_A_STEP,
)

_TARGET_L0 = 64
# Flag of the sparsity weight, for the architectures that have one.
_WEIGHTS = {"standard": "l1_coefficient", "gated": "l1_coefficient", "jumprelu": "l0_coefficient"}
# A feature is a vector of length 1 with d_in weights, and Adam moves each weight by about lr in a step. So a step moves
# the feature by lr * sqrt(d_in). Among the runs of 488 steps with 2,304 and 4,608 features, those with lr 2e-3 ended
# healthy. There a step moves a feature by 0.05, and the steps of the whole run add up to 20.
_TURN_A_STEP, _TURN_IN_ALL = 0.05, 20.0
# With fewer tokens for each feature, more tokens help an unhealthy SAE. Runs without --recipe auto: with 108 tokens no
# feature ended dead.
_PLENTY_OF_TOKENS = 100
# The effect of a training that diverged: above that of any other cause, because the others are its consequences.
_DIVERGED = 2.0


def _massive_activations(e: Evidence) -> Finding | None:
    """Massive activations make up too much of the variance that the SAE learns."""
    massive = e.probes.massive_share
    if massive <= MOST_MASSIVE_SHARE:
        return None
    on = {
        "--max_activation_norm_multiple": (
            str(MASSIVE),
            not 0 < (e.flag("max_activation_norm_multiple") or 0) <= MASSIVE,
        ),
        "--skip_positions": ("1", not e.flag("skip_positions")),
        "--exclude_special_tokens": ("true", e.flag("exclude_special_tokens") is False),
    }
    flags = [word for flag, (value, off) in on.items() if off for word in (flag, value)]
    if not flags:
        return None  # its training left all of them out: these come from the flags of the evaluation
    return Finding(
        "massive activations",
        ALL_METRICS,
        f"{massive:.1%} of the variance that it was trained on is that of a few activations of more than {MASSIVE}"
        f" times the median norm; of all others it explains {percent(e.probes.explained_of_others)}, where the whole"
        f" says {percent(e.probes.explained)}",
        tuple(flags),
        massive,
    )


def _sparsity(e: Evidence) -> Finding | None:
    """The sparsity weight or k leads to an unhealthy L0."""
    l0, (low, high) = e.metrics["l0"], standard_of("l0").healthy
    if "l0" not in e.unhealthy or low <= l0 <= high:
        return None
    weight = _WEIGHTS.get(e.architecture)
    k = e.flag("k")
    if weight is None:
        if k is None or low <= k <= high:
            return None  # k itself is healthy: L0 differs from it after too little training
        return Finding(
            "k is not a healthy L0",
            ("l0",),
            f"{k:g} features a token were asked for, and {l0:.1f} are active",
            ("--k", str(_TARGET_L0)),
            outside(l0, low, high),
        )
    value = e.flag(weight)
    given = f"--{weight} {value:g}" if value is not None else f"the {weight}"
    strongest, all_of_them = e.probes.explained_by_strongest, e.probes.explained_of_others
    if l0 > high:
        says = (
            f"{given} is too weak for activations with a norm of {e.probes.median_norm:.4g}: {l0:.0f} features are"
            f" active on a token, of which the strongest {STRONGEST} explain {percent(strongest)} of the variance, and"
            f" all of them {percent(all_of_them)}"
        )
    else:
        says = f"{given} is too strong: {l0:.1f} features are active on a token, which explain {percent(all_of_them)}"
    normalize: tuple[str, ...] = ()
    if e.flag("normalize_activations") == "none":
        normalize = ("--normalize_activations", "expected_average_only_in")
    if "decoder_absorption" in e.unhealthy and weight == "l1_coefficient":
        flags = _to_batchtopk(e, *normalize)
        says += "; and an L1 penalty keeps features alike, so the number of active ones is better set than weighed"
        metrics: tuple[str, ...] = ("l0", "decoder_absorption")
    elif OWN_TARGET in (e.flag("set") or ()):
        flags, metrics = ("--set", f"sae.target_l0={_TARGET_L0}", *normalize), ("l0",)
    else:
        flags, metrics = ("--target_l0", str(_TARGET_L0), *normalize), ("l0",)
    return Finding("the sparsity weight does not fit", metrics, says, flags, outside(l0, low, high))


def _to_batchtopk(e: Evidence, *normalize: str) -> tuple[str, ...]:
    """Returns the flags that train BatchTopK instead, without what it does not take."""
    if e.flag("normalize_activations") in ("layer_norm", "constant_norm_rescale"):
        normalize = ("--normalize_activations", "expected_average_only_in")
    begin = ("--init_from", "none") if e.flag("init_from") else ()
    return "--architecture", "batchtopk", "--k", str(_TARGET_L0), *normalize, *begin


def _l1_penalty(e: Evidence) -> Finding | None:
    """An L1 penalty keeps decoder vectors alike although L0 is healthy."""
    if _WEIGHTS.get(e.architecture) != "l1_coefficient" or "l0" in e.unhealthy:
        return None
    absorption, limit = e.metrics["decoder_absorption"], standard_of("decoder_absorption").healthy[1]
    return Finding(
        "an L1 penalty keeps features alike",
        ("decoder_absorption",),
        f"{e.probes.twins:.1%} of the features have a twin with a cosine above {NEAR_DUPLICATE:g}, and the mean"
        f" largest cosine is {absorption:.2f}, where random directions have"
        f" {e.summary['decoder_cosines']['random_directions']:.2f}",
        _to_batchtopk(e),
        (absorption - limit) / (1 - limit),
    )


def _steps(e: Evidence) -> Finding | None:
    """The learning rate or the dead-feature window does not fit the number of steps; if both, in one finding."""
    rate, window = _low_learning_rate(e), _window(e)
    if rate is None or window is None:
        return rate or window
    assert e.history is not None
    return Finding(
        "too few steps for this learning rate and dead-feature window",
        tuple(dict.fromkeys(rate.metrics + window.metrics)),
        f"{e.history.n_steps} steps: {rate.says}; {window.says}",
        rate.flags[:4] + window.flags,
        max(rate.effect, window.effect),
    )


def _low_learning_rate(e: Evidence) -> Finding | None:
    """The learning rate is too low to move the features far from their initial directions."""
    history = e.history
    if history is None or history.turned_F is None:
        return None
    optimization, root = history.settings.optimization, math.sqrt(e.d_in)
    full_steps = history.n_steps - (optimization.lr_warm_up_steps + optimization.lr_decay_steps) / 2
    fitting = min(_TURN_A_STEP / root, _TURN_IN_ALL / (full_steps * root))
    turned = float(history.turned_F.median())
    if fitting < 2 * optimization.lr or turned < 0.35:
        return None
    words = ["--lr", f"{float(f'{fitting:.1g}'):g}"]
    if not optimization.lr_decay_steps:
        words += ["--lr_decay_steps", str(max(history.n_steps // 5, 1))]
    return Finding(
        "the learning rate is too low",
        ALL_METRICS,
        f"half of the decoder vectors still have a cosine of {turned:.2f} or more to the random ones that they began as"
        f"{_gain_of_doubling(history)}, with lr {optimization.lr:g}",
        tuple(words),
        turned,
    )


def _gain_of_doubling(history: TrainingHistory) -> str:
    """Returns the clause that says what twice the tokens would explain; empty if that is at most 20% or not known."""
    gain = history.gain_of_doubling()
    return f", and twice the tokens would explain {gain:.0%} of what is left" if gain and gain > 0.2 else ""


def _high_learning_rate(e: Evidence) -> Finding | None:
    """The learning rate is so high that the explained variance does not settle, or that it ends below 0."""
    history = e.history
    if history is None:
        return None
    lr, root = history.settings.optimization.lr, math.sqrt(e.d_in)
    lower = min(_TURN_A_STEP / root, lr / 3)
    explained = e.metrics["explained_variance"]
    if explained < 0 and lr * root > MOST_TURN_A_STEP:
        return Finding(
            "the learning rate is too high",
            ALL_METRICS,
            f"the explained variance is {explained:.3g}, worse than that of the mean activation; a step of lr {lr:g}"
            f" turns a feature by {lr * root:.2g} of its length",
            ("--lr", f"{float(f'{lower:.1g}'):g}"),
            _DIVERGED,
        )
    swings = _swings(history)
    if swings is None or swings < 0.05:
        return None
    return Finding(
        "the learning rate is too high",
        ALL_METRICS,
        f"the explained variance does not settle: a reading is {min(swings, 99):.2g} off the middle of its neighbours"
        f" (median, second half); a step of lr {lr:g} turns a feature by {lr * root:.2g} of its length",
        ("--lr", f"{float(f'{lower:.1g}'):g}"),
        1.0,
    )


def _swings(history: TrainingHistory) -> float | None:
    """Returns the median distance between a reading of the explained variance and the mean of its two neighbours.

    It covers the second half of the steps at the full learning rate. A steady rise of the curve gives 0. None if there
    are too few readings.
    """
    _, unexplained = history.curve()
    return float(np.median(np.abs(np.diff(unexplained, n=2)))) / 2 if len(unexplained) > 3 else None


def _window(e: Evidence) -> Finding | None:
    """The dead-feature window is too long for the auxiliary loss to revive features in time."""
    history = e.history
    if history is None or "dead_features" not in e.unhealthy or _auxiliary(e) in (None, 0):
        return None
    window, n_steps = history.settings.optimization.dead_feature_window, history.n_steps
    acted = _share_of_auxiliary_loss(history)
    if window <= LARGEST_WINDOW_SHARE * n_steps or acted > 0.75:
        return None
    return Finding(
        "the dead-feature window is too long",
        ("dead_features", "decoder_absorption"),
        f"features are revived once they were silent for {window} steps of {n_steps}, so that was under way in"
        f" {acted:.0%} of the readings alone{_dead_at_birth(history)}",
        ("--dead_feature_window", str(_fitting_window(history))),
        (1 - acted) * min(2 * e.metrics["dead_features"], 1.0),
    )


def _no_auxiliary_loss(e: Evidence) -> Finding | None:
    """The auxiliary loss, which revives dead features, is off."""
    history = e.history
    if history is None or "dead_features" not in e.unhealthy or _auxiliary(e) != 0:
        return None
    return Finding(
        "nothing revives features that are dead at birth",
        ("dead_features", "decoder_absorption"),
        f"the auxiliary loss is off{_dead_at_birth(history)}",
        ("--set", "sae.aux_loss_coefficient=1", "--dead_feature_window", str(_fitting_window(history))),
        min(2 * e.metrics["dead_features"], 1.0),
    )


def _fitting_window(history: TrainingHistory) -> int:
    """Returns a dead-feature window that fits the number of steps: 4% of them."""
    return max(history.n_steps // 25, 1)


def _auxiliary(e: Evidence) -> float | None:
    """Returns the coefficient of the auxiliary loss; None for architectures without one."""
    return (e.metadata.get("training_architecture_details") or {}).get("aux_loss_coefficient")


def _share_of_auxiliary_loss(history: TrainingHistory) -> float:
    """Returns the share of the readings, in [0, 1], in which the auxiliary loss was above 0."""
    losses = [reading.get("losses/auxiliary_reconstruction_loss", 0.0) for reading in history.readings]
    return sum(loss > 0 for loss in losses) / len(losses) if losses else 0.0


def _dead_at_birth(history: TrainingHistory) -> str:
    """Returns the clause that says how many of the features silent at the end never fired; empty if none is silent."""
    if history.steps_since_fired_F is None:
        return ""
    silent = history.steps_since_fired_F > _fitting_window(history)
    if not silent.any():
        return ""
    at_birth = (history.steps_since_fired_F[silent] >= history.n_steps).float().mean().item()
    return (
        f"; of the {silent.float().mean().item():.0%} of features that were silent at the end, {at_birth:.0%} never"
        f" fired (dead at birth), the others died later"
    )


def _died_later(e: Evidence) -> Finding | None:
    """Features fired at first and then stopped, and the architecture has no auxiliary loss to revive them."""
    history = e.history
    if history is None or history.steps_since_fired_F is None or "dead_features" not in e.unhealthy:
        return None
    if _auxiliary(e) is not None or e.architecture not in _WEIGHTS:
        return None
    silent = history.steps_since_fired_F > _fitting_window(history)
    died = silent & (history.steps_since_fired_F < history.n_steps)
    dead = died.float().mean().item()
    if dead < 0.05 or 2 * int(died.sum()) < int(silent.sum()):
        return None
    return Finding(
        "features died in training",
        ("dead_features",),
        f"{dead:.0%} of the features fired at first, and never again; {e.architecture} has nothing that revives them",
        _to_batchtopk(e),
        dead,
    )


def _too_few_tokens(e: Evidence) -> Finding | None:
    """There are too few tokens for the number of features."""
    history = e.history
    if history is None:
        return None
    if history.settings.sae.init_from is not None:
        return None  # it was trained on more tokens than those of its last run
    tokens = history.settings.optimization.training_tokens
    gain, each = history.gain_of_doubling(), tokens / e.d_sae
    if not (each < _PLENTY_OF_TOKENS or (gain is not None and gain > 0.3)):
        return None
    fewer = max(tokens // (2 * _PLENTY_OF_TOKENS * e.d_in), 1)
    if fewer * e.d_in < e.d_sae:
        flags: tuple[str, ...] = ("--expansion_factor", str(fewer))
    else:
        more = max(2 * _PLENTY_OF_TOKENS * e.d_sae, 2 * tokens)
        flags = ("--training_tokens", str(more))
    return Finding(
        "too few tokens for so many features",
        ALL_METRICS,
        f"{each:.3g} tokens a feature{_gain_of_doubling(history)}",
        flags,
        min(max(gain or 0.0, 1 - each / _PLENTY_OF_TOKENS), 1.0),
    )


def _duplicates(e: Evidence) -> Finding | None:
    """Features have twins with nearly the same decoder vector."""
    if e.probes.twins < 0.01 or _WEIGHTS.get(e.architecture) == "l1_coefficient":
        return None
    together = e.probes.twins_together
    says = f"{e.probes.twins:.0%} of the features have a twin with a cosine above {NEAR_DUPLICATE:g}" + (
        f", and fire on {together:.0%} of the tokens on which either does" if together is not None else ""
    )
    if init_from := e.flag("init_from"):
        says += f"; they came with the weights that the training began with ({init_from})"
        flags: tuple[str, ...] = ("--init_from", "none")
    else:
        factor, rest = divmod(e.d_sae, 2 * e.d_in)
        flags = ("--d_sae", str(e.d_sae // 2)) if rest else ("--expansion_factor", str(factor))
    return Finding("features that are the same", ("decoder_absorption",), says, flags, e.probes.twins)


GIVEN = (_massive_activations,)
SETTINGS = (
    _sparsity,
    _l1_penalty,
    _steps,
    _high_learning_rate,
    _no_auxiliary_loss,
    _died_later,
    _too_few_tokens,
    _duplicates,
)
