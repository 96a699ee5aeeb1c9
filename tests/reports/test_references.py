"""An SAE is placed among published ones, each with the source of its numbers."""

import copy
import json

import pytest

from sae_toolkit.errors import UserError
from sae_toolkit.reports.page import render_html, render_markdown
from sae_toolkit.reports.references import REFERENCES, load_references, nearest
from support.pages import browse, embedded_data
from support.processes import ROOT

CONTENT = json.loads(REFERENCES.read_text())


def test_every_reference_has_a_source_and_what_differs_there():
    references = load_references()
    assert len(references) == len(CONTENT["saes"]) >= 25
    assert len({reference.model for reference in references if reference.loss_recovered is not None}) >= 5
    assert len({(reference.name, reference.source) for reference in references}) == len(references)
    for reference in references:
        assert reference.own == (not reference.source.startswith("https://"))
        assert reference.note


def test_the_numbers_of_this_project_are_in_one_row_of_the_page_that_is_their_source():
    own = [reference for reference in load_references() if reference.own]
    assert len(own) >= 6
    for reference in own:
        numbers = (f"{reference.l0:.1f}", f"{reference.explained_variance:.3f}")
        shares = {f"{reference.loss_recovered:.{digits}%}" for digits in (1, 2)}
        rows = (ROOT / reference.source).read_text().splitlines()
        assert any(all(n in row for n in numbers) and any(s in row for s in shares) for row in rows), reference.name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"source": ""}, "must be words"),
        ({"source": "docs/nowhere.md"}, "neither a URL nor a file"),
        ({"loss_recovered": 97.2}, "loss_recovered 97.2 must be a share"),
        ({"dead_features": -0.1}, "dead_features -0.1 must be a share"),
        ({"l0": None}, "l0 must be a number above 0"),
        ({"d_sae": 2304.0}, "d_sae and training_tokens must be whole numbers"),
        ({"model": "no/model"}, "no/model has no number of parameters"),
        ({"recovered": 0.9}, "'recovered'.* missing or unknown"),
        ({"read": "yesterday"}, "isoformat"),
    ],
)
def test_a_damaged_reference_is_a_bug_and_not_an_error_of_the_user(tmp_path, change, says):
    damaged = copy.deepcopy(CONTENT)
    damaged["saes"][3] |= change
    (tmp_path / "references.json").write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match=says) as raised:
        load_references(tmp_path / "references.json")
    assert not isinstance(raised.value, UserError)


def test_the_nearest_are_on_models_of_the_same_class_of_size_by_the_ratio_of_l0():
    found = nearest(load_references(), l0=40, parameters=2_600_000_000, n=3)
    assert found[0].l0 == 40
    ratios = [max(reference.l0 / 40, 40 / reference.l0) for reference in found]
    assert ratios == sorted(ratios)
    assert all(1e9 <= reference.parameters < 3e9 for reference in found)


def test_the_page_holds_the_point_of_the_sae_and_the_source_of_each_other(summary, plots):
    figure = embedded_data(render_html(summary, plots, []))["references"]
    *others, this = figure["data"]
    assert (this["x"], this["y"], this["text"]) == ([61.4], [0.9728], ["this SAE"])
    assert "meta" not in this
    hovers = [text for trace in others for text in trace["hovertext"]]
    drawn = [reference for reference in load_references() if reference.loss_recovered is not None]
    assert len(hovers) == len(drawn) == sum(len(trace["x"]) for trace in others)
    for reference in drawn:
        (shown,) = (text for text in hovers if text.startswith(f"<b>{reference.name}</b><br>"))
        assert reference.model in shown
        assert all(f"{count:,}" in shown for count in (reference.d_sae, reference.training_tokens) if count)
        assert shown.replace("<br>", "").endswith(reference.source)


@pytest.mark.parametrize(
    "change", [{"protocol": "saebench"}, {"metrics": {"loss_recovered": None}}, {"model": "synthetic:m"}]
)
def test_an_sae_without_a_comparable_loss_recovered_is_not_placed(summary, plots, change):
    metrics = summary["metrics"] | change.get("metrics", {})
    page = render_html(summary | change | {"metrics": metrics}, plots, [])
    assert embedded_data(page)["references"] is None
    assert "Among other SAEs" not in page + render_markdown(summary | change | {"metrics": metrics})


def test_markdown_lists_the_nearest_and_says_that_it_is_no_ranking(summary):
    lines = render_markdown(summary).splitlines()
    at = lines.index("## Among other SAEs")
    assert lines[at + 4] == "| this SAE | embedded:smollm2-135m | 300 |  | 61.4 | 97.28% | 0.843 |"
    assert any("A place, not a ranking" in line for line in lines[at:])


def test_the_filter_hides_the_saes_of_a_size_and_keeps_that_of_the_page(summary, plots, tmp_path):
    (tmp_path / "report.html").write_text(render_html(summary, plots, []), encoding="utf-8")
    driver = """<iframe id="page" src="report.html" width="1200" height="4000"></iframe><p id="counts"></p><script>
    addEventListener("load", () => setTimeout(async () => {
      const { contentWindow: page, contentDocument: doc } = document.getElementById("page"), counts = [];
      const count = () => counts.push(doc.querySelectorAll("#reference-plot .scatterlayer .points path").length);
      const settle = () => new Promise((resolve) => setTimeout(resolve, 500));
      count();
      for (const box of doc.querySelectorAll("#references input")) { box.click(); await settle(); count(); }
      await page.drawPlots();
      count();
      doc.querySelector("#references input").click();
      await settle();
      count();
      document.getElementById("counts").textContent = counts.join(" ");
    }, 5000))</script>"""
    (tmp_path / "driver.html").write_text(driver)
    document, console = browse((tmp_path / "driver.html").as_uri(), tmp_path / "profile")
    assert console == []
    sizes = [0, 0, 0]
    for reference in load_references():
        if reference.loss_recovered is not None:
            sizes[(reference.parameters >= 1e9) + (reference.parameters >= 3e9)] += 1
    small, middle, large = sizes
    expected = [small + middle + large, middle + large, large, 0, 0, small]
    assert f'<p id="counts">{" ".join(str(count + 1) for count in expected)}</p>' in document
