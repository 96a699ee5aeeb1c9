"""sparsify's SAEs are found by their hookpoints and compute what sparsify computes."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from sae_toolkit.errors import UserError
from sae_toolkit.saes.foreign import hook_of_hookpoint
from sae_toolkit.saes.formats import load_sae_file
from sae_toolkit.saes.search import find_saes
from support.sae_files import ACTS, F, K, assert_agrees_with_sparsify, load, random_sparse_coder


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_a_sparsify_sae_computes_what_sparsify_computes(sparsify, tmp_path, activation):
    coder = random_sparse_coder(sparsify, tmp_path / "layers.3", activation=activation)
    (file,) = find_saes([str(tmp_path / "layers.3")])
    assert (file.name, file.library, file.form) == ("layers.3", "sparsify", f"SparseCoder, {activation}")
    sae = load_sae_file(file, "cpu")
    assert_agrees_with_sparsify(sae, coder, ACTS)
    assert (sae.encode(ACTS) > 0).sum(1).max() == K
    assert torch.equal(sae.W_dec, coder.W_dec)
    assert sae.cfg.metadata.hook_name == "blocks.3.hook_resid_post"


def test_a_sparsify_sae_in_bfloat16_loads_in_float32(sparsify, tmp_path):
    coder = random_sparse_coder(sparsify, tmp_path).bfloat16()
    coder.save_to_disk(tmp_path)
    sae = load(tmp_path)
    assert {tensor.dtype for tensor in sae.state_dict().values()} == {torch.float32}
    assert_agrees_with_sparsify(sae, coder.float(), ACTS)


@pytest.fixture(scope="session")
def sparsify_run(sparsify, tiny_model, tmp_path_factory) -> Path:
    """Two SAEs of the tiny model, trained by sparsify's own Trainer for 8 steps."""
    from sparsify.__main__ import RunConfig

    save_dir = tmp_path_factory.mktemp("sparsify")
    tokens = torch.randint(3, 1000, (32, 32), generator=torch.Generator().manual_seed(0))
    config = RunConfig(
        sparsify.SparseCoderConfig(expansion_factor=4, k=8),
        model=str(tiny_model),
        dataset="owner/text",
        ctx_len=32,
        batch_size=4,
        hookpoints=["layers.1", "layers.2.mlp"],
        exclude_tokens=[0, 1],
        optimizer="adam",
        lr=1e-3,
        lr_warmup_steps=1,
        log_to_wandb=False,
        save_dir=str(save_dir),
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    sparsify.Trainer(config, Dataset.from_dict({"input_ids": tokens}).with_format("torch"), model).fit()
    return save_dir / "unnamed"


def test_what_sparsify_trains_is_found_by_its_hookpoint_and_says_what_it_is_of(sparsify, sparsify_run, tiny_model):
    acts = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    at_layer = load(sparsify_run, layer=1)
    at_mlp = load(f"{sparsify_run}:layers.2.mlp")
    for sae, hookpoint in ((at_layer, "layers.1"), (at_mlp, "layers.2.mlp")):
        coder = sparsify.SparseCoder.load_from_disk(sparsify_run / hookpoint)
        assert not torch.equal(coder.W_dec, coder.encoder.weight)  # it did train
        assert_agrees_with_sparsify(sae, coder, acts)
        metadata = sae.cfg.metadata
        assert (metadata.model_name, metadata.dataset_path) == (str(tiny_model), "owner/text")
        assert (metadata.context_size, metadata.exclude_special_tokens) == (32, [0, 1])
    assert at_layer.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert at_mlp.cfg.metadata.hook_name == "layers.2.mlp"


def test_which_of_several_hookpoints_must_be_said(sparsify_run):
    holds = r"holds 2 SAEs: layers\.1, layers\.2\.mlp; "
    with pytest.raises(UserError, match=holds + "name one, as in .*unnamed:layers.1$"):
        find_saes([str(sparsify_run)])
    with pytest.raises(UserError, match=holds + r"no layers\.7 among them; "):
        find_saes([f"{sparsify_run}:layers.7"])
    with pytest.raises(UserError, match=holds + r"not exactly one of them is for layers\.2; "):
        find_saes([str(sparsify_run)], layer=2)


def test_hookpoints_of_layers_are_named_as_transformerlens_names_them_and_others_stay_module_paths():
    hooks = {
        "layers.12": "blocks.12.hook_resid_post",
        "h.3": "blocks.3.hook_resid_post",
        "model.layers.5": "blocks.5.hook_resid_post",
        **{path: path for path in ("layers.1.mlp", "layers.12.self_attn", "h.1.mlp.act", "h.3.attn", "embed_tokens")},
    }
    assert {hookpoint: hook_of_hookpoint(hookpoint) for hookpoint in hooks} == hooks


@pytest.mark.parametrize("hookpoint", ["layers.1.mlp", "h.1.mlp.act", "embed_tokens"])
def test_the_hookpoint_of_a_directory_is_its_hook(sparsify, tmp_path, hookpoint):
    random_sparse_coder(sparsify, tmp_path / hookpoint / "seed0")
    assert load(tmp_path / hookpoint / "seed0").cfg.metadata.hook_name == hookpoint


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"transcode": True}, r"a transcoder \(transcode in cfg.json\)"),
        ({"skip_connection": True}, r"a transcoder \(skip_connection in cfg.json\)"),
        ({"signed": True}, "a signed SAE of an old sparsify"),
        ({"activation": "gelu"}, "activation 'gelu' in cfg.json; known are topk and groupmax"),
        ({"k": F + 1}, f"k is {F + 1}, and must be 1 to the {F} features"),
        ({"k": 5, "activation": "groupmax"}, f"groupmax of k 5 .* does not divide the {F} features"),
        ({"a_field_of_another_version": 1, "signed": False}, None),
    ],
)
def test_of_sparsify_configurations_what_is_no_autoencoder_is_refused(sparsify, tmp_path, changes, says):
    coder = random_sparse_coder(sparsify, tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | changes))
    if says is None:
        assert_agrees_with_sparsify(load(tmp_path), coder, ACTS)
    else:
        with pytest.raises(UserError, match=f"^--sae_path {tmp_path}: {says}"):
            load(tmp_path)
