"""--recipe auto: which flags it chooses, and by what rules."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_toolkit.errors import UserError
from sae_toolkit.many_runs.sweep.trials import make_trials
from sae_toolkit.settings.checks import check_world_size
from sae_toolkit.settings.command_line import parse_training_flags, save_flags, training_words
from sae_toolkit.settings.training import RECIPE_FLAGS, TrainingSettings
from sae_toolkit.training.recipe import learning_rate, least_learning_rate, with_recipe
from sae_toolkit.training.run import Training, open_activations
from sae_toolkit.training.setup import prepare_run

D_IN = 576


def chosen(*words: Any, d_in: int = D_IN, n_ranks: int = 1) -> TrainingSettings:
    return with_recipe(parse_training_flags(list(map(str, words))), d_in, n_ranks).settings


def test_the_default_is_the_recipe_of_the_document() -> None:
    assert chosen() == TrainingSettings()


def test_a_given_flag_is_kept_and_the_others_follow_from_it() -> None:
    given = ("--lr", "1e-4", "--k", "100", "--expansion_factor", "32", "--normalize_activations", "none")
    settings, others = chosen("--recipe", "auto", *given), chosen("--recipe", "auto")
    few = ("--recipe", "auto", "--training_tokens", 100_000, "--expansion_factor")

    assert (settings.optimization.lr, settings.sae.k, settings.sae.expansion_factor) == (1e-4, 100, 32)
    assert settings.sae.normalize_activations == "none"
    assert settings.optimization.train_batch_size_tokens == others.optimization.train_batch_size_tokens
    windows = [chosen(*few, factor).optimization.dead_feature_window for factor in (8, 16)]
    assert windows[1] == pytest.approx(2 * windows[0], abs=1)  # twice as many features fire half as often


def test_the_width_is_the_factor_or_the_number_whichever_is_given_later() -> None:
    number, factor = ("--d_sae", 4096), ("--expansion_factor", 4)
    auto = ("--recipe", "auto")

    assert chosen(*number).sae.n_features(768) == 4096
    assert chosen(*factor, *number).sae.n_features(768) == 4096
    assert chosen(*number, *factor).sae.n_features(768) == 3072
    same = [chosen(*auto, *words) for words in (factor, ("--d_sae", 4 * D_IN))]
    assert same[0].optimization == same[1].optimization
    assert [settings.sae.n_features(D_IN) for settings in same] == [4 * D_IN, 4 * D_IN]
    assert chosen(*auto, *number).optimization.lr < same[0].optimization.lr


def test_another_run_like_it_has_its_number_of_features_unless_a_factor_is_given(tmp_path) -> None:
    save_flags(chosen("--d_sae", 4096, "--k", 5).as_flags(), tmp_path)

    assert chosen("--like", tmp_path).sae.width_words == ("--d_sae", "4096")
    assert chosen("--like", tmp_path, "--expansion_factor", 2).sae.width_words == ("--expansion_factor", "2")
    assert training_words(chosen("--d_sae", 4096, "--expansion_factor", 2).as_flags()) == ["--expansion_factor", "2"]


def test_a_field_that_is_set_is_kept() -> None:
    settings = chosen("--recipe", "auto", "--set", "sae.decoder_init_norm=0.7")

    assert settings.optimization.set == ("sae.decoder_init_norm=0.7",)


@pytest.mark.parametrize(
    ("words", "architecture"),
    [
        ((), "batchtopk"),
        (("--l1_coefficient", 5), "standard"),
        (("--l0_coefficient", 1), "jumprelu"),
        (("--target_l0", 50), "jumprelu"),
        (("--matryoshka_widths", 512, 2304), "matryoshka_batchtopk"),
        (("--device", "mps"), "topk"),
    ],
)
def test_the_architecture_has_the_flags_that_are_given(words: tuple[Any, ...], architecture: str) -> None:
    assert chosen("--recipe", "auto", *words).sae.architecture == architecture


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_an_sae_without_k_gets_the_same_l0(architecture: str) -> None:
    settings = chosen("--recipe", "auto", "--architecture", architecture)

    assert settings.sae.target_l0 == chosen("--recipe", "auto").sae.k == 64


def test_the_quadratic_loss_keeps_its_own_target() -> None:
    words = ("--architecture", "jumprelu", "--set", "sae.jumprelu_sparsity_loss_mode=quadratic")

    assert chosen("--recipe", "auto", *words).sae.target_l0 is None


@pytest.mark.parametrize("mode", ["none", "expected_average_only_in", "expected_average_in_and_out"])
def test_the_bias_begins_at_the_mean_with_every_scaling_that_has_one(mode: str) -> None:
    assert chosen("--recipe", "auto", "--normalize_activations", mode).sae.b_dec_init_method == "mean"


def test_a_given_sparsity_weight_is_not_adjusted() -> None:
    assert chosen("--recipe", "auto", "--architecture", "gated", "--l1_coefficient", 3).sae.target_l0 is None


def test_more_tokens_give_larger_batches_and_longer_runs() -> None:
    runs = [
        chosen("--recipe", "auto", "--expansion_factor", 8, "--training_tokens", tokens).optimization
        for tokens in (50_000, 500_000, 5_000_000, 50_000_000)
    ]

    batches = [run.train_batch_size_tokens for run in runs]
    assert batches == sorted(batches) and batches[-1] == 4096
    steps = [run.training_tokens // run.train_batch_size_tokens for run in runs]
    assert steps[0] >= 600 and steps[-1] > 10_000


def test_the_rate_of_a_long_run_is_the_published_one() -> None:
    published = 2e-4 * math.sqrt(2**14 / 32_768)  # of Gao et al. 2024

    assert learning_rate(n_steps=10**6, d_sae=32_768, batch=4096, k=64) == pytest.approx(published)
    # 50 M tokens of Llama-3-8B
    assert published < learning_rate(n_steps=12_207, d_sae=32_768, batch=4096, k=64) < 2.5 * published


def test_the_rate_grows_with_the_batch_and_k_and_falls_with_steps_and_width() -> None:
    demo = {"n_steps": 976, "d_sae": 2304, "batch": 512, "k": 64}
    rates = [
        learning_rate(**demo | more)
        for more in ({"batch": 128}, {"k": 20}, {"d_sae": 4608}, {"n_steps": 1952}, {}, {"k": 160}, {"n_steps": 488})
    ]
    assert all(rate < rates[4] for rate in rates[:4])
    assert all(rate > rates[4] for rate in rates[5:])
    assert learning_rate(**demo | {"batch": 4096}) == rates[4]
    assert learning_rate(**demo | {"d_sae": 10**6}) == least_learning_rate(976, 10**6)


@pytest.mark.parametrize(
    ("words", "is_fitted"),
    [
        (("--layer", 5), True),
        (("--hook_name", "model.layers.5"), True),
        (("--hook_name", "transformer.h.5"), True),
        (("--hook_name", "blocks.5.hook_mlp_out"), True),
        (("--hook_name", "model.layers.5.mlp"), True),
        (("--hook_name", "model.layers.5.self_attn"), False),
        (("--hook_name", "blocks.5.hook_attn_out"), False),
        (("--hook_name", "blocks.5.attn.hook_z"), False),
        (("--hook_names", "blocks.5.hook_resid_pre", "blocks.5.hook_attn_out"), False),
        (("--layer", 5, "--architecture", "jumprelu"), False),
    ],
)
def test_the_rate_is_raised_only_where_it_was_fitted(words: tuple[Any, ...], is_fitted: bool) -> None:
    """BatchTopK's features become alike in the outputs of attention, and the other kinds have another loss."""
    rate = chosen("--recipe", "auto", "--expansion_factor", 4, *words).optimization.lr
    assert (rate > 2e-3) == is_fitted


def test_schedules_fit_into_runs_of_any_length() -> None:
    for tokens in (64, 65, 200, 1000, 3_000, 10**4, 10**9):
        run = chosen("--recipe", "auto", "--training_tokens", tokens).optimization

        steps = tokens // run.train_batch_size_tokens
        assert run.lr_warm_up_steps + run.lr_decay_steps <= steps
        assert 1 <= run.dead_feature_window <= max(steps, 1)


def test_ranks_divide_the_batch_and_contexts_of_a_fine_tuning_fit_into_it() -> None:
    assert chosen("--recipe", "auto", n_ranks=3).optimization.train_batch_size_tokens % 3 == 0
    few = chosen("--recipe", "auto", "--training_tokens", 20_000, n_ranks=8)  # which need 32 tokens each
    check_world_size(few, 8)
    tuned = chosen("--recipe", "auto", "--finetune_loss", "kl", "--context_size", 2048).optimization
    assert tuned.train_batch_size_tokens >= 2048


def test_a_value_that_does_not_fit_a_given_one_is_refused() -> None:
    with pytest.raises(UserError, match="--lr_warm_up_steps 5000 and --lr_decay_steps"):
        chosen("--recipe", "auto", "--lr_warm_up_steps", 5000)


def saved_run(directory: Path, *words: Any) -> TrainingSettings:
    settings = chosen(*words)
    save_flags(settings.as_flags(), directory)
    return settings


def test_a_resumed_run_keeps_what_was_chosen(tmp_path: Path) -> None:
    settings = saved_run(tmp_path, "--recipe", "auto", "--k", 32)
    flags = json.loads((tmp_path / "training_flags.json").read_text())
    flags["lr"] = 0.125  # as if an earlier version had had another rule
    save_flags(flags, tmp_path)

    resumed = chosen("--resume", tmp_path)

    assert resumed.optimization.lr == 0.125
    assert resumed.sae == settings.sae


def test_a_run_can_be_resumed_with_the_words_that_started_it(tmp_path: Path) -> None:
    words = ("--recipe", "auto", "--k", 32, "--set", "adam_beta1=0.5")
    settings = saved_run(tmp_path, *words)

    assert chosen(*words, "--resume", tmp_path).optimization == settings.optimization
    with pytest.raises(UserError, match="the resumed run has"):
        chosen("--resume", tmp_path, "--set", "adam_beta1=0.25")


def test_like_chooses_anew_what_was_chosen_and_keeps_what_was_given(tmp_path: Path) -> None:
    given = ("--recipe", "auto", "--k", 32, "--lr_warm_up_steps", 0)
    saved_run(tmp_path, *given)

    assert chosen("--like", tmp_path).as_flags() == chosen(*given, "--like", tmp_path).as_flags()
    longer, expected = (chosen(*words, "--training_tokens", 5_000_000) for words in (("--like", tmp_path), given))
    assert (longer.sae, longer.optimization) == (expected.sae, expected.optimization)


def test_like_with_the_recipe_keeps_what_a_run_without_it_had(tmp_path: Path) -> None:
    saved_run(tmp_path, "--k", 32, "--lr", "3e-4", "--architecture", "topk")

    settings = chosen("--like", tmp_path, "--recipe", "auto")

    assert (settings.sae.k, settings.optimization.lr, settings.sae.architecture) == (32, 3e-4, "topk")
    assert settings.sae.normalize_activations == "expected_average_only_in"


def test_the_words_of_a_run_leave_out_what_was_chosen_and_give_the_same_run() -> None:
    settings = chosen("--recipe", "auto", "--lr_warm_up_steps", 0, "--k", 100)

    words = training_words(settings.as_flags())

    assert sorted(words) == sorted(["--recipe", "auto", "--lr_warm_up_steps", "0", "--k", "100"])
    assert chosen(*words) == settings


def test_a_trial_with_a_given_default_is_not_the_one_for_which_it_is_chosen(tmp_path: Path) -> None:
    """Its directory says what it was trained with, and a later sweep takes the SAE that it finds there."""
    base = ["--recipe", "auto"]
    (by_recipe,) = make_trials(base, tmp_path, grids=["k=64"])
    (given,) = make_trials(base, tmp_path, grids=["k=64", f"lr={TrainingSettings().optimization.lr}"])

    assert by_recipe.directory != given.directory


def test_each_flag_of_the_recipe_is_one_of_the_training() -> None:
    assert set(RECIPE_FLAGS) <= TrainingSettings().as_flags().keys()


@pytest.mark.parametrize("mode", ["none", "expected_average_only_in"])
def test_the_bias_begins_at_the_mean_of_the_activations(tiny_run: list[Any], mode: str) -> None:
    words = [*tiny_run, "--b_dec_init_method", "mean", "--normalize_activations", mode]
    run = prepare_run(parse_training_flags(list(map(str, words))))
    training = Training(run, open_activations(run))

    trainer = training.trainer.first
    measured_ND = training.stream.state_dict()["buffer"]["acts"]  # none of them is used yet
    expected_D = measured_ND.double().mean(dim=0) * (trainer.activation_scaler.scaling_factor or 1)
    assert expected_D.norm() > 0.1 * measured_ND.norm(dim=-1).mean()
    torch.testing.assert_close(trainer.sae.b_dec.double(), expected_D, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other", [("--init_from", "an SAE"), ("--normalize_activations", "layer_norm")])
def test_a_bias_that_cannot_be_measured_is_refused(other: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="--b_dec_init_method mean"):
        parse_training_flags(["--b_dec_init_method", "mean", *other])
