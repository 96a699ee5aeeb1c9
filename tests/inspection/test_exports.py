"""--export neuronpedia and saedashboard: read by SAEDashboard's own code, with the numbers of features.parquet."""

import importlib.util
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata

from sae_toolkit.inspection.neuronpedia import export_neuronpedia, layer_of
from sae_toolkit.inspection.saedashboard import export_saedashboard
from sae_toolkit.model.loading import find_model, load_language_model
from support.inspection import CONTEXT

SAE_DASHBOARD = "sae-dashboard==0.8.0"
ITS_PAGES_NEED = (
    *("dataclasses-json==0.6.7", "marshmallow<4", "typing-inspect==0.9.0", "eindex-callum==0.1.2", "matplotlib"),
    *("contourpy", "cycler", "kiwisolver", "fonttools", "pyparsing", "pillow"),
)


@pytest.fixture(scope="module")
def batches(inspected, tokenizer):
    directory = export_neuronpedia(inspected, tokenizer)
    files = sorted(directory.iterdir())
    assert [file.name for file in files] == ["batch-0.json"]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def test_a_feature_has_the_numbers_of_features_parquet(batches, inspected):
    firing = {each["feature"]: each for each in pq.read_table(inspected).to_pylist() if each["n_firings"]}
    (batch,) = batches
    assert batch["layer"] == 1
    assert [each["feature_index"] for each in batch["features"]] == list(firing)
    for exported in batch["features"]:
        feature = firing[exported["feature_index"]]
        assert exported["frac_nonzero"] == feature["firing_rate"]
        assert exported["pos_str"] == [each["token"] for each in feature["promoted"]]
        heights = exported["freq_hist_data_bar_heights"]
        assert len(heights) == 40 and sum(heights) == pytest.approx(feature["n_firings"], abs=0.05)
        assert len(exported["activations"]) == len(feature["examples"])
        for activation, example in zip(exported["activations"], feature["examples"], strict=True):
            assert activation["values"] == pytest.approx(example["activations"], abs=6e-4)
            assert len(activation["tokens"]) == len(example["token_ids"])
            peak = activation["values"][activation["qualifying_token_index"]]
            assert peak == pytest.approx(example["activation"], rel=1e-2, abs=1e-3)
            if example["kind"] == "strongest":
                assert (activation["bin_min"], activation["bin_contains"]) == (-1, -1)
            else:
                assert activation["bin_min"] - 1e-3 <= example["activation"] <= activation["bin_max"] + 1e-3
                assert 0 < activation["bin_contains"] <= 1


def test_the_flag_writes_them_beside_the_features(script, trained, tmp_path):
    flags = ("--sae_path", trained, "--tokens", 500, "--output", tmp_path, "--device", "cpu")
    done = script("inspect_sae_features.py", *flags, "--no_page", "--export", "saedashboard", "neuronpedia")
    assert done.status == 0, done.stderr
    written = ("features.parquet", "neuronpedia", "saedashboard")
    assert done.stdout.split() == [str(tmp_path / name) for name in written]
    page = ("features.html", "features_data")
    done = script("inspect_sae_features.py", *flags)
    assert done.status == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {*written, *page}
    done = script("inspect_sae_features.py", *flags, "--examples", "3")  # the exports are of other examples
    assert done.status == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"features.parquet", *page}


@pytest.mark.parity
def test_saedashboards_own_classes_read_and_write_them(batches, tmp_path):
    """Its package is put into a directory of its own without what it needs, since its pins conflict with ours."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), SAE_DASHBOARD]
    subprocess.run(command, check=True)
    file = tmp_path / "sae_dashboard/neuronpedia/neuronpedia_dashboard.py"
    spec = importlib.util.spec_from_file_location("neuronpedia_dashboard", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for batch in batches:
        assert json.loads(json.dumps(module.NeuronpediaDashboardBatch(**batch).to_dict())) == batch


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_language_model(find_model(str(tiny_model)), "blocks.1.hook_resid_post", "cpu", torch.float32)


@pytest.fixture(scope="module")
def for_saedashboard(inspected, trained, model):
    sae = SAE.load_from_disk(str(trained))
    directory = export_saedashboard(inspected, sae.W_dec.detach(), model)
    (file,) = directory.iterdir()
    return file


def test_saedashboard_gets_the_numbers_of_features_parquet(for_saedashboard, inspected, trained, model):
    """The logits of an example's tokens are those that the output head gives the decoder vector."""
    firing = [each for each in pq.read_table(inspected).to_pylist() if each["n_firings"]]
    exported = json.loads(for_saedashboard.read_text())
    assert list(exported["feature_data_dict"]) == [str(each["feature"]) for each in firing]
    assert exported["feature_stats"]["frac_nonzero"] == [each["firing_rate"] for each in firing]
    W_dec = SAE.load_from_disk(str(trained)).W_dec.detach()
    for feature in firing[:20]:
        data = exported["feature_data_dict"][str(feature["feature"])]
        assert data["logits_table_data"]["top_token_ids"] == [each["token_id"] for each in feature["promoted"]]
        assert sum(data["acts_histogram_data"]["bar_heights"]) == pytest.approx(feature["n_firings"], abs=0.05)
        assert sum(data["logits_histogram_data"]["bar_heights"]) == model.config.vocab_size
        top, *intervals = data["sequence_data"]["seq_group_data"]
        strongest = [each for each in feature["examples"] if each["kind"] == "strongest"]
        assert [each["token_ids"] for each in top["seq_data"]] == [each["token_ids"] for each in strongest]
        assert len(intervals) == 5
        assert sum(len(each["seq_data"]) for each in intervals) == len(feature["examples"]) - len(strongest)
        one = top["seq_data"][0]
        peak = one["feat_acts"][one["qualifying_token_index"]]
        assert peak == pytest.approx(feature["max_activation"], rel=1e-2, abs=1e-3)
        logits_V = model.model.lm_head(W_dec[feature["feature"]] * model.model.model.norm.weight)
        expected = (logits_V - logits_V.mean())[one["token_ids"]].tolist()
        assert one["token_logits"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parity
def test_saedashboards_own_code_reads_it_and_makes_a_page(for_saedashboard, tmp_path, monkeypatch, tokenizer):
    """Its package is put into a directory of its own, without what is here already: its pins conflict with ours."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    subprocess.run([*command, SAE_DASHBOARD, *ITS_PAGES_NEED], check=True)
    monkeypatch.syspath_prepend(tmp_path)
    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.sae_vis_data import SaeVisConfig, SaeVisData

    config = SaeVisConfig(hook_point="blocks.1.hook_resid_post", features=[])
    config.feature_centric_layout.seq_cfg.buffer = None
    data = SaeVisData.load_json(for_saedashboard, config, SimpleNamespace(tokenizer=tokenizer), None)
    data.save_json(tmp_path / "again.json")
    again, first = (
        json.loads(file.read_text())["feature_data_dict"] for file in (tmp_path / "again.json", for_saedashboard)
    )
    assert again.keys() == first.keys()
    for name in ("logits_table_data", "logits_histogram_data", "acts_histogram_data"):
        assert [each[name] for each in again.values()] == [each[name] for each in first.values()]
    save_feature_centric_vis(data, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert all(f'"{feature}": {{' in page for feature in first)
    assert "TOP ACTIVATIONS" in page


def test_an_export_without_a_tokenizer_is_refused(script, tiny_model, tmp_path):
    """The model is the tiny one without its tokenizer, and the text is token ids. Nothing is written."""
    without = tmp_path / "model"
    shutil.copytree(tiny_model, without, ignore=shutil.ignore_patterns("*token*", "vocab*", "merges*", "chat*"))
    rows_NT = np.random.default_rng(0).integers(5, 100, (20, CONTEXT))
    pq.write_table(pa.table({"input_ids": rows_NT.tolist()}), tmp_path / "rows.parquet")
    metadata = SAEMetadata(
        model_name=str(without), hook_name="blocks.1.hook_resid_post", context_size=CONTEXT, prepend_bos=False
    )
    TopKSAE(TopKSAEConfig(d_in=32, d_sae=64, k=4, metadata=metadata)).save_model(tmp_path / "sae")
    flags = ("--dataset", tmp_path / "rows.parquet", "--tokens", 500, "--device", "cpu", "--output", tmp_path / "out")
    done = script("inspect_sae_features.py", "--sae_path", tmp_path / "sae", *flags, "--export", "neuronpedia")
    assert (done.status, len(done.error_lines)) == (2, 1), done.stderr
    assert "--export neuronpedia: it shows tokens as text" in done.error_lines[0]
    assert not (tmp_path / "out").exists()


def test_a_hook_says_its_layer_or_none():
    assert layer_of("blocks.12.hook_resid_post") == 12
    assert layer_of("model.layers.3") == 3
    assert layer_of("model.embed_tokens") is None
