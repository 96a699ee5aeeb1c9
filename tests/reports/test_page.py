"""The report shows what was measured, opens without a network, and never treats text as markup."""

import io
import re

import numpy as np
import pytest
import torch
from rich.console import Console

from sae_toolkit.evaluation.feature_browser import Context, Feature, FeatureRecorder, decode_tokens, logit_effects
from sae_toolkit.model.language_model import Unembedding
from sae_toolkit.reports.page import render_html, render_markdown
from sae_toolkit.reports.tables import render
from support.pages import D, F, browse, embedded_data

HOSTILE = "</script><script>document.title='taken'</script><!--"


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
    return recorder.features(rows_NT, tokenizer, W_dec_FD, Unembedding(unembed_VD, torch.ones(D)))


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


@pytest.mark.parametrize("is_centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logit_effects_equal_the_formula_in_float64(dtype, is_centered):
    generator = torch.Generator().manual_seed(2)
    W_dec, unembed, norm = (torch.randn(*n, generator=generator).to(dtype) for n in ((5, 16), (1000, 16), (16,)))
    directions = W_dec.double() - is_centered * W_dec.double().mean(1, keepdim=True)
    changes = (directions * norm.double()) @ unembed.double().T
    changes -= changes.mean(1, keepdim=True)
    effects = logit_effects(W_dec, Unembedding(unembed, norm, is_centered))
    for (ids, values), largest in zip(effects, (True, False), strict=True):
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


@pytest.mark.parametrize(("name", "times"), [("tpp", 1), ("sparse_probing", 0)])
def test_a_report_says_beside_the_numbers_of_an_unreliable_eval_that_it_is_one(summary, plots, name, times):
    summary["saebench"] = {name: {f"{name}_top_2": 0.25}}
    console = Console(width=10_000, file=io.StringIO())
    console.print(render(summary))
    for report in (render_html(summary, plots, []), render_markdown(summary), console.file.getvalue()):
        assert report.count(f"{name} was found to fail several tests of reliability") == times
    page, markdown = render_html(summary, plots, []), render_markdown(summary)
    assert re.search(rf"{name}</summary>(<p>tpp was found .*2605\.18229\)</p>){{{times}}}<table>", page)
    assert ("arXiv:2605.18229)\n\n| Metric | Value |" in markdown) == bool(times)


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
    phone = '<iframe id="phone" src="report.html" width="400" height="12000"></iframe><p id="width"></p><script>'
    phone += "addEventListener('load', () => setTimeout(() => { document.getElementById('width').textContent ="
    phone += "document.getElementById('phone').contentDocument.documentElement.scrollWidth; }, 5000))</script>"
    (tmp_path / "phone.html").write_text(phone)
    document, _ = browse((tmp_path / "phone.html").as_uri(), tmp_path / "profile")
    assert '<p id="width">400</p>' in document
