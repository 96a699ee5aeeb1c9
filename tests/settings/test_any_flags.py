"""Any combination of flags trains, or is refused in one line. tests/faults/test_any_flags.py is the long form."""

from support.flag_combinations import run_combinations


def test_any_flags_train_or_are_refused_in_one_line(script, tiny_run, text_file, tmp_path, monkeypatch):
    outcomes = run_combinations(60, script, tiny_run, text_file.read_text(), tmp_path, monkeypatch)
    assert "ran" in outcomes
    assert len({*outcomes}) >= 20
