"""Hundreds of combinations of flags, each trained to the end or refused in one line that names what was given."""

import pytest

from support.flag_combinations import run_combinations

pytestmark = pytest.mark.faults


def test_any_flags_train_or_are_refused_in_one_line(script, tiny_run, text_file, tmp_path, monkeypatch, record_fault):
    outcomes = run_combinations(800, script, tiny_run, text_file.read_text(), tmp_path, monkeypatch)
    n_ran = outcomes.count("ran")
    n_refused = len(outcomes) - n_ran
    record_fault(
        "bad flags",
        n_refused,
        f"each ended in one line that names the flag, exit status 2; {n_ran} others trained to the end",
        "nothing",
    )
    assert n_refused >= 500
