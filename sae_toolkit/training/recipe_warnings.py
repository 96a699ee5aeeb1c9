"""Warnings about settings that are likely to make an SAE unhealthy, each with the reason and a better value.

Each warning is one line that starts with its flag. Comments say where each bound comes from: a published recipe,
arithmetic, or runs on the embedded model (2,304 features, 488 steps, batches of 1,024). A bound from runs lies between
the runs that became healthy and those that did not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig

from sae_toolkit.evaluation.health import LEAST_REPLACED_SHARE, STANDARDS
from sae_toolkit.training.recipe import least_learning_rate

# Runs of the recipe became healthy with 5 tokens for each feature, at several widths, and with 2.7 at one
# (docs/recipes.md). With 3.8 tokens 88.8% of the features ended dead in the document that this project reproduces.
LEAST_TOKENS_A_FEATURE = 5

# Adam changes a weight by about lr in a step. A feature is a vector of length 1 with d_in weights, so a run can move it
# by lr x steps x sqrt(d_in). Runs: at 4.1 (lr 4e-4) 22% ended dead, at 10.3 (lr 1e-3) 0.4%.
LEAST_TURN = 7.0
# Runs of the TopK kinds of up to 2,000 steps (docs/recipes.md): with half of the recipe's learning rate a quarter to a
# half of the features ended dead, with two thirds of it or more at most 3%, from a bias that begins at the mean.
LEAST_OF_RECIPE, _FITTED_STEPS = 0.6, 2000
# Arithmetic: a step that moves a feature this far undoes what earlier steps learnt. In the demo it is 0.03.
MOST_TURN_A_STEP = 0.5

# The last fifth of the steps, linearly to zero: Anthropic, Circuits Updates, April 2024, and both presets that we
# recommend.
_DECAYING_SHARE = 1 / 5

# Runs: with a window of 20 of 488 steps (4%) 0.4% ended dead, with one of 200 steps (41%) 37%.
LARGEST_WINDOW_SHARE = 1 / 8

# The cut-off is the smallest projection of an activation on a feature at which the sparsity loss lets the feature be
# active. Its unit is the standard deviation of the projections on random directions, |x| / sqrt(d_in). Runs: at 0.4 (L1
# weight 5.0, not normalized) 1,931 of 4,608 features were active at once, at 1.0 (JumpReLU, L0 weight 1.0, normalized)
# 220 of 2,304.
LOWEST_CUT_OFF = 1.2
# Weights for activations that are scaled to |x| = sqrt(d_in). L1: Anthropic, Circuits Updates, April 2024. L0: the
# weight with the same cut-off, 2.5.
_L1_FOR_NORMALIZED, _L0_FOR_NORMALIZED = 5.0, 6.0

# Share of the variance. On the embedded model massive activations are 99% of the variance, and 0% after the filter.
MOST_MASSIVE_SHARE = 0.1

_LOWEST_L0, _HIGHEST_L0 = next(standard.borderline for standard in STANDARDS if standard.metric == "l0")


@dataclass(frozen=True)
class MeasuredActivations:
    """Measurements of one batch of the activations that a run will train on.

    Args:
        median_norm: median L2 norm of the activations after the run's scaling, as the SAE gets them.
        massive_share: share of the variance, in [0, 1], of massive activations: those with more than 10 times the
            median norm.
        kept_share: share of the tokens that are trained on, in [0, 1], among the tokens that are not special.
    """

    median_norm: float
    massive_share: float
    kept_share: float


def recipe_warnings(
    cfg: LanguageModelSAERunnerConfig[Any],
    held_out_fraction: float,
    passes: float = 1.0,
    *,
    begins_trained: bool = False,
    target_l0: float | None = None,
) -> list[str]:
    """Returns the warnings that follow from the settings and the shapes.

    Args:
        cfg: configuration of the SAE.
        held_out_fraction: share of the documents that are held out, in [0, 1].
        passes: how many passes over the text the run makes.
        begins_trained: whether the run begins with the weights of a trained SAE, and need not be long.
        target_l0: the value of --target_l0; None if it is not given.
    """
    n_steps = cfg.total_training_steps
    found = [
        None if begins_trained else _too_few_tokens(cfg),
        _too_many_or_few_active(cfg, target_l0),
        *_learning_rate(cfg, n_steps, begins_trained=begins_trained),
        _dead_feature_window(cfg, n_steps),
        _nothing_held_out(held_out_fraction),
        _many_passes(passes),
    ]
    return [warning for warning in found if warning]


def activation_warnings(
    cfg: LanguageModelSAERunnerConfig[Any],
    measured: MeasuredActivations | None,
    *,
    finds_weight: bool,
    max_norm_multiple: float | None,
    skip_positions: int,
) -> list[str]:
    """Returns the warnings that depend on the activations.

    Args:
        cfg: configuration of the SAE.
        measured: measurements at its hook. If None, the warnings are about settings that may be wrong.
        finds_weight: whether the run adjusts the weight of the sparsity loss (--target_l0).
        max_norm_multiple: activations whose norm is more than this many times the median are left out; None leaves
            none out.
        skip_positions: number of positions at the start of a context that are left out.
    """
    left_out = max_norm_multiple, skip_positions
    found = [
        None if finds_weight else _sparsity_weight(cfg, measured),
        _massive(*left_out, measured),
        _too_little_kept(*left_out, cfg.context_size, measured),
    ]
    return [warning for warning in found if warning]


def _too_few_tokens(cfg: LanguageModelSAERunnerConfig[Any]) -> str | None:
    tokens, d_sae = cfg.training_tokens, cfg.sae.d_sae
    if tokens >= LEAST_TOKENS_A_FEATURE * d_sae:
        return None
    fewer = tokens // (LEAST_TOKENS_A_FEATURE * cfg.sae.d_in)
    return (
        f"--training_tokens {tokens}: {tokens / d_sae:.2g} tokens a feature; with 3.8 most features of a run"
        f" without --recipe auto ended dead, and with it {LEAST_TOKENS_A_FEATURE} sufficed; use"
        f" {LEAST_TOKENS_A_FEATURE * d_sae} or more" + (f", or lower --expansion_factor to {fewer}" if fewer else "")
    )


def _too_many_or_few_active(cfg: LanguageModelSAERunnerConfig[Any], target_l0: float | None) -> str | None:
    flag, l0 = ("--k", getattr(cfg.sae, "k", None)) if target_l0 is None else ("--target_l0", target_l0)
    if l0 is None or _LOWEST_L0 <= l0 <= _HIGHEST_L0:
        return None
    return f"{flag} {l0:g}: the L0 that is asked for is unhealthy outside {_LOWEST_L0} to {_HIGHEST_L0}; use 64"


def _learning_rate(cfg: LanguageModelSAERunnerConfig[Any], n_steps: int, *, begins_trained: bool) -> list[str]:
    # This number of steps at the full rate would move a weight as far as the run does.
    full_steps = n_steps - (cfg.lr_warm_up_steps + cfg.lr_decay_steps) / 2
    root = math.sqrt(cfg.sae.d_in)
    turn = cfg.lr * full_steps * root
    found = []
    if turn < LEAST_TURN and not begins_trained:
        enough, most = _round(1.5 * LEAST_TURN / (full_steps * root)), MOST_TURN_A_STEP / root / 2
        found.append(
            f"--lr {cfg.lr:g}: {n_steps} steps can turn a feature by {turn:.2g} times its length, and at 4.1 times 22%"
            " of the features ended dead; "
            + (f"raise it to about {enough:g}, or " if enough <= most else "")
            + "take more steps (--training_tokens, or a smaller --train_batch_size_tokens)"
        )
    elif hasattr(cfg.sae, "k") and n_steps <= _FITTED_STEPS and not begins_trained:
        fitted = least_learning_rate(n_steps, cfg.sae.d_sae)
        if cfg.lr < LEAST_OF_RECIPE * fitted:
            found.append(
                f"--lr {cfg.lr:g}: {cfg.lr / fitted:.0%} of what {n_steps} steps and {cfg.sae.d_sae:,} features want,"
                f" and with half of that a quarter of the features or more ended dead; raise it to {fitted:.2g}"
            )
    if too_high := too_high_learning_rate(cfg):
        found.append(too_high)
    if cfg.lr_scheduler_name == "constant" and cfg.lr_decay_steps == 0:
        found.append(
            "--lr_decay_steps 0: the SAE is saved with the noise of its last full steps in it; let the last fifth decay"
            f" ({max(int(_DECAYING_SHARE * n_steps), 1)})"
        )
    return found


def too_high_learning_rate(cfg: LanguageModelSAERunnerConfig[Any]) -> str | None:
    """Returns the warning of a learning rate with which steps undo one another; None if it is not that high."""
    root = math.sqrt(cfg.sae.d_in)
    if cfg.lr * root <= MOST_TURN_A_STEP:
        return None
    return (
        f"--lr {cfg.lr:g}: one step can turn a feature by {cfg.lr * root:.2g} times its length, which undoes what"
        f" earlier ones learnt; lower it to about {_round(MOST_TURN_A_STEP / root / 5):g}"
    )


def _dead_feature_window(cfg: LanguageModelSAERunnerConfig[Any], n_steps: int) -> str | None:
    window, most = cfg.dead_feature_window, int(LARGEST_WINDOW_SHARE * n_steps)
    revives = hasattr(cfg.sae, "aux_loss_coefficient")
    sensible = max(n_steps // 25, 1)
    if window >= n_steps:
        return (
            f"--dead_feature_window {window}: longer than the run's {n_steps} steps, so no feature will "
            + ("be found dead and revived" if revives else "be counted as dead, and the progress shows 0%")
            + f"; use about {sensible}"
        )
    if revives and window > most:
        return (
            f"--dead_feature_window {window}: long for {n_steps} steps; dead features have little time to be revived"
            f" (200 of 488 steps left 37% dead, 20 steps 0.4%); use about {sensible}"
        )
    return None


def _nothing_held_out(held_out_fraction: float) -> str | None:
    if held_out_fraction > 0:
        return None
    return "--held_out_fraction 0: no text will be left to evaluate the SAE on, unless you name other data; use 0.1"


def _many_passes(passes: float) -> str | None:
    # Runs of the demo, each with 500,000 tokens of training, on texts of 510,000, 131,000 and 28,000 tokens.
    if passes <= 1:
        return None
    return (
        f"--epochs {math.ceil(passes)}: {passes:.2g} passes over the text, which the SAE may learn by heart: after 4"
        " passes it explained 0.866 of the variance there and 0.841 on held-out text, after 18 passes 0.905 and 0.803,"
        " after one 0.859 and 0.849; judge it by held-out text alone (--eval_every), or use more text"
    )


def _sparsity_weight(cfg: LanguageModelSAERunnerConfig[Any], measured: MeasuredActivations | None) -> str | None:
    """Returns a warning if the weight of the sparsity loss does not fit the scale of the activations.

    Let p be the projection of an activation on a feature, and f the feature's activation. With an L1 loss,
    (f - p)^2 + weight x f has its minimum at f = 0 if p is below weight / 2. With an L0 loss the feature is off if p^2
    is below the weight. How sparse the SAE becomes depends on this cut-off relative to the projection on a random
    direction, |x| / sqrt(d_in).

    Suppose that 20 equal features make up an activation, each with a projection of |x| / sqrt(20). A weight that cuts
    them off is too strong, because the L0 would be below 20.
    """
    sae = cfg.sae
    architecture = sae.architecture()
    if architecture in ("standard", "gated"):
        flag, weight, usual = "--l1_coefficient", sae.l1_coefficient, _L1_FOR_NORMALIZED
    elif architecture == "jumprelu" and sae.jumprelu_sparsity_loss_mode == "step":
        flag, weight, usual = "--l0_coefficient", sae.l0_coefficient, _L0_FOR_NORMALIZED
    else:
        return None
    normalizes = sae.normalize_activations != "none"
    normalize = "" if normalizes else "--normalize_activations expected_average_only_in, then "
    if measured is None:
        if normalizes:
            return None
        return (
            f"{flag} {weight:g}: depends on the scale of the activations, which --normalize_activations none leaves as"
            f" it is in the model; use {normalize}about {usual:g}"
        )
    scale = measured.median_norm / math.sqrt(sae.d_in)
    threshold = (weight / 2 if flag == "--l1_coefficient" else math.sqrt(weight)) / scale
    highest = max(math.sqrt(sae.d_in / _LOWEST_L0), 2 * LOWEST_CUT_OFF)
    if LOWEST_CUT_OFF <= threshold <= highest:
        return None
    weak = threshold < LOWEST_CUT_OFF
    what = "weak: a large share of all features will be active" if weak else "strong: features will die"
    fitting = _round(usual * (scale if flag == "--l1_coefficient" else scale**2))
    return (
        f"{flag} {weight:g}: too {what}, since activations have a norm of {measured.median_norm:.3g}, and features are"
        f" cut off at {threshold:.2g} times their standard deviation; use "
        + (f"about {fitting:g}" if normalizes else f"{normalize}about {usual:g} (or {fitting:g} as it is)")
    )


def _massive(max_norm_multiple: float | None, skip_positions: int, measured: MeasuredActivations | None) -> str | None:
    given = " and ".join(
        part
        for part, off in (
            ("--max_activation_norm_multiple 0", not max_norm_multiple),
            ("--skip_positions 0", not skip_positions),
        )
        if off
    )
    if measured is None:
        if max_norm_multiple:
            return None
        return (
            f"{given}: massive activations are kept, which in Llama-like models are most of the variance; use"
            " --max_activation_norm_multiple 10"
        )
    if measured.massive_share <= MOST_MASSIVE_SHARE:
        return None
    flag = given or f"--max_activation_norm_multiple {max_norm_multiple:g}"
    return (
        f"{flag}: massive activations are kept and are {measured.massive_share:.1%} of the variance, so the SAE will"
        " learn little else; use --max_activation_norm_multiple 10 --skip_positions 1"
    )


def _too_little_kept(
    max_norm_multiple: float | None, skip_positions: int, context_size: int, measured: MeasuredActivations | None
) -> str | None:
    if measured is None or measured.kept_share >= LEAST_REPLACED_SHARE:
        return None
    if skip_positions > (1 - LEAST_REPLACED_SHARE) * context_size:
        flag, change = f"--skip_positions {skip_positions}", "lower"
    else:
        flag, change = f"--max_activation_norm_multiple {max_norm_multiple or 0:g}", "raise"
    return (
        f"{flag}: leaves {1 - measured.kept_share:.1%} of the tokens out, and the evaluation gives no verdict above"
        f" {1 - LEAST_REPLACED_SHARE:.0%}; {change} it"
    )


def _round(number: float) -> float:
    """Returns a number rounded to one significant digit, for the value of a flag."""
    return float(f"{number:.1g}")
