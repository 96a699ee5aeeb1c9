"""--export neuronpedia writes what SAEDashboard's own classes read, with the numbers of features.parquet."""

import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata

from sae_toolkit.inspection.neuronpedia import export_neuronpedia, layer_of
from support.inspection import CONTEXT

SAE_DASHBOARD = "sae-dashboard==0.8.0"


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
    done = script("inspect_sae_features.py", *flags, "--no_page", "--export", "neuronpedia")
    assert done.status == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "features.parquet"), str(tmp_path / "neuronpedia")]
    done = script("inspect_sae_features.py", *flags)  # the export was of other examples than the page that comes now
    assert done.status == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"features.parquet", "features.html", "features_data"}


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
