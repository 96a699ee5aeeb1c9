"""Libraries are compared on the same activations by one evaluation. One that cannot run gets a row that says so."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sae_toolkit.errors import UserError
from sae_toolkit.many_runs.comparison import library_trainings, sparsify_worker
from sae_toolkit.many_runs.comparison.contenders import Contender, parse_contenders
from sae_toolkit.many_runs.comparison.learning_rates import own_rate
from sae_toolkit.many_runs.page import pareto_front


def test_the_front_has_those_that_no_other_beats():
    points = [(60, 0.97), (30, 0.90), (61, 0.95), (20, 0.91), (100, 0.97), (120, 0.99)]
    assert pareto_front(points) == [3, 0, 5]


def test_contenders_are_libraries_or_one_kind_with_a_learning_rate():
    assert parse_contenders(["sparsify", "saelens:batchtopk@3e-4", "sparsify:topk"]) == [
        Contender("sparsify", "topk"),
        Contender("saelens", "batchtopk", 3e-4),
    ]
    assert [each.architecture for each in parse_contenders(["saelens"])] == [
        *("standard", "topk", "batchtopk", "jumprelu", "gated", "matryoshka"),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("saelen", "--libraries saelen: no such library; the closest is saelens"),
        ("e2e", "--libraries e2e: no such library; there are saelens, sparsify, dictionary_learning"),
        ("sparsify:gated", "--libraries sparsify:gated: sparsify trains topk here"),
        ("saelens:batchtop", "the closest is batchtopk"),
        ("saelens@fast", "--libraries saelens@fast: after @ comes a learning rate"),
    ],
)
def test_a_contender_that_does_not_exist_is_one_line(text, says):
    with pytest.raises(UserError, match=re.escape(says)):
        parse_contenders([text])


@pytest.fixture(scope="module")
def tiny_args(tiny_model, text_file, tmp_path_factory):
    """A flag file for a run that takes a second or two."""
    flags = {
        **{"model_name": tiny_model, "layer": 1, "dataset_path": text_file, "context_size": 64, "lr": 1e-3},
        **{"normalize_activations": "expected_average_only_in", "expansion_factor": 8, "training_tokens": 20480},
        **{"n_batches_in_buffer": 32, "wandb_mode": "disabled", "device": "cpu", "lm_dtype": "float32"},
    }
    path = tmp_path_factory.mktemp("flags") / "tiny.args"
    path.write_text("\n".join(f"--{name} {value}" for name, value in flags.items()))
    return path


def of_comparison(tiny_args, directory, *flags):
    """Returns the words after the script's name."""
    return f"@{tiny_args}", "--comparison_dir", directory, "--num_samples", 12, "--l0", 8, *flags


@pytest.fixture(scope="module")
def compare(trainings, tiny_args):
    """Runs compare_sae_libraries.py, whose trainings and evaluations are processes of their own."""
    return lambda directory, *flags: trainings.script(
        "compare_sae_libraries.py", *of_comparison(tiny_args, directory, *flags)
    )


COMPARED = ("--libraries", "saelens:jumprelu", "sparsify", "--learning_rates", 2, "--seeds", 2, "--parallel", 2)


@pytest.fixture(scope="module")
def compared(compare, tmp_path_factory):
    """A comparison of two seeds, for which one of two learning rates of sparsify was chosen."""
    directory = tmp_path_factory.mktemp("compared") / "comparison"
    done = compare(directory, *COMPARED)
    assert done.status == 0, done.stderr
    return directory, done


def test_a_comparison_ends_in_a_table_with_the_checkpoint_of_each_row(compared):
    directory, done = compared
    outcomes = json.loads((directory / "comparison.json").read_text())
    assert [(o["contender"]["library"], o["seed"]) for o in outcomes] == [
        *((library, seed) for seed in (42, 43) for library in ("saelens", "sparsify")),
    ]
    for outcome in outcomes:
        assert outcome["failed"] is None
        assert outcome["trained"]["seconds"] > 0
        assert outcome["trained"]["peak_bytes"] > 2**26
        sae = Path(outcome["trained"]["sae"])
        assert json.loads((sae / "evaluation.json").read_text())["metrics"] == outcome["metrics"]
        relative = str(sae.relative_to(directory))
        assert relative in (directory / "comparison.md").read_text()
        assert relative in (directory / "comparison.html").read_text()
    assert "sparsify topk" in done.stdout
    rates = {o["trained"]["lr"] for o in outcomes if o["contender"]["library"] == "saelens"}
    assert rates == {1e-3}  # of the flag file
    exact = [o["metrics"]["l0"] for o in outcomes if o["contender"]["library"] == "sparsify"]
    assert exact == [8, 8]
    for file in ("comparison.md", "comparison.html"):
        assert "Trainings ran 2 at a time" in (directory / file).read_text()


def test_a_learning_rate_is_chosen_on_text_that_the_table_leaves_out(compared):
    directory, done = compared
    first, second = (
        outcome
        for outcome in json.loads((directory / "comparison.json").read_text())
        if outcome["contender"]["library"] == "sparsify"
    )
    own, higher = tried = first["learning_rates"]
    assert own["lr"] == pytest.approx(own_rate("sparsify", 256))  # as sparsify's Trainer says it is
    assert higher["lr"] == pytest.approx(own["lr"] * 10**0.5, rel=0.05)  # rounded
    (chosen,) = (rate for rate in tried if rate["chosen"])
    assert chosen == max(tried, key=lambda rate: rate["validation_metrics"]["loss_recovered"])
    assert first["trained"]["lr"] == second["trained"]["lr"] == chosen["lr"]
    # The training that was chosen is that of the first seed.
    assert len(list((directory / "saes").glob("sparsify-*"))) == 3
    (of_choice,) = {rate["validation_metrics"]["ce_clean"] for rate in tried}
    assert of_choice != first["metrics"]["ce_clean"]
    border = "highest" if chosen is higher else "lowest"
    for text in ((directory / "comparison.md").read_text(), (directory / "comparison.html").read_text(), done.stdout):
        assert f"{chosen['lr']:.3g}, the {border} tried" in text
        assert "First at each L0" in text


def test_all_are_measured_on_the_same_rows_which_none_was_trained_on(compared):
    directory, _ = compared
    outcomes = json.loads((directory / "comparison.json").read_text())
    results = [json.loads((Path(o["trained"]["sae"]) / "evaluation.json").read_text()) for o in outcomes]
    for name in ("dataset", "held_out", "context_length", "positions", "tokens"):
        assert all(result[name] == results[0][name] for result in results), name
    assert results[0]["held_out"]["fraction"] > 0
    assert results[0]["held_out"]["part"] == "test"
    assert len({result["metrics"]["ce_clean"] for result in results}) == 1
    sae = SAE.load_from_disk(Path(outcomes[0]["trained"]["sae"]))
    assert sae.cfg.metadata.held_out_seed == results[0]["held_out"]["seed"]


@pytest.mark.parity
@pytest.mark.parametrize("hookpoint", ["layers.1", "layers.1.mlp"])
def test_sparsify_trains_on_batches_what_it_trains_on_the_model_that_they_come_from(
    sparsify, tiny_model, tmp_path, hookpoint
):
    tokens = torch.randint(3, 1000, (32, 32), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    batches = []
    keep = model.base_model.get_submodule(hookpoint).register_forward_hook(
        lambda _, inputs, output: batches.append((output[0] if isinstance(output, tuple) else output).flatten(0, 1))
    )
    with torch.no_grad():
        for batch in tokens.split(4):
            model(batch)
    keep.remove()
    sae, training = {"num_latents": 256, "k": 8}, {"lr": 1e-3, "init_seeds": [7]}
    config = sparsify.TrainConfig(
        sparsify.SaeConfig(**sae),
        **{"batch_size": 4, "hookpoints": [hookpoint], "save_dir": str(tmp_path), "run_name": "live"},
        **{"log_to_wandb": False, **training},
    )
    sparsify.Trainer(config, Dataset.from_dict({"input_ids": tokens}).with_format("torch"), model.base_model).fit()
    job = {
        **{"batch": 4 * 32, "d_in": batches[0].shape[1], "steps": len(batches), "hookpoint": hookpoint},
        **{"device": "cpu", "sae": sae, "training": training, "directory": str(tmp_path / "fed")},
    }
    (tmp_path / "fed").mkdir()
    (tmp_path / "job.json").write_text(json.dumps(job))
    acts = torch.cat(batches).numpy().tobytes()
    command = [sys.executable, sparsify_worker.__file__, str(tmp_path / "job.json")]
    subprocess.run(command, input=acts, check=True, capture_output=True)
    live, fed = (load_file(tmp_path / name / hookpoint / "sae.safetensors") for name in ("live", "fed/sae"))
    assert live.keys() == fed.keys()
    for name, weights in live.items():
        torch.testing.assert_close(fed[name], weights, rtol=0, atol=1e-6)
    too_few = subprocess.run(command, input=acts[:-4], capture_output=True)
    assert too_few.returncode == 1
    assert b"error: the activations ended too early" in too_few.stderr


def test_the_same_command_goes_on_with_what_is_missing(compared, compare):
    directory, _ = compared
    before = json.loads((directory / "comparison.json").read_text())
    done = compare(directory, *COMPARED)
    assert done.status == 0, done.stderr
    assert done.stderr.count("from before") == 2 + 4  # those to choose from, and those of the table
    assert "evaluating" not in done.stderr
    assert json.loads((directory / "comparison.json").read_text()) == before


def test_a_library_that_is_not_there_is_a_row_that_says_so(compared, tiny_args, script, monkeypatch, tmp_path):
    """The other libraries have their rows even if one is not installed."""
    directory = tmp_path / "comparison"
    shutil.copytree(compared[0], directory)
    words = of_comparison(tiny_args, directory, "--libraries", "saelens:jumprelu", "sparsify@1e-4,2e-4", "sparsify@5")
    assert library_trainings.find_spec("sparsify") is not None
    monkeypatch.setattr(library_trainings, "find_spec", lambda _: None)
    done = script("compare_sae_libraries.py", *words)
    assert done.status == 0, done.stderr
    said = "not installed: python -m pip install -c constraints.txt -r requirements/comparison.txt"
    for name in ("sparsify topk, lr 0.0001", "sparsify topk, lr 0.0002", "sparsify topk, lr 5"):
        assert f"{name}: {said}" in (directory / "comparison.md").read_text()
    trained, *missing = json.loads((directory / "comparison.json").read_text())
    assert trained["metrics"]["l0"] > 0
    assert [each["metrics"] for each in missing] == [None, None]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--libraries", "saelenz"], "--libraries saelenz: no such library; the closest is saelens"),
        (["--l0", "500"], "--l0 500: more than the 256 features"),
        (["--layers", "1", "2"], "--layers, --hook_names: a comparison is of one hook"),
        (["--layer", "2"], "--layer 2: the comparison in"),
        (["--learning_rate", "1"], "unrecognized arguments: --learning_rate 1"),
        (["--l0", "0"], "--l0"),
        (["--learning_rates", "3", "--libraries", "saelens"], "--learning_rates 3: no SAE here takes them"),
        (["--parallel", "4096"], "--parallel 4096: there are "),
    ],
)
def test_bad_input_is_one_line(compared, tiny_args, script, flags, says):
    directory, _ = compared
    done = script("compare_sae_libraries.py", *of_comparison(tiny_args, directory, *flags))
    assert done.status == 2, done.stderr
    (error,) = done.error_lines
    assert says in error
    assert "Traceback" not in done.stderr


def test_a_comparison_whose_sparsify_trained_on_other_positions_does_not_go_on(compared, tiny_args, script, tmp_path):
    directory = tmp_path / "comparison"
    shutil.copytree(compared[0], directory)
    settings = json.loads((directory / "settings.json").read_text())
    del settings["sparsify_trains_on"]  # as it was before this project gave it its batches
    (directory / "settings.json").write_text(json.dumps(settings))
    done = script("compare_sae_libraries.py", *of_comparison(tiny_args, directory, *COMPARED))
    assert done.status == 2
    (error,) = done.error_lines
    assert error.startswith(f"error: --comparison_dir {directory}: of an older version")


def test_a_cache_of_another_model_is_refused_in_one_line(compared, tiny_args, script, tmp_path):
    directory, _ = compared
    other = ("--cache_activations", directory / "activations", "--layer", 2, "--libraries", "saelens:topk")
    done = script("compare_sae_libraries.py", *of_comparison(tiny_args, tmp_path / "other", *other))
    assert done.status == 2
    (error,) = done.error_lines
    assert f"--cache_activations {directory / 'activations'}: holds activations with hook_name" in error
    # The corrected command must not be taken for another comparison.
    assert not (tmp_path / "other" / "settings.json").exists()


def test_held_out_text_that_is_too_small_for_two_halves_is_refused(tiny_args, script, tmp_path):
    flags = ("--held_out_fraction", 0.005, "--libraries", "sparsify@1e-3,2e-3")
    done = script("compare_sae_libraries.py", *of_comparison(tiny_args, tmp_path / "other", *flags))
    assert done.status == 2
    (error,) = done.error_lines
    assert error.startswith("error: --held_out_fraction 0.005: too small to choose learning rates on one half")
    assert not (tmp_path / "other" / "saes").exists()


def test_weights_to_begin_with_are_refused_since_other_libraries_begin_at_random(tiny_args, script, tmp_path):
    done = script("compare_sae_libraries.py", *of_comparison(tiny_args, tmp_path / "other", "--init_from", "an_sae"))
    assert done.status == 2
    (error,) = done.error_lines
    assert error.startswith("error: --init_from an_sae: ")


@pytest.mark.parity
def test_dictionary_learning_trains_here_by_its_own_code(compare, tmp_path):
    directory = tmp_path / "comparison"
    libraries = ("dictionary_learning", "dictionary_learning:p_anneal@1e-3")
    done = compare(directory, "--l0", 4, 8, "--libraries", *libraries)
    assert done.status == 0, done.stderr
    outcomes = json.loads((directory / "comparison.json").read_text())
    assert len(outcomes) == 14
    for outcome in outcomes:
        assert outcome["failed"] is None
        assert (Path(outcome["trained"]["sae"]) / "ae.pt").is_file()
    exact = [o["metrics"]["l0"] for o in outcomes if o["contender"]["architecture"] == "topk"]
    assert exact == [4, 8]
    # A search that was stopped after its trainings trains only what is gone.
    (searched,) = (directory / "saes").glob("dictionary_learning-standard-l0_8-*")
    trained = {file: file.stat().st_mtime_ns for file in searched.glob("trial*/trainer_0/ae.pt")}
    found = json.loads((searched / "result.json").read_text())
    (searched / "result.json").unlink()
    gone = searched / "trial1/trainer_0"
    shutil.rmtree(gone)
    done = compare(directory, "--l0", 4, 8, "--libraries", *libraries)
    assert done.status == 0, done.stderr
    again = json.loads((searched / "result.json").read_text())
    assert (again["sae"], again["tried"]) == (found["sae"], found["tried"])
    changed = [file for file, when in trained.items() if file.stat().st_mtime_ns != when]
    assert changed == [gone / "ae.pt"]
