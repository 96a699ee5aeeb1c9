"""The settings say what the flags are: their page, the record of a run, and the hash of its directory."""

import dataclasses
import json

import pytest

from sae_toolkit import ROOT
from sae_toolkit.errors import UserError
from sae_toolkit.settings.command_line import default_flags, parse_training_flags, save_flags, training_words
from sae_toolkit.settings.document import flags_page
from sae_toolkit.settings.fields import Scope
from sae_toolkit.settings.training import TRAINING_FLAGS, TrainingSettings
from sae_toolkit.training.configuration import build_runner_config

OTHER = {
    "model_name": "embedded:smollm2-135m",
    "layers": [1, 2],
    "exclude_special_tokens": [3, 5],
    "target_l0": 20.0,
    "architecture": "gated",
    "matryoshka_widths": [4, 8],
    "set": ["adam_beta1=0", "sae.aux_loss_coefficient=0.5"],
    "streaming": False,
    "dry_run": True,
    "device_memory": "79.1GiB",
    "checkpoint_every": "90s",
}


def test_the_page_of_flags_is_that_of_the_settings():
    assert (ROOT / "docs" / "flags.md").read_text() == flags_page(), "python -m sae_toolkit.settings.document"


def test_a_record_of_the_flags_gives_the_settings_back():
    settings = TrainingSettings.from_flags(default_flags() | OTHER)
    assert TrainingSettings.from_flags(json.loads(json.dumps(settings.as_flags()))) == settings
    assert settings.model.layers == (1, 2)


def test_the_words_of_a_command_line_give_the_settings_back():
    settings = TrainingSettings.from_flags(default_flags() | OTHER)
    assert parse_training_flags(training_words(settings.as_flags())) == settings
    assert training_words(default_flags()) == []


DEMO = (
    "--model_name embedded:smollm2-135m --layer 12 --dataset_path embedded:wikipedia --held_out_fraction 0.2"
    " --context_size 256 --output_name demo --architecture batchtopk --k 64 --expansion_factor 4"
    " --normalize_activations expected_average_only_in --training_tokens 500000 --train_batch_size_tokens 1024"
    " --lr 2e-3 --lr_warm_up_steps 20 --lr_decay_steps 98 --dead_feature_window 20 --eval_every 100000"
).split()
LLAMA = (
    "--model_name meta-llama/Meta-Llama-3-8B --layer 12 --dataset_path HuggingFaceFW/fineweb-edu"
    " --dataset_config sample-10BT --held_out_fraction 0.02 --context_size 2048 --output_name llama3_8b_layer12"
    " --architecture batchtopk --k 64 --expansion_factor 8 --normalize_activations expected_average_only_in"
    " --training_tokens 50000000 --train_batch_size_tokens 4096 --lr 4e-4 --lr_warm_up_steps 500 --lr_decay_steps 2440"
    " --dead_feature_window 250 --n_checkpoints 4 --eval_every 10000000"
).split()


def test_a_run_finds_the_directories_of_runs_from_before_the_settings_had_types():
    """The hashes were taken at bff7b8f, by `configuration_hash`, with the presets of then."""
    demo = parse_training_flags(DEMO)
    assert demo.output_directory.name == "demo_21ccab4a"
    cached = parse_training_flags([*DEMO, "--cache_activations", "anywhere"])
    assert cached.output_directory.name == "demo_ada4c870"
    other = parse_training_flags([*LLAMA, "--layers", "4", "8", "--set", "adam_beta1=0"])
    assert other.output_directory.name == "llama3_8b_layer12_df5a9680"


@pytest.mark.parametrize("name", [name for name, flag in TRAINING_FLAGS.items() if flag.scope is Scope.SAE])
def test_what_the_weights_depend_on_is_in_the_hash(name):
    """Whatever is another value, here one of another type, makes another directory."""
    before, after = default_flags(), default_flags() | {name: ["changed"]}
    assert TrainingSettings.from_flags(before).output_directory != TrainingSettings.from_flags(after).output_directory


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingSettings().optimization.lr = 1.0


def test_verbose_and_quiet_exclude_one_another():
    with pytest.raises(UserError, match="--quiet: not allowed with argument --verbose"):
        parse_training_flags(["--verbose", "--quiet"])


PRESET = f"@{ROOT / 'presets/demo.args'}"
SEVERAL = ["--hook_names", "blocks.1.hook_mlp_out", "blocks.2.hook_mlp_out"]


@pytest.mark.parametrize(
    ("words", "hooks"),
    [
        ([PRESET, "--hook_name", "blocks.1.hook_mlp_out"], ["blocks.1.hook_mlp_out"]),  # its layer gives way
        ([PRESET, *SEVERAL], SEVERAL[1:]),
        (["--layer", "1", "--hook_name", "blocks.1.hook_mlp_out"], ["blocks.1.hook_mlp_out"]),
        (["--layer", "3", "--hook_name", "blocks.1.hook_mlp_out"], "--layer 3: --hook_name blocks.1.hook_mlp_out choo"),
        (["--layer=3", *SEVERAL], "--layer 3: --hook_names blocks.1.hook_mlp_out blocks.2.hook_mlp_out chooses"),
        (["--layers", "2", "3", "--layer", "1"], ["blocks.1.hook_resid_post"]),
        (["--hook_name", "blocks.1.hook_mlp_out", "--layer", "3"], "argument --layer 3: --hook_name blocks.1.hook_mlp"),
        ([*SEVERAL, "--layer", "3"], "argument --layer 3: --hook_names blocks.1.hook_mlp_out,blocks.2.hook_mlp_out"),
        (["--hook_name", "blocks.1.hook_mlp_out", "--layers", "2"], "--hook_name and --layers: only one of them can"),
    ],
)
def test_a_layer_is_taken_or_refused_and_never_without_effect(words, hooks):
    if isinstance(hooks, list):
        assert parse_training_flags(words).model.all_hook_names == hooks
    else:
        with pytest.raises(UserError, match=hooks):
            parse_training_flags(words)


@pytest.mark.parametrize(
    ("saved", "words", "hooks"),
    [
        (["--layers", "2", "3"], ["--layer", "1"], ["blocks.1.hook_resid_post"]),
        (["--layers", "2", "3"], ["--hook_name", "blocks.1.hook_mlp_out"], ["blocks.1.hook_mlp_out"]),
        (["--hook_name", "blocks.1.hook_mlp_out"], SEVERAL, SEVERAL[1:]),
        (SEVERAL, ["--layers", "2"], ["blocks.2.hook_resid_post"]),
        (SEVERAL, [], SEVERAL[1:]),
        (["--hook_name", "blocks.1.hook_mlp_out"], ["--layer", "3"], "--layer 3: is for the residual stream, and the"),
    ],
)
def test_a_place_takes_that_of_the_run_that_like_names(tmp_path, saved, words, hooks):
    save_flags(parse_training_flags(saved).as_flags(), tmp_path)
    if isinstance(hooks, list):
        assert parse_training_flags(["--like", str(tmp_path), *words]).model.all_hook_names == hooks
    else:
        with pytest.raises(UserError, match=hooks):
            parse_training_flags(["--like", str(tmp_path), *words])


def test_another_architecture_does_not_take_a_target_that_it_cannot_have(tmp_path):
    save_flags(parse_training_flags(["--architecture", "gated", "--target_l0", "40"]).as_flags(), tmp_path)
    words = ["--like", str(tmp_path), "--architecture"]
    assert parse_training_flags([*words, "batchtopk"]).sae.target_l0 is None
    assert parse_training_flags([*words, "jumprelu"]).sae.target_l0 == 40
    with pytest.raises(UserError, match="--target_l0 20: batchtopk has no sparsity weight"):
        parse_training_flags([*words, "batchtopk", "--target_l0", "20"])


def test_a_fine_tuning_like_another_run_leaves_out_what_is_about_random_weights(tmp_path):
    saved = [
        "--set",
        "sae.decoder_init_norm=0.5",
        "--set",
        "adam_beta1=0.5",
        "--b_dec_init_method",
        "mean",
        "--seeds",
        "3",
    ]
    save_flags(parse_training_flags(saved).as_flags(), tmp_path)
    settings = parse_training_flags(["--like", str(tmp_path), "--init_from", "./sae"])
    assert settings.optimization.set == ("adam_beta1=0.5",)
    assert (settings.sae.b_dec_init_method, settings.optimization.seeds) == ("zeros", 1)


@pytest.mark.parametrize(
    ("saved", "changed"),
    [
        (["--architecture", "standard", "--set", "sae.l1_warm_up_steps=10"], ["--architecture", "batchtopk"]),
        (
            ["--architecture", "jumprelu", "--set", "sae.jumprelu_sparsity_loss_mode=quadratic", "sae.target_l0=9"],
            ["--architecture", "topk"],
        ),
        (
            ["--architecture", "matryoshka_batchtopk", "--matryoshka_widths", "8", "128", "--expansion_factor", "4"],
            ["--architecture", "batchtopk"],
        ),
        (
            ["--architecture", "matryoshka_batchtopk", "--matryoshka_widths", "8", "128", "--expansion_factor", "4"],
            ["--expansion_factor", "2"],
        ),
    ],
)
def test_like_leaves_out_what_another_architecture_or_width_does_not_take(tmp_path, saved, changed):
    """What came from the earlier run cannot be left out by hand."""
    words = [word for part in saved for word in (["--set", part] if "=" in part else [part]) if part != "--set"]
    save_flags(parse_training_flags([*words, "--k", "8", "--set", "adam_beta1=0.5"]).as_flags(), tmp_path)
    for then in ([], [*changed, "--set", "sae.decoder_init_norm=0.3"]):
        settings = parse_training_flags(["--like", str(tmp_path), *then])
        cfg = build_runner_config(settings, "blocks.1.hook_resid_post", d_in=32, device="cpu", run_id="any")
        assert cfg.adam_beta1 == 0.5
    assert cfg.sae.decoder_init_norm == 0.3
