"""Settings of a comparison of libraries, and its command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sae_toolkit.errors import UserError
from sae_toolkit.settings.command_line import parse_training_flags, training_words, typed_flags
from sae_toolkit.settings.fields import as_text, build_parser, flag, from_flags
from sae_toolkit.settings.training import TrainingSettings
from sae_toolkit.settings.values import Positive

_QUICK_TOKENS = 250_000
_SET_BY_COMPARISON = {
    "architecture": "use --libraries, as in --libraries saelens:topk",
    "k": "use --l0",
    "target_l0": "use --l0",
    "checkpoint_path": "use --comparison_dir",
    "eval_every": "leave it out: each SAE is measured once, after its training",
}
"""Flags of a training that have no effect in a comparison, and what to do instead. Flag files may have them."""


@dataclass(frozen=True)
class ContenderSettings:
    """SAEs that are compared."""

    libraries: tuple[str, ...] = flag(("saelens", "sparsify", "dictionary_learning"), metavar="LIBRARY[:KIND][@LR,...]")
    """libraries to compare. A library trains each kind of SAE that it has, or only KIND, with its own learning rate, or
    with LR; of several rates, joined by commas, the best is chosen for each L0
    """
    learning_rates: Positive | None = flag(None, metavar="N")
    """choose the learning rate of sparsify and dictionary_learning, where none follows @, for each L0 among N: the
    library's own, and others at half powers of ten around it. The first seed is trained with all of them, and the one
    that recovers most of the loss on validation text is chosen: a half of the held-out documents, which nothing else is
    measured on (default: the library's own)
    """
    l0: tuple[Positive, ...] | None = None
    """train with each of these numbers of active features per token (default: 20 40 80 160; with --quick 64)"""
    seeds: Positive = flag(1, metavar="N")
    """train each SAE with N random seeds: --seed and the numbers after it"""


@dataclass(frozen=True)
class ComparisonRunSettings:
    """Comparison."""

    quick: bool = False
    """train with one L0 and on 250,000 tokens, unless --l0 or --training_tokens is given"""
    comparison_dir: Path | None = None
    """directory of the comparison (default: comparisons/OUTPUT_NAME)"""
    parallel: Positive = flag(1, metavar="N")
    """number of trainings at a time, each with its share of the cores"""
    num_samples: Positive | None = None
    """number of sequences to evaluate each SAE on (default: that of evaluate_sae_real_activations.py)"""
    dry_run: bool = False
    """list the SAEs, and stop"""
    verbose: bool = flag(False, is_exclusive=True)
    """also show details"""
    quiet: bool = flag(False, is_exclusive=True)
    """show only warnings, errors and results"""


@dataclass(frozen=True)
class ComparisonSettings:
    """Settings of a comparison, without those of its trainings."""

    contenders: ContenderSettings = field(default_factory=ContenderSettings)
    run: ComparisonRunSettings = field(default_factory=ComparisonRunSettings)


def parse_comparison_flags(description: str, argv: Sequence[str] | None = None) -> tuple[ComparisonSettings, list[str]]:
    """Parses the flags of a comparison.

    Args:
        description: description of the script, for --help.

    Returns:
        The settings of the comparison, and the words of the command line that are flags of its trainings.

    Raises:
        UserError: the value of a flag cannot be right.
    """
    own, words = build_parser(ComparisonSettings, description=description).parse_known_args(argv)
    return from_flags(ComparisonSettings, vars(own)), words


def check_training_flags(words: Sequence[str], training: TrainingSettings) -> None:
    """Checks that a comparison can have the flags of its trainings.

    Args:
        words: from `parse_comparison_flags`.
        training: the same words, parsed.

    Raises:
        UserError: a flag is not for a comparison, or has no effect in one.
    """
    if training.model.layers or training.model.hook_names:
        raise UserError("--layers, --hook_names: a comparison is of one hook; use --layer")
    if training.run.resume or training.sae.shard_features:
        raise UserError(
            "--resume, --shard_features: not for a comparison, which resumes without a flag; leave them out"
        )
    if (seeds := training.optimization.seeds) > 1:  # of a flag file or --like; a typed one is the comparison's
        raise UserError(
            f"--seeds {seeds}: of a flag file or --like, where it makes one run of several SAEs; leave it out there,"
            " and give --seeds itself"
        )
    if training.text.held_out_fraction == 0:
        raise UserError("--held_out_fraction 0: leaves no text to measure the SAEs on; use 0.1")
    typed = typed_flags(words)
    for name, instead in _SET_BY_COMPARISON.items():
        if name in typed:
            raise UserError(f"--{name} {as_text(training.as_flags()[name])}: the comparison sets it; {instead}")


def without_target_l0(words: Sequence[str]) -> list[str]:
    """Returns the words without a --target_l0 of a flag file or --like, which the kinds with a k would refuse."""
    settings = parse_training_flags(words)
    if settings.sae.target_l0 is None:
        return list(words)
    return training_words(settings.as_flags(), leave_out=("target_l0", "like", "preset"))


def with_few_tokens(words: Sequence[str], training: TrainingSettings) -> list[str]:
    """Returns the words for the trainings of a quick comparison: on 250,000 tokens, unless a person typed a number.

    Args:
        words: from `parse_comparison_flags`.
        training: the same words, parsed.
    """
    if "training_tokens" in typed_flags(words):
        return list(words)
    few = [*words, "--training_tokens", str(_QUICK_TOKENS)]
    if decay := training.optimization.lr_decay_steps:
        few += ["--lr_decay_steps", str(decay * _QUICK_TOKENS // training.optimization.training_tokens)]
    return few
