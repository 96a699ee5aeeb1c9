"""Where an SAE is measured: by its record, by flags or as another SAE. A tiny model of random weights."""

import json
import re
import shutil

import pytest
from sae_lens import SAE

from sae_toolkit.evaluation.seen_text import same_data
from sae_toolkit.saes.checkpoints import load_sae
from support.evaluated import CONTEXT, result_of, save_sae
from support.processes import ROOT


def test_it_is_said_what_comes_from_the_record_and_what_is_a_default(evaluate, tmp_path):
    told = save_sae(tmp_path / "told", seqpos_slice=(1, None), max_activation_norm=50.0)
    silent = save_sae(tmp_path / "silent")
    evaluate("--sae_path", told, silent)
    assert [result_of(path)["sources"] for path in (told, silent)] == [
        {"hook_name": "record", "exclude_special_tokens": "default", "skip_positions": at, "max_activation_norm": at}
        for at in ("record", "default")
    ]
    done = evaluate("--sae_path", silent, "--like", told)
    assert "blocks.2.hook_resid_post (--like)" in done.stdout
    assert "with special tokens (default), from position 1 on (--like), norms up to 50 (--like)" in done.stdout


def test_the_hook_is_that_of_the_flag_for_every_sae(evaluate, tmp_path, tiny_model):
    """A module of Transformers and TransformerLens's name for its output are the same place."""
    paths = [save_sae(tmp_path / f"sae{i}", hook=f"blocks.{i}.hook_resid_post") for i in (0, 2)]
    evaluate("--sae_path", *paths, "--hook_name", "model.layers.1.mlp")
    at_module = [result_of(path) for path in paths]
    assert {(r["hook_name"], r["sources"]["hook_name"]) for r in at_module} == {("model.layers.1.mlp", "flag")}
    evaluate("--sae_path", *paths, "--hook_name", "blocks.1.hook_mlp_out")
    for path, expected in zip(paths, at_module, strict=True):
        assert result_of(path)["metrics"] == expected["metrics"]


def test_an_sae_that_says_nothing_is_measured_as_another_one(evaluate, tmp_path):
    told, silent = save_sae(tmp_path / "told"), save_sae(tmp_path / "silent")
    cfg = json.loads((silent / "cfg.json").read_text())
    (silent / "cfg.json").write_text(json.dumps(cfg | {"metadata": {}}))
    evaluate("--sae_path", told)
    evaluate("--sae_path", silent, "--like", told)
    ours, theirs = result_of(silent), result_of(told)
    for name in ("model", "hook_name", "dataset", "held_out", "context_length", "positions", "metrics"):
        assert ours[name] == theirs[name], name


def test_an_sae_that_is_measured_as_another_one_keeps_its_own_record(evaluate, script, tiny_model, rows, tmp_path):
    """Documents that the other holds out may be among those that this one was trained on, which is said."""
    of_training = {"dataset_path": str(rows[0]), "dataset_split": "train", "held_out_fraction": 0.9}
    like, same, *others = (
        save_sae(tmp_path / name, seed=i, **of_training | of_sae)
        for i, (name, of_sae) in enumerate(
            {
                "like": {"held_out_seed": 0},
                "same": {"held_out_seed": 0},
                "seed": {"held_out_seed": 1, "hook_name": "blocks.1.hook_resid_post"},
                "less": {"held_out_seed": 0, "held_out_fraction": 0.5},
            }.items()
        )
    )
    done = evaluate("--sae_path", like, same, *others, "--like", like)
    assert [result_of(path)["text_may_be_trained_on"] for path in (like, same, *others)] == [False, False, True, True]
    said = re.findall(r"(\S+): may have been trained on these documents of \S+saved,", done.stderr)
    assert said == [path.name for path in others]
    assert (
        f"{others[0].name}: was trained at blocks.1.hook_resid_post; with --like it is evaluated at blocks.2"
        in done.stderr
    )
    for path, words in ((same, "documents held out of training"), (others[0], "SAE may have been trained on them")):
        assert words in (path / "report.md").read_text()
    done = evaluate("--sae_path", others[0], "--like", save_sae(tmp_path / "silent"))
    assert "on which this SAE may have been trained" in " ".join(done.stdout.split())

    dense = save_sae(tmp_path / "dense", k=8)
    flags = ("--l0_check", "--like", like, "--model_name", tiny_model, "--dataset", rows[0], "--device", "cpu")
    done = script("evaluate_sae_real_activations.py", "--sae_path", like, dense, *flags)
    assert done.status == 2
    assert "differ in architecture: standard and topk" in done.error_lines[0]


def test_an_sae_whose_files_do_not_say_what_it_was_trained_on_has_no_documents_held_out_of_training(
    evaluate, tmp_path, rows
):
    of_training = {"dataset_path": str(rows[0])}
    split = {"dataset_split": "train", "held_out_fraction": 0.9, "held_out_seed": 0}
    like = save_sae(tmp_path / "like", **of_training, **split)
    silent, own = save_sae(tmp_path / "silent"), save_sae(tmp_path / "own", **of_training)
    done = evaluate("--sae_path", silent, own, "--like", like)
    assert [result_of(path)["text_may_be_trained_on"] for path in (silent, own)] == [None, True]
    assert "silent: its files do not say whether it was trained on these documents" in done.stderr
    assert "whether this SAE was trained on them in another is not known" in (silent / "report.md").read_text()
    assert "held out of training" not in (silent / "report.md").read_text() + (own / "report.md").read_text()
    done = evaluate("--sae_path", silent, own)  # all of the text
    assert [result_of(path)["text_may_be_trained_on"] for path in (silent, own)] == [None, True]
    for path, words in ((silent, "whether this SAE was trained on it is not known"), (own, "may have been trained")):
        assert words in (path / "report.md").read_text()


def test_another_column_of_the_data_set_of_the_training_is_not_held_out(evaluate, tmp_path):
    """Documents are held out by their content, which is another one in another column."""
    path = tmp_path / "two_columns.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"Line {i} " * 30, "b": f"# Line {i} " * 30}) + "\n" for i in range(60))
    )
    split = {"dataset_split": "train", "text_column": "text", "held_out_fraction": 0.5, "held_out_seed": 0}
    sae = save_sae(tmp_path / "sae", dataset_path=str(path), **split)
    evaluate("--sae_path", sae, dataset=path)
    assert (result_of(sae)["held_out"], result_of(sae)["text_may_be_trained_on"]) == (
        {"fraction": 0.5, "seed": 0, "part": None},
        False,
    )
    done = evaluate("--sae_path", sae, "--text_column", "b", dataset=path)
    assert (result_of(sae)["held_out"], result_of(sae)["text_may_be_trained_on"]) == (None, True)
    assert "was trained on the column text" in done.stderr


def test_half_of_the_held_out_documents_is_measured_on(evaluate, script, tiny_model, tmp_path, rows):
    trained_on = {"dataset_path": str(rows[0]), "dataset_split": "train", "held_out_fraction": 0.9, "held_out_seed": 0}
    path = save_sae(tmp_path / "sae", **trained_on)
    found = {}
    for part in ("validation", "test"):
        done = evaluate("--sae_path", path, "--held_out_part", part, "--no_diagnosis")
        assert f"{part} half of the documents held out of training" in " ".join(done.stdout.split())
        found[part] = result_of(path)
        assert found[part]["held_out"]["part"] == part
    assert found["validation"]["metrics"]["ce_clean"] != found["test"]["metrics"]["ce_clean"]  # other text
    words = ("--sae_path", save_sae(tmp_path / "silent"), "--model_name", tiny_model, "--dataset", rows[0])
    done = script("evaluate_sae_real_activations.py", *words, "--held_out_part", "test", "--device", "cpu")
    assert done.status == 2
    assert f"--held_out_part test: it is not known which documents of {rows[0]} were held out" in done.error_lines[0]


def test_saes_of_different_hooks_in_one_call_are_evaluated_apart_and_that_is_said(evaluate, tmp_path):
    paths = [save_sae(tmp_path / f"sae{i}", hook=f"blocks.{i}.hook_resid_post") for i in (1, 2)]
    done = evaluate("--sae_path", *paths)
    assert "SAEs of different hooks, evaluated in 2 passes" in done.stderr
    assert [result_of(path)["hook_name"] for path in paths] == ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
    assert done.stderr.count("loading ") == 1


def test_saes_of_different_models_in_one_call_are_evaluated_each_on_its_own(script, tmp_path, tiny_model, rows):
    models = [tiny_model, shutil.copytree(tiny_model, tmp_path / "other_model")]
    paths = [save_sae(tmp_path / f"sae{i}", model_name=str(model)) for i, model in enumerate(models)]
    done = script("evaluate_sae_real_activations.py", "--sae_path", *paths, "--dataset", rows[0], "--n_features", 0)
    assert done.status == 0, done.stderr
    assert "SAEs of different models, evaluated in 2 passes" in done.stderr
    assert [result_of(path)["model"] for path in paths] == [str(model) for model in models]


def test_an_sae_of_another_hook_than_its_own_is_measured_where_asked(evaluate, tmp_path):
    path = save_sae(tmp_path / "sae")
    done = evaluate("--sae_path", path, "--layer", 1)
    assert "evaluating it at blocks.1.hook_resid_post" in done.stderr
    assert isinstance(load_sae(path, "cpu"), SAE)


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"model_from_pretrained_kwargs": {"center_writing_weights": True}}, "trained on a model with center_writing"),
        ({"seqpos_slice": (5, 20)}, r"trained at the positions seqpos_slice [(\[]5, 20[)\]] alone"),
        ({"seqpos_slice": (CONTEXT - 1, None)}, f"--context_length {CONTEXT}: leaves no next token"),
        ({"seqpos_slice": (-5, None)}, r"trained at the positions seqpos_slice [(\[]-5, None[)\]] alone"),
        ({"context_size": "64"}, "metadata.context_size in cfg.json is '64', and must be int"),
        ({"context_size": True}, "metadata.context_size in cfg.json is True, and must be int"),
        ({"hook_name": 7}, "metadata.hook_name in cfg.json is 7, and must be str"),
        ({"hook_name": "blocks.9.hook_resid_post"}, "--sae_path sae: --layer 9: the model has 4 layers"),
        (
            {"max_activation_norm": "much"},
            "metadata.max_activation_norm in cfg.json is 'much', and must be int or float",
        ),
        ({"max_activation_norm": 0}, "metadata.max_activation_norm in cfg.json is 0, and must be above 0"),
        ({"exclude_special_tokens": "yes"}, "metadata.exclude_special_tokens in cfg.json is 'yes', and must be bool"),
        ({"exclude_special_tokens": [-3]}, r"is \[-3\], and must be token ids"),
    ],
)
def test_an_sae_that_cannot_be_measured_here_is_refused(script, tiny_model, tmp_path, rows, metadata, says):
    path = save_sae(tmp_path / "sae", **metadata)
    flags = ("--sae_path", path, "--model_name", tiny_model, "--dataset", rows[0])
    done = script("evaluate_sae_real_activations.py", *flags)
    assert done.status == 2
    assert re.search(says, done.error_lines[0]), done.stderr


@pytest.mark.parametrize("flags", [(), ("--context_length", "64"), ("--skip_positions", "0")])
def test_an_error_about_the_data_set_of_an_sae_names_the_sae(script, tiny_model, tmp_path, flags):
    path = save_sae(tmp_path / "sae", dataset_path=str(tmp_path / "gone.jsonl"))
    done = script("evaluate_sae_real_activations.py", "--sae_path", path, "--model_name", tiny_model, *flags)
    assert done.status == 2
    assert done.error_lines[0].startswith("error: --sae_path sae: --dataset "), done.stderr


@pytest.mark.parametrize(
    ("name", "other", "same"),
    [
        ("wikitext", "Salesforce/wikitext", True),
        ("Salesforce/wikitext", "Salesforce/wikitext", True),
        ("someone/wikitext", "Salesforce/wikitext", False),
        ("README.md", str(ROOT / "README.md"), True),
        ("embedded:wikipedia", None, False),
    ],
)
def test_a_data_set_is_known_by_any_of_its_names(monkeypatch, name, other, same):
    monkeypatch.chdir(ROOT)
    assert same_data(name, other) is same
