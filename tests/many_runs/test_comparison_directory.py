"""A comparison that goes on takes from its directory only what was trained and measured as the rest."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from sae_toolkit.errors import UserError
from sae_toolkit.many_runs.comparison.contenders import Contender, make_entry
from sae_toolkit.many_runs.comparison.evaluations import (
    MeasuredOn,
    forget_evaluations,
    keep_evaluation,
    read_evaluation,
)
from sae_toolkit.many_runs.comparison.shared_activations import _check_same_flags, _flags_in_common
from sae_toolkit.many_runs.directories import write_result

LIKE = {
    **{"model_name": "a_model", "hook_name": "blocks.1.hook_resid_post", "context_size": 256},
    **{"dataset_path": "a_text", "dataset_config": None, "dataset_split": "train", "seqpos_slice": [1, None]},
    **{"held_out_fraction": 0.2, "held_out_seed": 42, "max_activation_norm": 12.5},
}
ON = MeasuredOn("test", 100, LIKE)


@pytest.fixture
def entry(tmp_path):
    """An SAE that is trained, and evaluated on `ON` beside its weights."""
    entry = make_entry(Contender("saelens", "topk"), 8, None, 42, tmp_path)
    sae = entry.directory / "sae"
    sae.mkdir(parents=True)
    write_result(entry.directory, {"sae": str(sae)})
    write_evaluation(entry)
    return entry


def write_evaluation(entry, **others):
    """Writes an evaluation.json beside the weights, which differs from one on `ON` by `others`."""
    results = {
        **{"protocol": "health", "model": "a_model", "hook_name": "blocks.1.hook_resid_post", "context_length": 256},
        **{"dataset": "a_text", "dataset_config": None, "dataset_split": "train"},
        **{"held_out": {"fraction": 0.2, "seed": 42, "part": "test"}, "loss_sequences": 100, "sequences": 100},
        **{"positions": {"skip_positions": 1, "max_activation_norm": 12.5}, "metrics": {"l0": 8.0}},
        "sources": {"hook_name": "--like", "skip_positions": "--like"},
    }
    path = Path(entry.trained()["sae"]) / "evaluation.json"
    path.write_text(json.dumps(results | others))
    return path


def test_what_was_measured_stays_when_the_sae_is_evaluated_on_other_text(entry):
    keep_evaluation(entry, ON)
    write_evaluation(entry, dataset="another_text", held_out=None, metrics={"l0": 9.0})
    assert read_evaluation(entry, ON)["metrics"] == {"l0": 8.0}
    assert read_evaluation(entry, replace(ON, part=None)) is None


@pytest.mark.parametrize(
    "other",
    [
        replace(ON, num_samples=50),
        replace(ON, num_samples=None),
        replace(ON, part=None),
        replace(ON, like=LIKE | {"held_out_seed": 43}),
        replace(ON, like=LIKE | {"max_activation_norm": 12.6}),
    ],
)
def test_what_was_measured_otherwise_is_measured_again(entry, other):
    assert read_evaluation(entry, other) is None  # as an older comparison left it
    keep_evaluation(entry, ON)
    assert read_evaluation(entry, other) is None
    assert read_evaluation(entry, ON) is not None


@pytest.mark.parametrize(
    "others",
    [
        {"dataset": "another_text", "held_out": None},
        {"held_out": {"fraction": 0.2, "seed": 43, "part": "test"}},
        {"dataset_split": "test"},
        {"sequences": 99},
        {"loss_sequences": 50},
        {"protocol": "saebench", "positions": None},
        {"positions": {"skip_positions": 0, "max_activation_norm": 12.5}},
        {"sources": {"hook_name": "--like", "skip_positions": "flag"}},
        {"sources": {"hook_name": "record", "skip_positions": "record"}},
        {"sources": None},
    ],
)
def test_an_evaluation_of_an_older_comparison_counts_only_if_it_certainly_fits(entry, others):
    assert read_evaluation(entry, ON)["metrics"] == {"l0": 8.0}
    write_evaluation(entry, **others)
    assert read_evaluation(entry, ON) is None


def test_the_numbers_of_sequences_that_the_evaluation_chooses_fit_too(entry):
    write_evaluation(entry, loss_sequences=79, sequences=206)  # 20,000 and 52,500 tokens of contexts of 255
    assert read_evaluation(entry, replace(ON, num_samples=None)) is not None


def test_results_on_validation_text_are_moved_away_from_the_weights(entry):
    on = replace(ON, part="validation")
    beside = write_evaluation(entry, held_out={"fraction": 0.2, "seed": 42, "part": "validation"})
    keep_evaluation(entry, on)
    assert not beside.exists()
    assert read_evaluation(entry, on)["metrics"] == {"l0": 8.0}


def test_nothing_is_kept_of_an_sae_that_is_trained_again(entry):
    keep_evaluation(entry, ON)
    write_evaluation(entry).unlink()
    forget_evaluations(entry)
    assert read_evaluation(entry, ON) is None


def settings_of(directory, *words):
    """Writes the settings that a comparison records."""
    (directory / "settings.json").write_text(json.dumps(_flags_in_common(words)))


def reference_with(directory, held_out_seed):
    (directory / ".measured_like").mkdir()
    (directory / ".measured_like" / "cfg.json").write_text(json.dumps({"metadata": {"held_out_seed": held_out_seed}}))


def test_another_seed_is_refused_unless_it_holds_out_the_same_documents(tmp_path):
    settings_of(tmp_path, "--seed", "42")
    _check_same_flags(tmp_path, _flags_in_common(["--seed", "43", "--held_out_seed", "42"]))
    says = f"--held_out_seed 43: the comparison in {tmp_path} has 42; add --held_out_seed 42, or name another"
    with pytest.raises(UserError, match=re.escape(says)):
        _check_same_flags(tmp_path, _flags_in_common(["--seed", "43"]))


def test_what_an_older_comparison_held_out_is_read_from_its_saes(tmp_path):
    older = {name: value for name, value in _flags_in_common([]).items() if name != "held_out_seed"}
    (tmp_path / "settings.json").write_text(json.dumps(older))
    with pytest.raises(UserError, match="of an older version, and its SAEs have no held-out seed; name another"):
        _check_same_flags(tmp_path, _flags_in_common([]))
    reference_with(tmp_path, 42)
    _check_same_flags(tmp_path, _flags_in_common([]))
    with pytest.raises(UserError, match="--held_out_seed 43: "):
        _check_same_flags(tmp_path, _flags_in_common(["--seed", "43"]))
    sae = tmp_path / "saes" / "saelens-topk-l0_8-seed43" / "sae_12345678" / "a_run" / "final_20480"
    sae.mkdir(parents=True)
    (sae / "cfg.json").write_text(json.dumps({"metadata": {"held_out_seed": 43}}))
    with pytest.raises(UserError, match="its SAEs have the held-out seeds 42 and 43; name another"):
        _check_same_flags(tmp_path, _flags_in_common([]))
