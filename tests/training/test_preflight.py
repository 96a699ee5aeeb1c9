"""A run says before it starts what it costs, whether it fits, and what is likely to come out unhealthy."""

import json
import math
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

from sae_toolkit.model.loading import ModelSource, find_model
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.terminal.stop_signals import hear_stop_signals
from sae_toolkit.training.configuration import build_runner_config
from sae_toolkit.training.loop import fit
from sae_toolkit.training.outcome import unhealthy_end
from sae_toolkit.training.recipe import with_recipe
from sae_toolkit.training.recipe_warnings import MeasuredActivations, activation_warnings, recipe_warnings
from sae_toolkit.training.record.run_record import RunRecord
from sae_toolkit.training.run import Training, open_activations
from sae_toolkit.training.setup import prepare_run
from support.processes import HOOK, ROOT

# What the activations at layer 12 of the embedded model are like (docs/metrics.md, Massive activations).
UNFILTERED = MeasuredActivations(median_norm=142, massive_share=0.99, kept_share=1.0)
FILTERED = MeasuredActivations(median_norm=math.sqrt(576), massive_share=0.0, kept_share=1.0)


def warnings(*words, d_in=576, measured=FILTERED, passes=1.0):
    """The flags that are warned of, with the lines."""
    settings = with_recipe(parse_training_flags([str(word) for word in words]), d_in).settings
    cfg = build_runner_config(settings, HOOK, d_in=d_in, device="cpu", run_id="run")
    lines = recipe_warnings(
        cfg, settings.text.held_out_fraction, passes, target_l0=settings.sae.target_l0
    ) + activation_warnings(
        cfg,
        measured,
        finds_weight=settings.sae.target_l0 is not None,
        max_norm_multiple=settings.text.max_activation_norm_multiple or None,
        skip_positions=settings.text.skip_positions,
    )
    assert all("\n" not in line for line in lines)
    return {line.split()[0].removeprefix("--"): line for line in lines}


def preset(name):
    return f"@{ROOT}/presets/{name}.args"


@pytest.mark.parametrize(("name", "d_in"), [("demo", 576), ("seed-shape", 576), ("llama3-8b", 4096)])
@pytest.mark.parametrize("measured", [FILTERED, None])
def test_the_presets_that_we_recommend_draw_no_warning(name, d_in, measured):
    assert warnings(preset(name), d_in=d_in, measured=measured) == {}


def test_the_seeds_recipe_draws_what_its_own_analysis_found():
    """Too few tokens for 131,072 features, no normalization under an L1 weight of 5, and with it what we found: the
    learning rate, and massive activations."""
    found = warnings(preset("seed"), d_in=4096, measured=None)
    assert found.keys() == {
        *("training_tokens", "lr", "lr_decay_steps", "dead_feature_window", "l1_coefficient"),
        "max_activation_norm_multiple",
    }
    assert "3.8 tokens a feature" in found["training_tokens"]
    assert "--expansion_factor to 24" in found["training_tokens"]
    assert "--normalize_activations expected_average_only_in" in found["l1_coefficient"]


def test_the_seeds_recipe_on_the_embedded_model_draws_what_its_evaluation_found():
    """It ends with 1,931 of 4,608 features active, and an explained variance of massive activations alone."""
    found = warnings(preset("seed-recipe-demo"), measured=UNFILTERED)
    assert found.keys() == {
        *("lr", "lr_decay_steps", "dead_feature_window", "l1_coefficient", "max_activation_norm_multiple")
    }
    assert "too weak" in found["l1_coefficient"]
    assert "99.0% of the variance" in found["max_activation_norm_multiple"]


@pytest.mark.parametrize(
    ("words", "flag", "says"),
    [
        (("--expansion_factor", 256), "training_tokens", "3.4 tokens a feature"),
        (("--k", 300), "k", "20 to 200"),
        (("--k", 8), "k", "20 to 200"),
        (("--architecture", "gated", "--target_l0", 0.001), "target_l0", "20 to 200"),
        (("--lr", 1e-4), "lr", "raise it to about 0.0005"),
        (("--lr", 7e-4), "lr", "raise it to 0.0014"),
        (("--lr", 0.1), "lr", "one step can turn a feature by 2.4 times its length"),
        (("--lr_decay_steps", 0), "lr_decay_steps", "(195)"),
        (("--dead_feature_window", 976), "dead_feature_window", "longer than the run's 976 steps"),
        (("--dead_feature_window", 200), "dead_feature_window", "use about 39"),
        (("--held_out_fraction", 0, "--eval_every", 0), "held_out_fraction", "no text will be left"),
    ],
)
def test_a_change_for_the_worse_is_warned_of_by_its_flag(words, flag, says):
    found = warnings(preset("demo"), *words)
    assert says in found[flag]
    assert len(found) == 1, found


def test_a_text_that_is_read_several_times_is_warned_of():
    assert warnings(preset("demo"), passes=1.0) == {}
    found = warnings(preset("demo"), passes=2.6)
    assert found.keys() == {"epochs"}
    assert found["epochs"].startswith("--epochs 3: 2.6 passes over the text, which the SAE may learn by heart")


def test_an_sae_that_ends_worse_than_the_mean_is_said_with_what_to_lower():
    def said(lr, explained_variance, *flags):
        settings = with_recipe(parse_training_flags([preset("demo"), "--lr", str(lr), *flags]), 576).settings
        cfg = build_runner_config(settings, HOOK, d_in=576, device="cpu", run_id="run")
        return unhealthy_end(cfg, explained_variance, loss=4e15)

    assert "its explained variance is -3e+12 on the last batch (loss 4e+15)" in said(10, -3e12)
    assert re.search(r"; --lr 10: one step can turn a feature by .*; lower it to about 0.004$", said(10, -3e12))
    assert "; train longer than --training_tokens 500000, " in said(2e-3, -0.2)
    assert said(10, 0.1) is None
    whitened = "--normalize_activations", "covariance_whitening"
    assert said(10, -0.2, *whitened) is None
    assert "its explained variance is -3e+12" in said(10, -3e12, *whitened)


def test_a_run_that_diverges_says_so_at_its_end(script, tiny_run):
    done = script("sae_lens_train.py", *tiny_run, *SANE, "--lr", 10)
    assert done.status == 0, done.stderr
    before, after = done.stderr.split("training: 100.0%")
    assert "warning --lr 10: one step can turn" in before
    assert re.search(r"warning the SAE ended unhealthy: its explained variance is -\S+ on .*; --lr 10: ", after)
    sane = script("sae_lens_train.py", *tiny_run, *SANE)
    assert "ended unhealthy" not in sane.stderr


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_a_sparsity_weight_is_held_to_the_scale_of_the_activations(architecture):
    flag = "l0_coefficient" if architecture == "jumprelu" else "l1_coefficient"
    power = 2 if architecture == "jumprelu" else 1
    for norm in (1.0, 24.0, 500.0):
        measured = MeasuredActivations(median_norm=norm, massive_share=0, kept_share=1)
        scale = norm / math.sqrt(576)

        def found(weight, measured=measured, scale=scale):
            words = ("--architecture", architecture, f"--{flag}", weight * scale**power)
            return warnings(preset("demo"), *words, measured=measured).get(flag, "")

        assert found(5) == ""
        assert "too weak" in found(0.1)
        assert "too strong" in found(500)


def test_what_the_evaluation_would_not_judge_is_said():
    measured = MeasuredActivations(median_norm=24, massive_share=0, kept_share=0.9)
    assert "leaves 10.0%" in warnings(preset("demo"), "--skip_positions", 30, measured=measured)["skip_positions"]


# Sane for the tiny model: 50 steps, 128 features.
SANE = (
    *("--architecture", "batchtopk", "--k", 20, "--lr", 0.05, "--lr_decay_steps", 10, "--dead_feature_window", 5),
    *("--normalize_activations", "expected_average_only_in", "--training_tokens", 13_000),
    *("--train_batch_size_tokens", 256),
)


def test_a_run_says_what_it_costs(script, tiny_run):
    done = script("sae_lens_train.py", *tiny_run, *SANE)
    assert done.status == 0, done.stderr
    for line in (
        r"tokens  13,000 needed, 13,\d{3} there; 102 for each feature",
        r"memory  [\d.]+ GiB at the peak, [\d.]+ free",
        r"disk    up to [\d.]+ MB \(final SAE [\d.]+ MB, checkpoints [\d.]+ MB, tokens [\d.]+ MB\), [\d,.]+ [GM]B free",
        r"time    about [\d.]+ seconds: activations [\d,]+ tokens/s, [\d.]+ ms a step",
    ):
        assert re.search(line, done.stderr), line


def test_verbose_shows_more_and_quiet_less(script, tiny_run):
    each = [script("sae_lens_train.py", *tiny_run, *flag) for flag in ((), ("--verbose",), ("--quiet",))]
    assert all(done.status == 0 for done in each)
    plain, verbose, quiet = (done.stderr for done in each)
    item = re.compile(r"language model [\d.]+, its forward pass ")  # of the memory
    assert item.search(verbose) and not item.search(plain)
    assert "model   " in plain and "model   " not in quiet


def test_measuring_changes_nothing_that_is_trained(script, tiny_run):
    done = script("sae_lens_train.py", *tiny_run, *SANE)
    run = prepare_run(parse_training_flags([str(word) for word in (*tiny_run, *SANE)]))
    run.open_directory()
    with run.run_directory, hear_stop_signals() as signals:
        unmeasured = fit(Training(run, open_activations(run)), RunRecord(), signals)
    one, other = (load_file(Path(path) / "sae_weights.safetensors") for path in (done.stdout.strip(), unmeasured))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_dry_run_measures_and_leaves_nothing(script, tiny_run, tmp_path):
    done = script("sae_lens_train.py", *tiny_run, "--dry_run", "--cache_activations", tmp_path / "cache")
    assert done.status == 0, done.stderr
    assert re.search(r"time    about \d+ seconds", done.stderr)
    assert "warning --lr 0.0001: " in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_strict_refuses_before_anything_is_loaded(script, tiny_run, tmp_path):
    done = script("sae_lens_train.py", *tiny_run, "--strict")
    assert done.status == 2
    assert re.fullmatch(r"error: --\w+ .* \(--strict; and \d more\)", done.error_lines[0])
    assert "loading" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_strict_lets_a_sane_run_through(script, tiny_run):
    assert script("sae_lens_train.py", *tiny_run, *SANE, "--strict").status == 0


@pytest.fixture
def small_disk(disk_of):
    return disk_of("256k")


def test_a_disk_without_room_for_the_sae_is_refused_before_anything_is_loaded(script, tiny_run, small_disk):
    done = script("sae_lens_train.py", *tiny_run, "--expansion_factor", 64, "--checkpoint_path", small_disk / "runs")
    assert done.status == 2
    assert re.search(r"--checkpoint_path \S+: the final SAE and the run's tokens take [\d.]+ ", done.error_lines[0])
    assert "loading" not in done.stderr
    assert list(small_disk.iterdir()) == []


def test_checkpoints_without_room_are_warned_of(script, tiny_run, small_disk):
    flags = ("--n_checkpoints", 4, "--checkpoint_path", small_disk, "--dry_run")
    assert (
        "--n_checkpoints 4 --keep 2: the checkpoints take up to "
        in script("sae_lens_train.py", *tiny_run, *flags).stderr
    )


def test_a_model_is_here_once_all_of_its_weights_are(tiny_model, tmp_path, monkeypatch):
    local = find_model(str(tiny_model))
    assert local.is_here()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--owner--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--owner--model" / "refs").mkdir()
    (tmp_path / "models--owner--model" / "refs" / "main").write_text("abc")
    source = ModelSource("owner/model", local.config, {"pretrained_model_name_or_path": "owner/model"})
    assert not source.is_here()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "model-1.safetensors").touch()
    assert not source.is_here()
    (snapshot / "model-2.safetensors").touch()
    assert source.is_here()
