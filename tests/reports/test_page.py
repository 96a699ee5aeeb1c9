"""The report shows what was measured, opens without a network, and never treats text as markup."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict

import numpy as np
import pytest
import torch

from sae_toolkit.evaluation.dead_features import DeadFeatureEstimates
from sae_toolkit.evaluation.decoder_cosines import measure_cosines
from sae_toolkit.evaluation.feature_browser import Context, Feature, FeatureRecorder, decode_tokens, logit_effects
from sae_toolkit.reports.page import render_html, render_markdown
from sae_toolkit.reports.tables import BESIDE
from support.processes import HANGS

HOSTILE = "</script><script>document.title='taken'</script><!--"
D, F = 32, 300


@pytest.fixture(scope="module")
def sae():
    """A decoder; sparse features [N, F], a fifth of them dead; and token ids of 40 rows of 64 tokens."""
    generator = torch.Generator().manual_seed(0)
    W_dec_FD = torch.randn(F, D, generator=generator)
    thresholds_F = torch.linspace(1.0, 3.5, F)[torch.randperm(F, generator=generator)]
    features_NF = torch.relu(torch.randn(40 * 64, F, generator=generator) - thresholds_F)
    features_NF[:, ::5] = 0
    rows_NT = torch.randint(3, 49_000, (40, 64), generator=generator).numpy().astype(np.uint32)
    return W_dec_FD, features_NF, rows_NT


def record(recorder, features_NF, n_positions=64, chunk=700):
    at_N = torch.arange(len(features_NF))
    for n in at_N.split(chunk):
        recorder.add(n // n_positions, n % n_positions, features_NF[n])


@pytest.fixture(scope="module")
def features(sae, tokenizer):
    W_dec_FD, features_NF, rows_NT = sae
    recorder = FeatureRecorder(F, asked_for=[5, 7], n_sampled=50)
    record(recorder, features_NF)
    unembed_VD = torch.randn(len(tokenizer), D, generator=torch.Generator().manual_seed(1))
    return recorder.features(rows_NT, tokenizer, W_dec_FD, unembed_VD, torch.ones(D))


@pytest.fixture
def summary(sae):
    cosines = asdict(measure_cosines(sae[0], torch.ones(F, dtype=torch.bool), seed=0))
    del cosines["histogram"], cosines["interval"]
    curve = [(1000, 0.5), (3000, 0.3), (52_517, 0.17)]
    dead = DeadFeatureEstimates(52_517, 3 / 52_517, 0.001, 0.15, 0.12, 300_000, curve)
    metrics = dict.fromkeys(BESIDE, 0.5)
    metrics |= {"loss_recovered": 0.9728, "l0": 61.4, "dead_features": 0.17, "decoder_absorption": 0.41}
    metrics |= {"ce_clean": 3.022, "ce_sae": 3.233, "ce_zero": 10.803, "kl_sae": 0.281, "replaced_share": 0.9999}
    metrics |= {"explained_variance": 0.843, "cosine_similarity": 0.96, "l2_ratio": 0.958}
    statuses = {"loss_recovered": "healthy", "l0": "healthy", "dead_features": "unsettled"}
    return {
        "sae_lens_version": "6.54.12",
        "sae": {"name": "demo", "path": "checkpoints/demo", "library": "SAELens", "form": "inference"}
        | {"architecture": "jumprelu", "d_in": D, "d_sae": F},
        "protocol": "health",
        "interval_units": "documents",
        "model": "embedded:smollm2-135m",
        "hook_name": "blocks.12.hook_resid_post",
        "dataset": "embedded:wikipedia",
        "dataset_config": None,
        "dataset_split": "train",
        "fallback_from": None,
        "held_out": {"fraction": 0.2, "seed": 42},
        "context_length": 256,
        "positions": {"special_token_ids": [0, 1, 2], "skip_positions": 1, "max_activation_norm": 1418.0},
        "massive_first_position": None,
        "sources": {"hook_name": "record", "exclude_special_tokens": "default", "skip_positions": "flag"},
        "tokens": 52_517,
        "sequences": 206,
        "loss_tokens": 20_058,
        "loss_sequences": 79,
        "metrics": metrics,
        "intervals": {"loss_recovered": [0.969, 0.976], "l0": [60.1, 62.9]},
        "dead_feature_estimates": asdict(dead) | {"training_run": {"dead": 0.1, "dead_here_alive_there": 0.02}},
        "decoder_cosines": cosines,
        "health": statuses | {"decoder_absorption": "unhealthy", "healthy": 2, "of": 4},
    }


@pytest.fixture
def plots(sae, summary):
    checkpoints = [{"tokens": n, "metrics": summary["metrics"]} for n in (200_000, 100_000)]
    return {
        "log10_firing_rate": ([-6.0, -4.0, -2.0, 0.0], [0, 40, 200]),
        "never_fired": 60,
        "l0": ([-0.5, 39.5, 79.5], [100, 52_417]),
        "decoder_cosine": measure_cosines(sae[0], torch.ones(F, dtype=torch.bool), seed=0).histogram,
        "checkpoints": checkpoints,
    }


def embedded_data(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_recorder_finds_what_a_dense_search_finds(sae, features, tokenizer):
    _, features_NF, rows_NT = sae
    dense_RTF = features_NF.view(40, 64, F).numpy()
    assert [f.index for f in features[:2]] == [5, 7]
    for feature in features:
        acts_RT = dense_RTF[:, :, feature.index]
        assert feature.firing_rate == (acts_RT != 0).mean()
        assert feature.max_activation == acts_RT.max()
        edges, counts = feature.histogram
        assert counts == tuple(np.histogram(acts_RT[acts_RT != 0], edges)[0]) if counts else not acts_RT.any()
        rows = [row for row in np.argsort(-acts_RT.max(1), kind="stable")[:8] if acts_RT[row].any()]
        assert len(feature.contexts) == len(rows)
        for context, row in zip(feature.contexts, rows, strict=True):
            peak = acts_RT[row].argmax()
            window = slice(max(0, peak - 24), peak + 13)
            assert context.peak == min(peak, 24)
            assert context.activations == tuple(acts_RT[row, window])
            assert context.tokens == decode_tokens(tokenizer, rows_NT[row, window].tolist())


def test_the_sample_reaches_over_the_firing_rates_of_features_that_fire(sae, features):
    rates = (sae[1] != 0).float().mean(0)
    sampled = [f.firing_rate for f in features[2:]]
    assert len(sampled) == 50 == len({f.index for f in features[2:]} - {5, 7})
    assert sampled == sorted(sampled, reverse=True)
    assert np.quantile(sampled, [0, 0.5, 1]) == pytest.approx(np.quantile(rates[rates > 0], [0, 0.5, 1]), rel=0.25)


def test_a_feature_that_is_asked_for_is_shown_though_it_never_fires(sae, features):
    assert not sae[1][:, 5].any()
    assert features[0].contexts == ()
    assert features[0].max_activation == 0


def test_where_features_are_dead_or_few_there_are_fewer_to_show(sae, tokenizer):
    W_dec_FD, features_NF, rows_NT = sae
    recorder = FeatureRecorder(10, asked_for=[9, 3, 9], n_sampled=50)
    assert [f.index for f in recorder.features(rows_NT, tokenizer, W_dec_FD)] == [9, 3]
    record(recorder, features_NF[:, :10])
    assert {f.index for f in recorder.features(rows_NT, tokenizer, W_dec_FD)} == {1, 2, 3, 4, 6, 7, 8, 9}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logit_effects_equal_the_formula_in_float64(dtype):
    generator = torch.Generator().manual_seed(2)
    W_dec, unembed, norm = (torch.randn(*n, generator=generator).to(dtype) for n in ((5, 16), (1000, 16), (16,)))
    changes = (W_dec.double() * norm.double()) @ unembed.double().T
    changes -= changes.mean(1, keepdim=True)
    for (ids, values), largest in zip(logit_effects(W_dec, unembed, norm), (True, False), strict=True):
        expected = changes.topk(8, largest=largest)
        assert torch.equal(ids, expected.indices)
        torch.testing.assert_close(values.double(), expected.values, rtol=1e-5, atol=1e-5)


def test_tokens_are_shown_as_their_text(tokenizer):
    ids = tokenizer("Le été\n <script> 漢", add_special_tokens=False)["input_ids"]
    tokens = decode_tokens(tokenizer, [1, *ids, 60_000])
    assert (tokens[0], tokens[-1]) == ("<|im_start|>", "[id 60000]")
    text = "".join(tokens[1:-1])
    assert text.startswith("Le été\n <script>")
    assert re.sub(r"\\x(..)", lambda byte: chr(int(byte[1], 16)), text[16:]).encode("latin-1").decode() == " 漢"


def test_the_page_holds_the_features_and_figures_as_they_are(summary, plots, features):
    data = embedded_data(render_html(summary, plots, features))
    assert len(data["figures"]) == 5 + 4
    for shown, feature in zip(data["features"], features, strict=True):
        assert shown["index"] == feature.index
        assert shown["max_activation"] == pytest.approx(feature.max_activation, rel=1e-3)
        assert [c["tokens"] for c in shown["contexts"]] == [list(c.tokens) for c in feature.contexts]
        assert [c["peak"] for c in shown["contexts"]] == [c.peak for c in feature.contexts]
        for context, expected in zip(shown["contexts"], feature.contexts, strict=True):
            assert context["activations"] == pytest.approx(expected.activations, rel=1e-3)
        assert [tuple(pair) for pair in shown["raised"]] == [
            (token, pytest.approx(change, rel=1e-3)) for token, change in feature.raised
        ]


def test_no_text_becomes_markup(summary, plots):
    context = Context((HOSTILE, "{{plotly}}"), (1.0, 0.0), 0)
    feature = Feature(3, 0.1, 1.0, ((0.0, 1.0), (1,)), (context,), ((HOSTILE, 1.0),), ((HOSTILE, -1.0),))
    summary["dataset"] = summary["model"] = summary["sae"]["name"] = HOSTILE
    page = render_html(summary, plots, [feature])
    assert HOSTILE not in page
    assert embedded_data(page)["features"][0]["contexts"][0]["tokens"] == [HOSTILE, "{{plotly}}"]


def test_a_page_with_50_features_is_one_file_under_3_mb(summary, plots, features, tmp_path):
    (tmp_path / "report.html").write_text(render_html(summary, plots, features), encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is loaded from elsewhere


def test_a_metric_that_is_no_number_is_said_to_be_none(summary, plots):
    summary["metrics"] |= {"loss_recovered": None, "ce_sae": None, "l0": None}
    del summary["intervals"]["loss_recovered"]
    assert '<p class="value">no number</p>' in render_html(summary, plots, [])
    assert "| Loss recovered | no number |" in render_markdown(summary)


def test_markdown_has_the_verdict_and_each_metric_against_its_standard(summary):
    lines = render_markdown(summary).splitlines()
    assert "**2/4 metrics healthy" in lines[2]
    assert "| Loss recovered | 97.28% | 96.90% to 97.60% | >= 70% | 60% to 70% | ✔ healthy |" in lines
    assert "| Dead features | 17.00% |  | <= 10% | 10% to 20% | ? unsettled |" in lines
    assert "| Decoder absorption | 0.410 | exact | <= 0.25 | 0.25 to 0.35 | ✘ unhealthy |" in lines
    assert "| Cross-entropy, hook zeroed | 10.803 |  |" in lines
    assert "| Tokens that would settle dead features | 300,000 | --dead_tokens |" in lines
    assert "- Tokens: 52,517 in 206 sequences" in lines


def browse(url, profile, *flags):
    """Returns the document after 15 seconds of Chromium's virtual time, and the lines of its console."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=15000"]
    done = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=HANGS, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_draws_the_plots_and_the_feature_of_the_link_without_an_error(summary, plots, features, tmp_path):
    path, chosen = tmp_path / "report.html", features[10]
    chosen_token = Context((HOSTILE,), (1.0,), 0)
    features = [*features, Feature(299, 0.1, 1.0, ((0.0, 1.0), (1,)), (chosen_token,), ((HOSTILE, 1.0),), ())]
    path.write_text(render_html(summary, plots, features), encoding="utf-8")
    document, console = browse(f"{path.as_uri()}#feature-{chosen.index}", tmp_path / "profile")
    assert console == []
    drawn = re.findall(r'<div class="plot js-plotly-plot">.*?<svg class="main-svg"', document, re.DOTALL)
    assert len(drawn) == 9
    detail = document[document.index('id="detail"') :]
    assert f"<h3>Feature {chosen.index}</h3>" in detail
    assert detail.count('<p class="context">') == len(chosen.contexts)

    document, console = browse(f"{path.as_uri()}#feature-299", tmp_path / "profile")
    assert console == []
    assert "<title>demo: SAE evaluation</title>" in document  # the token did not run
    assert "&lt;/script&gt;&lt;script&gt;" in document[document.index('id="detail"') :]


def test_nothing_is_wider_than_a_screen_of_400_pixels(summary, plots, features, tmp_path):
    (tmp_path / "report.html").write_text(render_html(summary, plots, features), encoding="utf-8")
    phone = '<iframe id="phone" src="report.html" width="400" height="9000"></iframe><p id="width"></p><script>'
    phone += "addEventListener('load', () => setTimeout(() => { document.getElementById('width').textContent ="
    phone += "document.getElementById('phone').contentDocument.documentElement.scrollWidth; }, 5000))</script>"
    (tmp_path / "phone.html").write_text(phone)
    document, _ = browse((tmp_path / "phone.html").as_uri(), tmp_path / "profile")
    assert '<p id="width">400</p>' in document
