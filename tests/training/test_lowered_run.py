"""Flags that are suggested where a run takes too much memory: with them it fits."""

import pytest
import torch

from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.training.card import RunOnCard
from sae_toolkit.training.lowered_run import lower_peak

# Of the width 32: 32,768 features, and large batches.
LARGE = "--layer 1 --expansion_factor 1024 --context_size 64 --train_batch_size_tokens 4096".split()


@pytest.fixture
def run(tiny_model):
    """Returns the run with these flags on the tiny model."""
    return lambda *flags: RunOnCard.of(
        parse_training_flags(["--model_name", str(tiny_model), *LARGE, *flags]), auto_dtype=torch.float32
    )


def peak_of(run):
    return lambda cfg, evaluates: run.plan(cfg, evaluates).peak


@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
@pytest.mark.parametrize("flags", [(), ("--eval_every", "100000")], ids=["", "with measurements on the way"])
def test_what_is_suggested_fits(run, share, flags):
    asked = run(*flags)
    (cfg,), before = asked.cfgs, peak_of(asked)(asked.cfgs[0], asked.evaluates)
    capacity = int(share * before)
    lowered = lower_peak(cfg, peak_of(asked), capacity, evaluates=asked.evaluates)
    assert lowered.flags
    assert lowered.peak <= capacity
    followed = run(*flags, *lowered.flags)
    assert peak_of(followed)(followed.cfgs[0], followed.evaluates) <= capacity + 2**20


def test_nothing_is_suggested_for_what_fits_and_as_much_as_possible_for_what_cannot(run):
    asked = run("--eval_every", "100000")
    (cfg,) = asked.cfgs
    there = peak_of(asked)(cfg, True)
    assert lower_peak(cfg, peak_of(asked), there, evaluates=True).flags == ()
    lowered = lower_peak(cfg, peak_of(asked), 1000, evaluates=True)
    assert lowered.peak > 1000
    assert lowered.flags[:2] == ("--eval_every", "0")
    assert lowered.cfg.sae.d_sae >= 2 * lowered.cfg.sae.d_in


def test_measurements_on_the_way_are_kept_where_fewer_features_suffice_and_are_needed(run):
    asked = run("--eval_every", "100000")
    (cfg,) = asked.cfgs
    measuring = peak_of(asked)(cfg, True)
    without = peak_of(asked)(cfg, False)
    assert without < measuring
    assert lower_peak(cfg, peak_of(asked), without, evaluates=True).flags == ("--eval_every", "0")
    lowered = lower_peak(cfg, peak_of(asked), without // 2, evaluates=True)
    assert "--eval_every" not in lowered.flags
    assert lowered.evaluates
    assert lowered.peak <= without // 2


def test_a_flag_that_was_given_is_not_changed(run):
    asked = run("--eval_every", "100000")
    given = {"expansion_factor", "eval_every"}
    lowered = lower_peak(asked.cfgs[0], peak_of(asked), 1000, evaluates=True, given=given)
    assert lowered.flags
    assert not {f"--{name}" for name in given} & set(lowered.flags)
    assert lowered.evaluates
