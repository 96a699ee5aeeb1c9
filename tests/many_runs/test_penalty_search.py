"""The penalty that leads to a wanted L0 is found in a few whole trainings."""

import json
import math
from itertools import pairwise

import pytest

from sae_toolkit.many_runs.comparison.contenders import Contender, Entry
from sae_toolkit.many_runs.comparison.penalty_search import next_penalty, tried_before


@pytest.mark.parametrize(("a", "power"), [(3.0, -1.4), (0.5, -0.6), (80.0, -2.5)])
def test_a_penalty_is_found_within_four_trainings_where_l0_is_a_power_of_it(a, power):
    tried: list[tuple[float, float]] = []
    for _ in range(4):
        penalty = next_penalty(tried, 64, first=0.03)
        tried.append((penalty, a * penalty**power))
        if abs(math.log(tried[-1][1] / 64)) < math.log(1.1):
            break
    assert abs(math.log(tried[-1][1] / 64)) < math.log(1.1), tried


@pytest.mark.parametrize(("a", "power"), [(3.0, -1.4), (0.5, -0.6), (80.0, -2.5)])
def test_a_search_with_another_learning_rate_begins_at_the_penalty_of_the_first(a, power):
    elsewhere = [(penalty, a * penalty**power) for penalty in (0.01, 0.03, 0.08)]
    begin = next_penalty([], 64, first=1e6, elsewhere=elsewhere)
    assert a * begin**power == pytest.approx(64)
    # With this rate every L0 is a quarter lower. The slope of the other rate is what one trial does not tell.
    second = next_penalty([(begin, 0.75 * 64)], 64, first=1e6, elsewhere=elsewhere)
    assert 0.75 * a * second**power == pytest.approx(64)


def test_a_search_does_not_try_a_penalty_twice_where_l0_does_not_fall_with_it():
    """As it was with the gated SAEs of dictionary_learning at a learning rate of 8e-3."""
    before, own = [(0.12, 25.0), (0.158, 19.9)], [(0.157, 13.4), (0.127, 7.4)]
    for _ in range(4):
        own.append((next_penalty([*before[:1], *own], 20, 0.024, before, own), 5.0))
    penalties = sorted(penalty for penalty, _ in own)
    assert all(b > 1.01 * a for a, b in pairwise(penalties)), penalties


def test_a_search_whose_seed_differs_from_the_last_one_goes_on_from_its_own_trainings():
    before, own = [(0.1, 20.0)], [(0.1, 30.0)]
    assert next_penalty([*before, *own], 20, 0.024, (), own) == pytest.approx(0.15)


def test_a_search_does_not_jump_from_trainings_that_collapsed():
    """As it was with a standard SAE of dictionary_learning at a learning rate of 8e-3."""
    before, own = [(0.0191, 147.2), (0.018, 143.2), (0.0167, 151.1)], []
    for _ in range(4):
        own.append((next_penalty([*before, *own], 160, 0.03, (), own), 2.0))
    penalties = [penalty for penalty, _ in own]
    assert all(0.49 < b / a < 1 for a, b in pairwise(penalties)), penalties


def test_trainings_that_collapsed_do_not_lead_a_search():
    """As it was with the gated SAEs of dictionary_learning at a learning rate of 4e-3."""
    tried = [(0.15, 21.0), (0.024, 158.7), (0.0238, 3.9), (0.0008, 41.0), (0.0002, 52.0)]
    assert next_penalty(tried, 40, 0.024) == pytest.approx(next_penalty(tried[:2], 40, 0.024))
    assert next_penalty(tried, 160, 0.024) == pytest.approx(0.024)  # the one that led there


def test_a_training_that_several_searches_report_counts_once(tmp_path):
    reported = {  # penalty and L0: each search adds its own trainings to those before it
        "lr0.002-l0_80-seed42": [(0.02, 100.0), (0.03, 81.0)],
        "lr0.002-l0_80-seed43": [(0.02, 100.0), (0.03, 81.0), (0.031, 79.0)],
        "lr0.004-l0_80-seed42": [(0.04, 80.0)],
    }
    for name, tried in reported.items():
        (directory := tmp_path / f"dictionary_learning-gated-{name}").mkdir()
        (directory / "result.json").write_text(json.dumps({"tried": tried}))
    third = tmp_path / "dictionary_learning-gated-lr0.002-l0_80-seed44"
    entry = Entry(Contender("dictionary_learning", "gated"), 80, 0.002, 44, third)
    assert tried_before(entry) == ([(0.02, 100.0), (0.03, 81.0), (0.031, 79.0)], [(0.04, 80.0)])
