"""A sweep trains what its grid says, refuses what it cannot train, and ends in a table, a front and a command."""

from __future__ import annotations

import json
import shlex
from functools import partial

import pytest
from ray._private.utils import validate_socket_filepath

from sae_toolkit.errors import UserError
from sae_toolkit.many_runs.sweep.report import best_first, trials_on_front
from sae_toolkit.many_runs.sweep.run import ray_directory
from sae_toolkit.many_runs.sweep.trials import Trial, make_trials, measured_otherwise
from sae_toolkit.settings.command_line import parse_training_flags
from support.processes import ROOT

DEMO = [f"@{ROOT}/presets/demo.args"]
NOTHING_HELD_OUT = ("--held_out_fraction", "0", "--eval_every", "0")


def trials(tmp_path, *grids, base=DEMO, **more):
    return make_trials(base, tmp_path, grids=grids, **more)


def test_a_grid_is_every_combination_of_its_values(tmp_path):
    found = trials(tmp_path, "lr=3e-4,1e-3", "k=32,64", "expansion_factor=4,8")
    assert len({trial.directory for trial in found}) == len(found) == 8
    assert found[0].values == {"lr": "3e-4", "k": "32", "expansion_factor": "4"}
    assert found[0].flags == [*DEMO, "--lr", "3e-4", "--k", "32", "--expansion_factor", "4"]
    assert len({trial.cache for trial in found}) == 1  # the same model, layer and contexts
    again = trials(tmp_path, "k=64,32", "lr=1e-3", "expansion_factor=4")
    assert {trial.directory for trial in again} < {trial.directory for trial in found}  # a smaller sweep finds them


def test_trials_of_several_seeds_hold_out_the_same_documents(tmp_path):
    for more, held_out in ((), 42), (("--held_out_seed", "7"), 7):
        found = [parse_training_flags(trial.flags) for trial in trials(tmp_path, "seed=42,43", base=[*DEMO, *more])]
        assert [settings.held_out_seed for settings in found] == [held_out, held_out]
    swept = [parse_training_flags(trial.flags) for trial in trials(tmp_path, "seed=42,43", "held_out_seed=1,2")]
    assert [settings.held_out_seed for settings in swept] == [1, 2, 1, 2]


def test_trials_that_are_measured_on_other_activations_are_said_to_be(tmp_path):
    assert measured_otherwise(trials(tmp_path, "k=32,64", "seed=1,2", "context_size=128")) == []
    assert measured_otherwise(trials(tmp_path, "context_size=128,256", "layer=4,8")) == ["layer", "context_size"]


def test_trials_at_other_layers_have_activations_of_their_own(tmp_path):
    found = trials(tmp_path, "layer=4,8", "k=32,64")
    assert len({trial.cache for trial in found}) == 2
    assert {trial.cache for trial in trials(tmp_path, "k=32,64", caches=False)} == {None}


def test_a_sample_is_drawn_from_ranges_and_values_and_is_the_same_each_time(tmp_path):
    settings = {"ranges": ["lr=1e-4:1e-2", "k=16:128"], "n_samples": 20}
    found = trials(tmp_path, "expansion_factor=4,8", **settings)
    assert found == trials(tmp_path, "expansion_factor=4,8", **settings)
    assert found != trials(tmp_path, "expansion_factor=4,8", seed=1, **settings)
    assert len(found) == 20
    assert all(1e-4 <= float(trial.values["lr"]) <= 1e-2 for trial in found)
    assert all(16 <= int(trial.values["k"]) <= 128 for trial in found)
    assert {trial.values["expansion_factor"] for trial in found} == {"4", "8"}
    below = sum(float(trial.values["lr"]) < 1e-3 for trial in found)  # evenly in the logarithm
    assert 5 <= below <= 15


@pytest.mark.parametrize(
    ("grids", "more", "says"),
    [
        (["learning_rate=1"], {}, "--grid learning_rate=1: sae_lens_train.py has no flag --learning_rate"),
        (["expansion=4,8"], {}, "the closest is expansion_factor"),
        (["k"], {}, "--grid k: must be NAME=VALUES"),
        (["k=32,,64"], {}, "--grid k=32,,64: must be NAME=VALUES"),
        (["help=1"], {}, "has no flag --help"),
        (["output_name=a,b"], {}, "--output_name cannot be swept"),
        (["k=32", "k=64"], {}, "--grid k=64: --k is swept twice"),
        (["k=32,many"], {}, "trial 2 (k=many): argument --k"),
        (["lr=-1"], {}, "trial 1 (lr=-1): argument --lr"),
        ([], {}, "--grid: nothing is varied"),
        ([], {"ranges": ["lr=1e-4:1e-2"]}, "--range lr=1e-4:1e-2: give --sample N"),
        ([], {"ranges": ["lr=1e-2:1e-4"], "n_samples": 2}, "must be NAME=LOW:HIGH, with 0 < LOW < HIGH"),
        ([], {"ranges": ["lr=low:high"], "n_samples": 2}, "must be NAME=LOW:HIGH"),
        (["k=32"], {"base": [*DEMO, "--layers", "1", "2"]}, "a trial trains one SAE"),
        (["k=32"], {"base": [*DEMO, *NOTHING_HELD_OUT]}, "--held_out_fraction 0: leaves no text to measure the trials"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_starts(tmp_path, grids, more, says):
    with pytest.raises(UserError) as error:
        trials(tmp_path, *grids, **more)
    assert says in str(error.value)
    assert not any(tmp_path.iterdir())


def outcome(l0, recovered, n_healthy):
    return {"metrics": {"l0": l0, "loss_recovered": recovered}, "n_healthy": n_healthy}


def test_the_best_is_the_healthiest_and_the_front_is_what_no_other_beats(tmp_path):
    measured = [
        outcome(60, 0.90, 4),
        outcome(50, 0.95, 3),
        outcome(70, 0.96, 4),
        outcome(80, 0.93, 4),
        {"failed": "the machine burnt down"},
        outcome(40, 0.70, 2),
    ]
    numbered = [(Trial(n, {}, [], tmp_path, None), found) for n, found in enumerate(measured, 1)]
    assert [trial.number for trial, _ in best_first(numbered)] == [3, 4, 1, 2, 6]
    assert trials_on_front(numbered) == [6, 2, 3]


@pytest.fixture
def sweep(script, tiny_args, tmp_path):
    """Runs sweep_saes.py in this process. Its trainings and evaluations are processes of their own."""
    return partial(script, "sweep_saes.py", f"@{tiny_args}", "--sweep_dir", tmp_path / "sweep", "--num_samples", 12)


def test_a_sweep_ends_in_a_table_a_front_and_a_command(sweep, tiny_args, tmp_path):
    directory = tmp_path / "sweep"
    done = sweep("--grid", "k=4,8,300")
    assert done.status == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "(k=300): refused: --k 300: more than the 256 features" in done.stderr
    content = json.loads((directory / "sweep.json").read_text())
    assert [("metrics" in trial, "refused" in trial) for trial in content["trials"]] == [
        *[(True, False)] * 2,
        (False, True),
    ]
    best = content["trials"][content["best"] - 1]
    assert "".join(f"best: {best['command']}".split()) in "".join(done.stdout.split())  # wherever it is folded
    assert shlex.split(best["command"])[:3] == ["python", "sae_lens_train.py", f"@{tiny_args}"]
    assert "Pareto front" in (directory / "sweep.html").read_text()
    for trial in (trial for trial in content["trials"] if "metrics" in trial):
        flags = json.loads(
            next((directory / "trials").glob(f"*/*/{trial['sae'].split('/')[-2]}/training_flags.json")).read_text()
        )
        assert str(flags["k"]) == trial["values"]["k"]
    # What is finished is not run again; what was refused is tried again.
    again = sweep("--grid", "k=4,8,300")
    assert "3 trials, 2 of them finished before" in again.stderr
    assert again.stderr.count("refused: --k 300") == 1
    assert json.loads((directory / "sweep.json").read_text()) == content


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--grid", "nothing=1"], "has no flag --nothing"),
        (["--grid", "k=4", "--address", "127.0.0.1:9"], "--address 127.0.0.1:9: no Ray cluster can be reached there"),
        (["--grid", "k=4", "--address", "nowhere"], "--address nowhere: must be auto, or host:port"),
        (["--grid", "k=4", "--cpus_per_trial", "99"], "--cpus_per_trial 99 --gpus_per_trial 0: no machine has as many"),
        (["--grid", "k=4", "--gpus_per_trial", "1"], "--gpus_per_trial 1: no machine has as many"),
        (["--grid", "k=4", "--sweep_dir", ""], "argument --sweep_dir: is empty"),
        (["--grid", "k=4", "--learning_rate", "1"], "unrecognized arguments: --learning_rate 1"),
    ],
)
def test_bad_input_is_one_line(sweep, flags, says):
    done = sweep(*flags)
    assert done.status == 2, done.stderr
    (error,) = done.error_lines
    assert says in error
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_ray_has_room_for_its_sockets_whatever_the_temporary_directory(variable):
    """Ray's own check, of the longest name that it gives a socket; a process id has at most seven digits."""
    for length in (4, 20, 30, 40, 85, 300):
        usual = "/" + "x" * (length - 1)
        directory = ray_directory({variable: usual}) or f"{usual}/ray"
        validate_socket_filepath(f"{directory}/session_2026-11-27_13-43-28_123456_4194304/sockets/plasma_store")
    assert ray_directory({variable: "/scratch/me"}) is None
    assert ray_directory({}) is None
