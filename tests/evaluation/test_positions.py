"""An SAE without a record of its positions, on the embedded model, whose first position is massive."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from sae_lens import StandardSAE, StandardSAEConfig

from sae_toolkit.diagnosis.evaluation_causes import _hook_flag, _massive_first_position
from sae_toolkit.diagnosis.evidence import Evidence
from sae_toolkit.evaluation.massive_activations import may_hold_massive_first_position
from sae_toolkit.evaluation.run import measure_saes
from sae_toolkit.evaluation.setup import prepare_evaluations
from sae_toolkit.files.embedded import EMBEDDED_MODEL, EMBEDDED_TEXT
from sae_toolkit.reports.page import render_html, render_markdown
from sae_toolkit.reports.summary import summarize
from sae_toolkit.reports.tables import first_position_note, render, render_several, verdict
from sae_toolkit.settings.evaluation import parse_evaluation_flags
from support.processes import HOOK


@pytest.fixture(scope="module")
def group(language_model, tmp_path_factory):
    """An evaluation of an SAE that gives back all but the direction of the massive activation."""
    acts_TD = language_model.activations(torch.tensor([[1, 500, 900]]))[0]
    d_in = acts_TD.shape[1]
    direction_D = acts_TD[0] / acts_TD[0].norm()
    others_DD = torch.eye(d_in) - torch.outer(direction_D, direction_D)
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=2 * d_in, apply_b_dec_to_input=False))
    sae.W_enc.data = torch.cat([others_DD, -others_DD], dim=1)
    sae.W_dec.data = torch.cat([torch.eye(d_in), -torch.eye(d_in)])
    path = tmp_path_factory.mktemp("sae")
    sae.save_model(path)
    settings = parse_evaluation_flags(
        "",
        [
            *("--sae_path", str(path), "--model_name", EMBEDDED_MODEL, "--hook_name", HOOK, "--device", "cpu"),
            *("--dataset", EMBEDDED_TEXT, "--num_samples", "10", "--context_length", "24", "--n_features", "0"),
        ],
    )
    (prepared,) = prepare_evaluations(settings.saes, settings.text, settings.measurements)
    return prepared


def changed(group, sources=None, **positions):
    evaluated = group.saes[0]
    evaluated = replace(
        evaluated,
        positions=replace(evaluated.positions, **positions),
        sources=evaluated.sources | (sources or {}),
    )
    return replace(group, saes=(evaluated,))


def test_it_is_measured_with_and_without_the_massive_first_position(group, language_model):
    results = []
    for each in (group, changed(group, {"skip_positions": "flag"}, skip_positions=1)):
        (evaluation,) = measure_saes(each, language_model, batch_size=10)
        results.append((summarize(each, each.saes[0], evaluation), evaluation))
    (summary, evaluation), (without, _) = results
    massive = summary["massive_first_position"]
    assert massive["ratio"] == massive["norm"] / massive["norm_of_others"] > 100
    assert massive["metrics_without"] == {
        name: pytest.approx(without["metrics"][name], rel=1e-6)
        for name in massive["metrics_without"]
        if name != "kl_zero"
    }
    assert summary["metrics"]["loss_recovered"] < 0.85
    assert without["metrics"]["loss_recovered"] > 0.95
    assert "with the massive first position" in verdict(summary)
    note = first_position_note(summary)
    for shown in (
        f"{massive['ratio']:.0f} times the median",
        *(
            f"loss recovered is {s['metrics']['loss_recovered']:.2%} and explained variance is"
            f" {s['metrics']['explained_variance']:.3f}"
            for s in (summary, without)
        ),
        "--skip_positions 1",
    ):
        assert shown in note
    console = Console(width=1000, record=True)
    console.print(render(summary), render_several([summary, without]))
    plots = evaluation.plots
    for text in (
        console.export_text(),
        render_markdown(summary),
        render_html(summary, plots, []).replace("&#39;", "'"),
    ):
        assert note in text

    assert without["massive_first_position"] is None
    finding = _massive_first_position(Evidence(summary, None, {}, None, "./sae", None))
    assert finding is not None
    assert (finding.of_training, finding.flags) == (False, ("--skip_positions", "1"))
    assert _massive_first_position(Evidence(without, None, {}, None, "./sae", None)) is None


@pytest.mark.parametrize(
    ("hook_name", "trained_at", "flag"),
    [
        ("blocks.3.hook_resid_post", None, ("--layer", "3")),
        ("blocks.3.hook_mlp_out", "blocks.1.hook_mlp_out", ("--layer", "3")),
        ("blocks.3.hook_resid_post", "blocks.1.hook_mlp_out", ("--hook_name", "blocks.3.hook_resid_post")),
        ("model.layers.3.mlp", "blocks.1.hook_mlp_out", ("--hook_name", "model.layers.3.mlp")),
        ("model.embed_tokens", "model.embed_tokens", ("--hook_name", "model.embed_tokens")),
    ],
)
def test_the_flag_for_another_hook_leads_to_that_hook(hook_name, trained_at, flag):
    assert _hook_flag(hook_name, trained_at) == flag


@pytest.mark.parametrize(
    ("sources", "positions", "expected"),
    [
        ({}, {}, True),
        ({"skip_positions": "flag"}, {}, False),
        ({"skip_positions": "record"}, {}, False),
        ({"max_activation_norm": "record"}, {"max_activation_norm": 1e9}, False),
        ({"exclude_special_tokens": "record"}, {"special_token_ids": (1,)}, False),
        ({"exclude_special_tokens": "record"}, {"special_token_ids": (2,)}, True),
    ],
)
def test_it_is_measured_twice_only_if_nothing_says_which_positions(group, sources, positions, expected):
    """Each context starts with token 1."""
    each = changed(group, sources, **positions)
    assert may_hold_massive_first_position(each, each.saes[0]) is expected
