"""The commands that the diagnosis gives are taken, measure the same SAE, and do not make matters worse."""

import shlex
from types import SimpleNamespace

import pytest

from sae_toolkit.diagnosis.diagnose import command
from sae_toolkit.diagnosis.evaluation_causes import (
    _at_positions_that_training_left_out,
    _too_few_positions,
    _too_small_a_sample,
)
from sae_toolkit.diagnosis.evidence import Evidence
from sae_toolkit.diagnosis.training_causes import _l1_penalty, _massive_activations, _sparsity
from sae_toolkit.settings.command_line import parse_training_flags, save_flags
from sae_toolkit.settings.evaluation import parse_evaluation_flags

HEALTHY = {"loss_recovered": 0.97, "l0": 64.0, "dead_features": 0.0, "decoder_absorption": 0.2, "replaced_share": 1.0}


def evidence(directory=None, trained=(), evaluated=(), *, unhealthy=(), probes=None, **summary) -> Evidence:
    """What is known of an SAE of these flags, unhealthy in some metrics."""
    settings = parse_training_flags([str(word) for word in trained])
    history = None
    if directory is not None:
        save_flags(settings.as_flags(), directory)
        history = SimpleNamespace(directory=directory, settings=settings)
    defaults = {
        "health": {metric: "unhealthy" if metric in unhealthy else "healthy" for metric in HEALTHY},
        "metrics": HEALTHY,
        "intervals": {},
        "hook_name": "blocks.1.hook_resid_post",
        "sequences": 206,
        "loss_sequences": 79,
        "dead_feature_estimates": {"tokens": 50_000, "tokens_to_settle": 60_000},
        "decoder_cosines": {"random_directions": 0.1},
        "context_length": 256,
        "positions": {"skip_positions": 1, "max_activation_norm": None},
        "sources": {},
        "sae": {"d_in": 32, "d_sae": 128, "architecture": "standard"},
    }
    found = {"massive_share": 0.0, "median_norm": 10.0, "explained": 0.5, "explained_of_others": 0.5, "twins": 0.5}
    return Evidence(
        defaults | summary,
        SimpleNamespace(**found | {"explained_by_strongest": 0.4} | (probes or {})),
        {"training_architecture": settings.sae.architecture, "hook_name": "blocks.1.hook_resid_post"},
        history,
        "./sae",
        parse_evaluation_flags("", ["--sae_path", "./sae", *evaluated]),
    )


@pytest.mark.parametrize(
    ("metric", "value", "interval", "samples"),
    [("l0", 118.0, (115.5, 120.5), 483), ("loss_recovered", 0.955, (0.951, 0.959), 206)],
)
def test_a_larger_sample_is_never_a_smaller_one(metric, value, interval, samples):
    """L0 is measured on more sequences than the loss; --num_samples sets both."""
    e = evidence(metrics=HEALTHY | {metric: value}, intervals={metric: interval})
    e.summary["health"][metric] = "unsettled"
    finding = _too_small_a_sample(e)
    assert finding.flags == ("--num_samples", str(samples))


def test_a_command_of_the_evaluation_keeps_what_was_given():
    given = ["--model_name", "gpt2", "--dataset", "my text.txt", "--skip_positions", "0", "--device", "cpu"]
    others = ["--output_json", "x.json", "--n_features", "5", "--no_diagnosis"]
    e = evidence(evaluated=[*given, "--num_samples", "12", *others], sequences=12, loss_sequences=12)
    e.summary["health"]["l0"] = "unsettled"
    words = shlex.split(command(_too_small_a_sample(e), e))
    assert words[:4] == ["python", "evaluate_sae_real_activations.py", "--sae_path", "./sae"]
    settings = parse_evaluation_flags("", words[2:])
    assert settings.saes == e.evaluation.saes
    assert settings.text.num_samples == 48
    assert (settings.text.dataset, settings.text.skip_positions) == ("my text.txt", 0)
    assert settings.results.output_json is None


ALL_POSITIONS = ["--skip_positions", "0", "--exclude_special_tokens", "false", "--max_activation_norm_multiple", "0"]


def test_massive_activations_that_flags_of_the_evaluation_let_in_are_not_blamed_on_the_training(tmp_path):
    names = ("skip_positions", "exclude_special_tokens", "max_activation_norm")
    by_flag = evidence(
        tmp_path, (), ALL_POSITIONS, probes={"massive_share": 0.99}, sources=dict.fromkeys(names, "flag")
    )
    assert _massive_activations(by_flag) is None
    finding = _at_positions_that_training_left_out(by_flag)
    assert command(finding, by_flag) == "python evaluate_sae_real_activations.py --sae_path ./sae"
    by_record = evidence(
        tmp_path, ALL_POSITIONS, probes={"massive_share": 0.99}, sources=dict.fromkeys(names, "record")
    )
    assert _at_positions_that_training_left_out(by_record) is None
    assert _massive_activations(by_record).flags == (
        *("--max_activation_norm_multiple", "10", "--skip_positions", "1", "--exclude_special_tokens", "true"),
    )


@pytest.mark.parametrize(
    ("skipped", "context", "source", "says"),
    [
        (64, 256, "record", "./run_saelens_training.sh --like RUN --skip_positions 1"),
        (64, 256, "flag", "python evaluate_sae_real_activations.py --sae_path ./sae"),
        (1, 16, "record", "python evaluate_sae_real_activations.py --sae_path ./sae --context_length 128"),
        (0, 256, "record", "./run_saelens_training.sh --like RUN --exclude_special_tokens false"),
    ],
)
def test_where_the_positions_are_too_few_the_flag_that_made_them_so_is_changed(
    tmp_path, skipped, context, source, says
):
    given = ["--skip_positions", str(skipped)] if source == "flag" else []
    e = evidence(
        tmp_path,
        evaluated=given,
        metrics=HEALTHY | {"replaced_share": 0.8},
        positions={"skip_positions": skipped, "max_activation_norm": None},
        context_length=context,
        sources={"skip_positions": source},
    )
    assert command(_too_few_positions(e), e) == says.replace("RUN", str(tmp_path))


STANDARD = ("--architecture", "standard", "--expansion_factor", 4)
TOO_DENSE = {"metrics": HEALTHY | {"l0": 400.0}, "unhealthy": ("l0", "decoder_absorption")}
ALIKE = {"metrics": HEALTHY | {"decoder_absorption": 0.6}, "unhealthy": ("decoder_absorption",)}


@pytest.mark.parametrize(
    ("cause", "trained", "summary"),
    [
        (_l1_penalty, (*STANDARD, "--set", "sae.l1_warm_up_steps=10"), ALIKE),
        (_l1_penalty, (*STANDARD, "--normalize_activations", "layer_norm"), ALIKE),
        (_l1_penalty, (*STANDARD, "--init_from", "./first"), ALIKE),
        (_sparsity, (*STANDARD, "--normalize_activations", "constant_norm_rescale"), TOO_DENSE),
        (
            _sparsity,
            (
                *("--architecture", "jumprelu", "--set", "sae.jumprelu_sparsity_loss_mode=quadratic"),
                *("--set", "sae.target_l0=20", "--expansion_factor", 4),
            ),
            TOO_DENSE,
        ),
    ],
)
def test_a_command_of_the_training_is_taken(tmp_path, cause, trained, summary):
    e = evidence(tmp_path, trained, **summary)
    given = command(cause(e), e)
    assert given.startswith(f"./run_saelens_training.sh --like {tmp_path} ")
    assert ("--init_from none" in given) is ("--init_from" in trained)
