"""The recipe of --recipe auto: settings that follow from the number of tokens, the width of the SAE and k.

The rules were fitted to runs on the embedded model. docs/recipes.md has these runs, and says where a rule extrapolates.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from sae_toolkit.settings.checks import LEAST_SHARE, SPARSITY_WEIGHTS, check_chosen
from sae_toolkit.settings.training import OptimizationSettings, SAESettings, TrainingSettings

# The middle of the healthy range, 40 to 120, on a logarithmic scale.
_L0 = 64

# The width where no flag gives one: a power of two times d_in, at most 8 (Llama Scope's), as far as the tokens suffice.
_TOKENS_A_FEATURE = 25
_WIDEST, _NARROWEST = 8, 2

# More and smaller steps leave fewer dead features and explain more. A batch of 4,096 is what published SAEs have.
_STEPS = 600
_SMALLEST_BATCH, _LARGEST_BATCH = 64, 4096

# The fitted learning rate of BatchTopK: at 781 steps of 128 tokens, 2,304 features and k 64, and the exponents of each.
_LR, _LR_BATCH, _LR_STEPS, _LR_FEATURES, _LR_K = 1.5e-3, 128, 781, 2304, 64
_LR_BY_BATCH, _LR_BY_STEPS, _LR_BY_FEATURES, _LR_BY_K = 0.4, -0.2, -0.55, 0.4
# It does not rise with larger batches, because with more tokens the same rate makes more features alike, nor beyond the
# k of the fit. Beyond the most steps of the fit it falls faster.
_LARGEST_FITTED_BATCH, _FITTED_STEPS, _FITTED_K = 512, 2000, (16, 160)
_LR_BY_MORE_STEPS = -0.45
# Well below this rate features end dead: at 390 steps of 2,304 features, and how it falls with both.
_LEAST_LR, _LEAST_LR_STEPS = 2.1e-3, 390
_LEAST_LR_BY_STEPS, _LEAST_LR_BY_FEATURES = -0.45, -0.2
# It does not fall below the published one, for long runs: 2e-4 at 2^14 features, with 1 / sqrt(d_sae) (Gao et al. 2024,
# arXiv 2406.04093, as sparsify and dictionary_learning have it).
_PUBLISHED_LR, _PUBLISHED_FEATURES = 2e-4, 2**14
# A fine-tuning begins near its optimum. This factor was not fitted.
_FINE_TUNING = 0.1

_WARMING_SHARE, _DECAYING_SHARE = 0.04, 0.2

# A feature is dead if it is silent while a feature of the mean firing rate fires this often, but not before this share
# of the steps. A loss for dead features from the first steps on spreads the features before some of them grow.
_FIRINGS_IN_WINDOW, _WINDOW_SHARE = 40, 0.02

# With SAELens's default of 0.1 the features that are active first grow, and take what others could have been. That
# leaves more dead features, and decoder vectors that are more alike, the more the wider an SAE is. The norm is for 4x.
_DECODER_INIT_NORM, _INIT_NORM_FACTOR, _INIT_NORM_BY_FACTOR = 0.5, 4, 0.25
_INIT_NORM_KEY = "sae.decoder_init_norm"
# In the outputs of attention features become alike far more easily. There the norm is larger by this factor, and the
# rate is not raised. Hooks that are not these are treated so too.
_FITTED_HOOKS = re.compile(
    r"\.hook_resid_(pre|mid|post)$|\.hook_mlp_out$|\.(layers|h|blocks)\.\d+(\.(mlp|ffn|feed_forward))?$"
)
_OTHER_HOOKS_NORM = 1.6
# The scalings with which the mean of the activations can be measured.
_CENTERED = ("none", "expected_average_only_in", "expected_average_in_and_out", "covariance_whitening")
OWN_TARGET = "sae.jumprelu_sparsity_loss_mode=quadratic"  # this loss has an L0 of its own as its target


@dataclass(frozen=True)
class Recipe:
    """What the recipe chose for a run.

    Args:
        settings: the settings of the run, with the chosen values.
        reasons: for each chosen value, the flag with the value, and why.
    """

    settings: TrainingSettings
    reasons: tuple[str, ...] = ()


def with_recipe(settings: TrainingSettings, d_in: int, n_ranks: int = 1) -> Recipe:
    """Chooses the values of the flags that nobody gave, if the run has --recipe auto and is not resumed.

    Args:
        settings: the settings of the run.
        d_in: the width of the activations; of several hooks, the largest.
        n_ranks: the number of ranks, which have to divide a batch.

    Raises:
        UserError: a chosen value does not fit the given ones.
    """
    is_resumed = settings.run.resume not in (None, "auto")
    if settings.optimization.recipe != "auto" or is_resumed:
        return Recipe(settings)
    choice = _Choice(settings)
    _choose_sae(choice, d_in)
    _choose_steps(choice, choice.sae.n_features(d_in), n_ranks)
    check_chosen(choice.settings)
    return Recipe(choice.settings, tuple(choice.reasons))


class _Choice:
    """Settings in which flags that nobody gave are set one by one.

    Args:
        settings: the settings of the run.
    """

    def __init__(self, settings: TrainingSettings) -> None:
        self.settings = settings
        self.reasons: list[str] = []

    @property
    def sae(self) -> SAESettings:
        return self.settings.sae

    @property
    def optimization(self) -> OptimizationSettings:
        return self.settings.optimization

    @property
    def has_fitted_hooks(self) -> bool:
        return all(_FITTED_HOOKS.search("." + name) for name in self.settings.model.all_hook_names)

    @property
    def k(self) -> float:
        """The wanted L0."""
        return self.sae.k if "topk" in self.sae.architecture else self.sae.target_l0 or _L0

    def is_given(self, name: str) -> bool:
        return name not in self.settings.chosen

    def choose(self, name: str, value: Any, why: str) -> None:
        """Sets a flag, unless somebody gave it."""
        if self.is_given(name):
            return
        group = "sae" if hasattr(self.sae, name) else "optimization"
        changed = replace(getattr(self.settings, group), **{name: value})
        self.settings = replace(self.settings, **{group: changed})
        self.reasons.append(f"--{name} {value:g}: {why}" if isinstance(value, float) else f"--{name} {value}: {why}")

    def assign(self, key: str, value: float, why: str) -> None:
        """Sets a field as --set does, unless somebody set it."""
        before = self.optimization.set
        if any(each.partition("=")[0] == key for each in before):
            return
        assignment = f"{key}={value:g}"
        self.settings = replace(
            self.settings,
            optimization=replace(self.optimization, set=(*before, assignment)),
            chosen=(*self.settings.chosen, key),
        )
        self.reasons.append(f"--set {assignment}: {why}")


def _choose_sae(choice: _Choice, d_in: int) -> None:
    choice.choose("architecture", *_architecture(choice))
    choice.choose("normalize_activations", "expected_average_only_in", "the rules are for a mean norm of sqrt(d_in)")
    why = "the middle of the healthy range, 40 to 120"
    if "topk" in choice.sae.architecture:
        choice.choose("k", _L0, why)
    elif (
        (weight := SPARSITY_WEIGHTS.get(choice.sae.architecture))
        and not choice.is_given(weight)
        and OWN_TARGET not in choice.optimization.set
    ):
        choice.choose("target_l0", float(_L0), why)
    if choice.sae.init_from is None:
        tokens = choice.optimization.training_tokens
        if choice.sae.d_sae is None:
            choice.choose("expansion_factor", expansion_factor(tokens, d_in), f"{tokens:,} tokens suffice for it")
        if "topk" in choice.sae.architecture:
            if choice.sae.normalize_activations in _CENTERED:
                choice.choose("b_dec_init_method", "mean", "the features begin with what differs between activations")
            norm = decoder_init_norm(choice.sae.n_features(d_in) / d_in, fitted_hooks=choice.has_fitted_hooks)
            choice.assign(_INIT_NORM_KEY, norm, "features grow more evenly than with SAELens's 0.1")


def _architecture(choice: _Choice) -> tuple[str, str]:
    """Returns an architecture that has the given flags, and why."""
    for flag, architecture in (
        ("l1_coefficient", "standard"),
        ("l0_coefficient", "jumprelu"),
        ("target_l0", "jumprelu"),
    ):
        if choice.is_given(flag):
            return architecture, f"has --{flag}"
    if choice.sae.matryoshka_widths is not None:
        return "matryoshka_batchtopk", "has --matryoshka_widths"
    if choice.settings.model.device == "mps":
        return "topk", "SAELens keeps BatchTopK's threshold in float64, which mps does not have"
    return "batchtopk", "recovers the most loss of SAELens's kinds (docs/comparison.md)"


def expansion_factor(tokens: int, d_in: int) -> int:
    """Returns how many features for each dimension the tokens suffice for: 2, 4 or 8."""
    affordable = tokens / (_TOKENS_A_FEATURE * d_in)
    return int(min(max(2 ** math.floor(math.log2(max(affordable, 1))), _NARROWEST), _WIDEST))


def decoder_init_norm(factor: float, *, fitted_hooks: bool) -> float:
    """Returns the norm of the decoder vectors at the first step.

    Args:
        factor: the number of features for each dimension.
        fitted_hooks: whether all hooks are residual streams and outputs of MLPs.
    """
    norm = _DECODER_INIT_NORM * (factor / _INIT_NORM_FACTOR) ** _INIT_NORM_BY_FACTOR
    return _rounded(norm if fitted_hooks else norm * _OTHER_HOOKS_NORM)


def _choose_steps(choice: _Choice, d_sae: int, n_ranks: int) -> None:
    tokens = choice.optimization.training_tokens
    least = choice.settings.text.context_size if choice.optimization.finetune_loss != "none" else 1
    batch = batch_size(tokens, least, n_ranks)
    why = f"for {_STEPS} steps or more" if tokens // batch >= _STEPS else "the smallest, for the most steps"
    choice.choose("train_batch_size_tokens", batch, why)
    batch = choice.optimization.train_batch_size_tokens
    n_steps = max(tokens // batch, 1)
    rate, why = least_learning_rate(n_steps, d_sae), f"for {n_steps:,} steps and {d_sae:,} features"
    if choice.sae.init_from is not None:
        rate, why = rate * _FINE_TUNING, f"a tenth of that of random weights, {why}"
    elif "topk" in choice.sae.architecture and choice.has_fitted_hooks:
        rate = learning_rate(n_steps, d_sae, batch, choice.k)
        why = f"for {n_steps:,} steps of {batch:,} tokens, {d_sae:,} features and k {choice.k:g}"
    choice.choose("lr", _rounded(rate), why)
    n_warm_up = min(max(round(_WARMING_SHARE * n_steps), 1), n_steps // 2)
    choice.choose("lr_warm_up_steps", n_warm_up, f"{_WARMING_SHARE:.0%} of the steps")
    n_decay = round(_DECAYING_SHARE * n_steps)
    choice.choose("lr_decay_steps", n_decay, f"{_DECAYING_SHARE:.0%} of the steps")
    window = dead_feature_window(n_steps, batch, d_sae, choice.k)
    firings = window * batch * choice.k / d_sae
    choice.choose("dead_feature_window", window, f"a feature of the mean firing rate fires {firings:.0f} times in it")


def batch_size(tokens: int, least: int = 1, n_ranks: int = 1) -> int:
    """Returns the tokens of a step, with which a run has 600 to 1,200 steps, or more of 4,096 tokens.

    It is a power of two, or the next multiple of the number of ranks.

    Args:
        tokens: tokens of the run.
        least: the fewest tokens that a step may have.
        n_ranks: the number of ranks, which divide a batch.
    """
    size = 2 ** math.floor(math.log2(max(tokens / _STEPS, 1)))
    size = max(min(size, _LARGEST_BATCH), _SMALLEST_BATCH, LEAST_SHARE * n_ranks, least)
    return -(-size // n_ranks) * n_ranks


def learning_rate(n_steps: int, d_sae: int, batch: int, k: float) -> float:
    """Returns the learning rate of Adam with which BatchTopK explains most, as far as its features stay apart.

    It is for activations of residual streams and MLPs, scaled to a mean norm of sqrt(d_in), and not below
    `least_learning_rate`. docs/recipes.md has the runs that it was fitted to.

    Args:
        n_steps: steps of the run.
        d_sae: number of features.
        batch: tokens of a step.
        k: active features of a token.
    """
    rate = _LR * (min(batch, _LARGEST_FITTED_BATCH) / _LR_BATCH) ** _LR_BY_BATCH
    rate *= (min(n_steps, _FITTED_STEPS) / _LR_STEPS) ** _LR_BY_STEPS
    rate *= max(n_steps / _FITTED_STEPS, 1) ** _LR_BY_MORE_STEPS
    rate *= max(d_sae / _LR_FEATURES, 1) ** _LR_BY_FEATURES
    rate *= (min(max(k, _FITTED_K[0]), _FITTED_K[1]) / _LR_K) ** _LR_BY_K
    return max(rate, least_learning_rate(n_steps, d_sae))


def least_learning_rate(n_steps: int, d_sae: int) -> float:
    """Returns the learning rate of Adam with which few features end dead, for activations scaled as above.

    It is not below the published rate for long runs.
    """
    by_steps = (n_steps / _LEAST_LR_STEPS) ** _LEAST_LR_BY_STEPS
    least = _LEAST_LR * by_steps * (d_sae / _LR_FEATURES) ** _LEAST_LR_BY_FEATURES
    return max(least, _PUBLISHED_LR * math.sqrt(_PUBLISHED_FEATURES / d_sae))


def dead_feature_window(n_steps: int, batch: int, d_sae: int, k: float) -> int:
    """Returns after how many silent steps a feature counts as dead."""
    window = max(_FIRINGS_IN_WINDOW * d_sae / (k * batch), _WINDOW_SHARE * n_steps, 4)
    return max(round(min(window, n_steps / 8)), 1)


def _rounded(number: float) -> float:
    """Returns a number rounded to two significant digits, for the value of a flag."""
    return float(f"{number:.2g}")
