"""A comparison refuses flags that it would not obey, and knows which flags a person typed."""

import re
from dataclasses import replace

import pytest

from sae_toolkit.errors import UserError
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.settings.comparison import check_training_flags, with_few_tokens, without_target_l0


@pytest.fixture
def preset(tmp_path):
    """A flag file with flags that have no effect in a comparison."""
    file = tmp_path / "a.args"
    file.write_text("--architecture gated\n--target_l0 32 --eval_every 1000\n--training_tokens 500000\n")
    return f"@{file}"


@pytest.mark.parametrize("typed", [["--training_tokens", "100000"], ["--training_tokens=100000"]])
def test_a_quick_comparison_trains_on_as_many_tokens_as_a_person_typed(preset, typed):
    words = [preset, *typed]
    quick = with_few_tokens(words, parse_training_flags(words))
    assert parse_training_flags(quick).optimization.training_tokens == 100_000


def test_a_quick_comparison_takes_fewer_tokens_than_a_flag_file_says_with_the_decay_in_proportion(preset):
    words = [preset, "--lr_decay_steps", "100"]
    quick = parse_training_flags(with_few_tokens(words, parse_training_flags(words))).optimization
    assert (quick.training_tokens, quick.lr_decay_steps) == (250_000, 50)


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["--architecture", "topk"], "--architecture topk: the comparison sets it; use --libraries"),
        (["--architecture=topk", "--k=16"], "--architecture topk: the comparison sets it; use --libraries"),
        (["--k", "16"], "--k 16: the comparison sets it; use --l0"),
        (["--architecture", "gated", "--target_l0", "16"], "--architecture gated: "),
        (["--checkpoint_path", "runs"], "--checkpoint_path runs: the comparison sets it; use --comparison_dir"),
        (["--eval_every", "100"], "--eval_every 100: the comparison sets it; leave it out"),
        (["--held_out_fraction", "0"], "--held_out_fraction 0: leaves no text to measure the SAEs on"),
        (["--layers", "1", "2"], "--layers, --hook_names: a comparison is of one hook"),
    ],
)
def test_a_flag_that_the_comparison_sets_is_refused_if_a_person_typed_it(typed, says):
    with pytest.raises(UserError, match=re.escape(says)):
        check_training_flags(typed, parse_training_flags(typed))


def test_a_flag_file_may_have_flags_that_the_comparison_sets(preset):
    check_training_flags([preset], parse_training_flags([preset]))
    expected = replace(parse_training_flags([preset]).sae, target_l0=None)
    assert parse_training_flags(without_target_l0([preset])).sae == expected  # kinds with a k refuse it
    with pytest.raises(UserError, match="--target_l0 16.0: the comparison sets it; use --l0"):
        check_training_flags([preset, "--target_l0", "16"], parse_training_flags([preset, "--target_l0", "16"]))


def test_several_seeds_of_a_flag_file_are_refused(tmp_path):
    flags = tmp_path / "flags.args"
    flags.write_text("--seeds 3\n")
    with pytest.raises(UserError, match="--seeds 3: of a flag file"):
        check_training_flags([f"@{flags}"], parse_training_flags([f"@{flags}"]))
