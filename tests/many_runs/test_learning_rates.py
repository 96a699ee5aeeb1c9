"""Learning rates are chosen on text that the table leaves out, and contenders are ranked with intervals over seeds."""

import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest

from sae_toolkit.errors import UserError
from sae_toolkit.many_runs.comparison.contenders import Contender, Outcome, make_entry, parse_contenders
from sae_toolkit.many_runs.comparison.learning_rates import (
    Choice,
    check_learning_rates,
    rates_around,
    with_learning_rates,
)
from sae_toolkit.many_runs.comparison.ranking import rank, ranking_note, ranking_table
from sae_toolkit.many_runs.comparison.run import train_and_evaluate

LISTED = Contender("sparsify", "topk", rates=(1e-3, 2e-3, 4e-3))
OWN = Contender("saelens", "topk")


def test_several_rates_after_at_are_those_to_choose_from():
    assert parse_contenders(["sparsify:topk@4e-3,1e-3,0.002", "sparsify@2e-3"]) == [
        LISTED,
        Contender("sparsify", "topk", 2e-3),
    ]


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["saelens@1e-3,2e-3,1e-3"], "--libraries saelens@1e-3,2e-3,1e-3: the learning rate 0.001 is there twice"),
        (["saelens@1e-3,fast"], "--libraries saelens@1e-3,fast: after @ comes a learning rate"),
        (["saelens@1e-3,"], "--libraries saelens@1e-3,: after @ comes a learning rate"),
        (
            ["sparsify@1,2", "sparsify@1,3"],
            "--libraries sparsify@1,3: sparsify topk has another list of learning rates",
        ),
    ],
)
def test_a_list_of_rates_that_cannot_be_right_is_one_line(texts, says):
    with pytest.raises(UserError, match=re.escape(says)):
        parse_contenders(texts)


@pytest.mark.parametrize(
    ("texts", "n_rates", "says"),
    [
        (["sparsify"], 1, "--learning_rates 1: must be 2 to 7"),
        (["sparsify"], 8, "--learning_rates 8: must be 2 to 7"),
        (["saelens", "sparsify@1e-3"], 3, "--learning_rates 3: no SAE here takes them"),
    ],
)
def test_a_number_of_rates_without_an_effect_is_refused(texts, n_rates, says):
    with pytest.raises(UserError, match=re.escape(says)):
        check_learning_rates(parse_contenders(texts), n_rates)


def test_rates_are_around_the_librarys_own_and_higher_where_it_is_made_for_a_longer_run():
    shape = {"d_sae": 2**14, "n_steps": 488}
    assert rates_around("sparsify", 3, **shape) == (1.6e-3, None, 1.6e-2)  # its own is 5e-3
    assert rates_around("sparsify", 2, **shape) == (None, 1.6e-2)
    assert rates_around("dictionary_learning", 3, **shape) == (None, 9.5e-4, 3e-3)  # its own is 3e-4
    assert rates_around("dictionary_learning", 5, **shape) == (9.5e-5, None, 9.5e-4, 3e-3, 9.5e-3)
    assert rates_around("dictionary_learning", 3, d_sae=2**14, n_steps=200_000) == (9.5e-5, None, 9.5e-4)


def test_a_list_takes_the_place_of_the_rates_that_all_are_given_and_saelens_has_its_own():
    contenders = parse_contenders(["saelens:topk", "sparsify", "sparsify@1e-3,2e-3,4e-3", "sparsify@2e-3"])
    kept = with_learning_rates(contenders, 3, d_sae=2304, n_steps=488)
    assert kept == [OWN, LISTED, Contender("sparsify", "topk", 2e-3)]


def outcome(contender, lr, recovered, l0, *, seed=42, target=40):
    """Returns an outcome with these metrics; a training that failed if `recovered` is None."""
    entry = make_entry(contender, target, lr, seed, Path("comparison"))
    if recovered is None:
        return Outcome(entry, None, None, "diverged")
    evaluation = {"metrics": {"loss_recovered": recovered, "l0": l0}}
    return Outcome(entry, {"sae": "sae", "lr": lr}, evaluation, None)


@pytest.mark.parametrize(
    ("measured", "chosen", "border"),
    [
        ([(0.90, 40), (0.95, 40), (0.93, 40)], 2e-3, None),
        ([(0.90, 40), (0.93, 40), (0.95, 40)], 4e-3, "highest"),
        ([(0.95, 40), (0.93, 40), (None, 40)], 1e-3, "lowest"),
        ([(0.90, 40), (0.95, 40), (None, 40)], 2e-3, None),  # the highest was tried, and failed
        ([(0.90, 41), (0.99, 80), (0.89, 40)], 1e-3, "lowest"),  # twice the L0 is no better learning rate
        ([(0.90, 60), (0.99, 80), (0.89, 50)], 2e-3, None),
        ([(0.90, 40), (0.95, 20), (0.93, 40)], 2e-3, None),  # fewer features that recover more are no reason against it
    ],
)
def test_the_rate_that_recovers_most_of_the_loss_at_the_target_l0_is_chosen(measured, chosen, border):
    tried = [outcome(LISTED, lr, *found) for lr, found in zip(LISTED.rates, measured, strict=True)]
    choice = Choice(LISTED, 40, tuple(tried))
    assert (choice.chosen.lr, choice.border) == (chosen, border)


def test_without_a_training_that_worked_no_rate_is_chosen():
    choice = Choice(LISTED, 40, tuple(outcome(LISTED, lr, None, 0) for lr in LISTED.rates))
    assert (choice.chosen, choice.border) == (None, None)


T_OF_TWO_DEGREES = 4.302653  # 97.5% quantile of Student's t, from a printed table


def test_contenders_are_ranked_at_each_l0_with_differences_paired_by_seed():
    ours, theirs, others = [0.950, 0.954, 0.951], [0.952, 0.955, 0.950], [0.90, 0.91, 0.92]
    outcomes = [
        outcome(contender, lr, recovered, l0, seed=seed)
        for contender, lr, l0, found in (
            (OWN, None, 40.0, ours),
            (LISTED, 1e-3, 41.1, theirs),
            (Contender("saelens", "gated"), None, 41.3, others),
        )
        for seed, recovered in enumerate(found)
    ]
    first, second, third = rank([*outcomes, outcome(OWN, None, 0.97, 80, target=80)])[:3]
    assert [each.contender for each in (first, second)] == [LISTED, OWN]
    assert first.loss_recovered.mean == pytest.approx(statistics.mean(theirs))
    half_width = T_OF_TWO_DEGREES * statistics.stdev(theirs) / 3**0.5
    assert first.loss_recovered.half_width == pytest.approx(half_width, rel=1e-6)
    differences = [a - b for a, b in zip(theirs, ours, strict=True)]
    assert first.difference.mean == pytest.approx(statistics.mean(differences))
    half_width = T_OF_TWO_DEGREES * statistics.stdev(differences) / 3**0.5
    assert first.difference.half_width == pytest.approx(half_width, rel=1e-6)
    assert second.difference.mean == pytest.approx(-first.difference.mean)
    assert third.difference.mean == pytest.approx(statistics.mean(others) - statistics.mean(theirs))
    assert [each.is_at_target for each in (first, second, third)] == [True, True, False]
    assert "SAELens gated at 40." in ranking_note(outcomes)
    _, rows = ranking_table(outcomes)
    assert rows[2] == ["SAELens gated", "40", "3", "91.00% ± 2.48%", "-4.23% ± 2.79%", "41.3, +3% off the target"]


def test_a_row_says_on_how_many_of_the_seeds_it_was_measured():
    complete = [outcome(OWN, None, 0.90, 40, seed=seed) for seed in (42, 43, 44)]
    failed_once = [outcome(LISTED, 1e-3, recovered, 40, seed=42 + i) for i, recovered in enumerate((0.95, None, 0.95))]
    _, rows = ranking_table([*complete, *failed_once])
    assert [name for name, *_ in rows] == [f"{LISTED.name} (2 of 3 seeds measured)", OWN.name]


def test_no_rate_can_be_chosen_where_no_loss_can_be_recovered(tmp_path):
    reference = tmp_path / ".measured_like"
    reference.mkdir()
    (reference / "cfg.json").write_text('{"metadata": {}}')
    shared = SimpleNamespace(directory=tmp_path, reference=reference, at_a_time=1)
    evaluation = {"metrics": {"loss_recovered": None, "l0": 40.0}}
    tried = tuple(
        Outcome(make_entry(LISTED, 40, lr, 42, tmp_path), {"sae": "sae", "lr": lr}, evaluation, None)
        for lr in LISTED.rates
    )
    (found,) = train_and_evaluate([LISTED], [40], [42], [Choice(LISTED, 40, tried)], shared, 12)
    assert found.failed == "no learning rate can be chosen: zeros at the hook do not raise the loss"


def test_one_seed_and_one_contender_have_no_interval_and_no_difference():
    (place,) = rank([outcome(OWN, None, 0.9, 40), outcome(LISTED, 1e-3, None, 0)])
    assert (place.loss_recovered.half_width, place.difference) == (None, None)
    assert ranking_note([outcome(LISTED, 1e-3, None, 0)]) == "Nothing was measured."
