"""dictionary_learning's SAEs compute what the library computes, and are read as tensors only."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sae_toolkit.errors import UserError
from sae_toolkit.saes.formats import load_sae_file
from sae_toolkit.saes.search import find_saes
from support.processes import ROOT, run_process
from support.sae_files import ACTS, D, F, K, assert_agree, load, random_dictionary, save_dictionary


def by_formula(dict_class: str, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and reconstruction in float64, by the library's definitions."""
    s = {name: tensor.double() for name, tensor in state.items()}
    x = ACTS.double()
    W_enc = s["encoder.weight"].T if "encoder.weight" in s else s["W_enc"]
    W_dec = s["decoder.weight"].T if "decoder.weight" in s else s["W_dec"]
    if dict_class == "AutoEncoder":
        f = ((x - s["bias"]) @ W_enc + s["encoder.bias"]).relu()
        return f * W_dec.norm(dim=1), f @ W_dec + s["bias"]  # load_dictionary makes the decoder's norms 1
    if dict_class == "AutoEncoderNew":
        f = (x @ W_enc + s["encoder.bias"]).relu()
        return f, f @ W_dec + s["decoder.bias"]
    if dict_class == "GatedAutoEncoder":
        pre = (x - s["decoder_bias"]) @ W_enc
        f = (pre + s["gate_bias"] > 0) * (s["r_mag"].exp() * pre + s["mag_bias"]).relu()
        return f, f @ W_dec + s["decoder_bias"]
    if dict_class == "JumpReluAutoEncoder":
        pre = x @ W_enc + s["b_enc"]
        f = (pre * (pre > s["threshold"])).relu()
        return f, f @ W_dec + s["b_dec"]
    b_enc = s["encoder.bias"] if "encoder.bias" in s else s["b_enc"]
    f = ((x - s["b_dec"]) @ W_enc + b_enc).relu()
    if dict_class == "AutoEncoderTopK":
        top = f.topk(K)
        f = torch.zeros_like(f).scatter(1, top.indices, top.values)
    else:
        f = f * (f > s["threshold"])
    return f, f @ W_dec + s["b_dec"]


DICT_CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
)


@pytest.mark.parametrize("dict_class", DICT_CLASSES)
def test_a_dictionary_computes_its_formula(tmp_path, dict_class):
    state = random_dictionary(dict_class)
    (file,) = find_saes([str(save_dictionary(tmp_path, dict_class, state))])
    assert (file.library, file.form) == ("dictionary_learning", dict_class)
    sae = load_sae_file(file, "cpu")
    features, reconstruction = by_formula(dict_class, state)
    assert 0 < (features > 0).double().mean() < 1
    assert_agree(sae.encode(ACTS), features)
    assert_agree(sae(ACTS), reconstruction)
    metadata = sae.cfg.metadata
    assert (metadata.model_name, metadata.hook_name, metadata.context_size) == (
        "owner/model",
        "blocks.4.hook_resid_post",
        64,
    )


@pytest.mark.parametrize(
    ("submodule_name", "hook"),
    [
        ("resid_post_layer_4", "blocks.4.hook_resid_post"),
        ("model.layers.4", "blocks.4.hook_resid_post"),
        ("model.layers.4.mlp", "model.layers.4.mlp"),
        ("attn_out_layer_4", "blocks.4.hook_attn_out"),
        ("something else", "something else"),
    ],
)
def test_the_submodule_of_a_dictionary_is_its_hook(tmp_path, submodule_name, hook):
    state = random_dictionary("AutoEncoder")
    sae = load(save_dictionary(tmp_path, "AutoEncoder", state, submodule_name=submodule_name))
    assert sae.cfg.metadata.hook_name == hook


def test_a_pickle_of_more_than_tensors_is_not_opened(tmp_path):
    opened = tmp_path / "opened"

    class Payload:
        def __reduce__(self):
            return Path.touch, (opened,)

    save_dictionary(tmp_path, "AutoEncoder", random_dictionary("AutoEncoder") | {"payload": Payload()})
    with pytest.raises(UserError, match=r"ae\.pt is a pickle of more than tensors, which could run any code"):
        load(tmp_path)
    (tmp_path / "ae.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(UserError, match=r"ae\.pt is a pickle of more than tensors"):
        load(tmp_path)
    assert not opened.exists()


@pytest.mark.parametrize(
    ("dict_class", "changes", "trainer", "says"),
    [
        (
            "BatchTopKSAE",
            {"threshold": torch.tensor(-1.0)},
            {"threshold_start_step": 1000},
            "the threshold of this BatchTopKSAE was never set: its training ended before threshold_start_step 1000",
        ),
        ("AutoEncoderTopK", {"k": torch.tensor(F + 1)}, {}, f"k is {F + 1}, and must be 1 to the {F} features"),
        ("AutoEncoder", {}, {"dict_class": "IdentityDict"}, "dict_class 'IdentityDict' in config.json; known are Auto"),
        ("AutoEncoder", {"bias": torch.zeros(D + 1)}, {}, rf"b_dec has shape \[{D + 1}\], and must have \[{D}\]"),
        ("GatedAutoEncoder", {"decoder.weight": torch.zeros(D)}, {}, "W_dec has shape"),
        ("JumpReluAutoEncoder", {"W_enc": torch.zeros(F, D)}, {}, "W_enc has shape"),
        ("AutoEncoder", {"encoder.bias": torch.full([F], torch.nan)}, {}, f"{F} of the {F} numbers of b_enc are NaN"),
        ("AutoEncoderTopK", {"b_dec": "text"}, {}, "is not a state dict of tensors"),
    ],
)
def test_a_dictionary_that_cannot_be_used_is_refused(tmp_path, dict_class, changes, trainer, says):
    save_dictionary(tmp_path, dict_class, random_dictionary(dict_class) | changes, **trainer)
    with pytest.raises(UserError, match=says):
        load(tmp_path)


@pytest.fixture(scope="session")
def dictionary_learning_python() -> Path:
    """The Python of an environment with dictionary_learning, which is created if it is missing."""
    environment = ROOT / ".venv-dictionary-learning"
    python = environment / "bin" / "python"
    complete = environment / "complete"
    if not complete.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        (environment / ".gitignore").write_text("*\n")
        requirements = ROOT / "requirements/dictionary-learning.txt"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--requirement", requirements], check=True)
        complete.touch()
    return python


@pytest.mark.parity
def test_what_dictionary_learning_trains_computes_the_same_here(dictionary_learning_python, tmp_path):
    rng = np.random.default_rng(0)
    codes = (rng.random((2048, 40)) < 0.15) * rng.random((2048, 40)) * 4
    acts = (codes @ rng.standard_normal((40, 24)) + 2 * rng.standard_normal(24)).astype(np.float32)
    np.save(tmp_path / "acts.npy", acts)
    script = ROOT / "tests/support/write_dictionary_learning_saes.py"
    done = run_process(dictionary_learning_python, script, tmp_path / "saes", tmp_path / "acts.npy", timeout=900)
    assert done.status == 0, done.stderr[-2000:]

    files = {file.path.parent.name: file for file in find_saes([str(tmp_path / "saes/*/trainer_0")])}
    assert {kind: file.form for kind, file in files.items()} == {
        "standard": "AutoEncoder",
        "standard_april": "AutoEncoder",
        "gated": "GatedAutoEncoder",
        "jumprelu": "JumpReluAutoEncoder",
        "topk": "AutoEncoderTopK",
        "batchtopk": "BatchTopKSAE",
        "batchtopk_no_threshold": "BatchTopKSAE",
        "matryoshka": "MatryoshkaBatchTopKSAE",
    }
    with pytest.raises(UserError, match="the threshold of this BatchTopKSAE was never set"):
        load_sae_file(files.pop("batchtopk_no_threshold"), "cpu")
    x = torch.from_numpy(acts)
    for file in files.values():
        sae = load_sae_file(file, "cpu")
        expected = load_file(file.path / "expected.safetensors")
        assert_agree(sae.encode(x[:64]), expected["features"])
        assert_agree(sae(x[:64]), expected["reconstruction"])
        theirs = json.loads((file.path / "evaluation.json").read_text())
        with torch.no_grad():
            l0 = (sae.encode(x) > 0).float().sum(1).mean().item()
            explained = 1 - ((x - sae(x)).var(0).sum() / x.var(0).sum()).item()
        assert l0 == pytest.approx(theirs["l0"], rel=1e-5)
        assert explained == pytest.approx(theirs["frac_variance_explained"], abs=1e-5)
