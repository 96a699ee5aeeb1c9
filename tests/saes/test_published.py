"""SAEs in the layouts of Gemma, Llama and Qwen Scope and Goodfire compute what SAELens and their publishers compute."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as saelens
from safetensors.torch import save_file

from sae_toolkit.errors import UserError
from sae_toolkit.saes.formats import load_sae_file
from sae_toolkit.saes.search import find_saes
from support.sae_files import ACTS, D, F, assert_agree, load, random_dictionary, save_dictionary

SHAPES = {"W_enc": [D, F], "W_dec": [F, D], "b_enc": [F], "b_dec": [D]}


def random_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return weights | {"threshold": 3 * torch.rand(F, generator=generator)}


def save_gemma_scope(directory: Path) -> Path:
    directory.mkdir(parents=True)
    np.savez(directory / "params.npz", **{name: tensor.numpy() for name, tensor in random_weights().items()})
    return directory


def save_gemma_scope_2(directory: Path, point: str = "model.layers.9.output", **changes: object) -> Path:
    directory.mkdir(parents=True)
    save_file({name.lower(): tensor for name, tensor in random_weights().items()}, directory / "params.safetensors")
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "hf_hook_point_in": point}
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


def as_linear(names: str) -> dict[str, torch.Tensor]:
    weights = random_weights()
    linear = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}
    return {
        theirs.replace(".", names): (weights[ours].mT if ours.startswith("W") else weights[ours]).contiguous()
        for theirs, ours in linear.items()
    }


def save_llama_scope(directory: Path, state: dict[str, torch.Tensor] | None = None, **changes: object) -> Path:
    (directory / "checkpoints").mkdir(parents=True)
    save_file(state or as_linear("."), directory / "checkpoints/final.safetensors")
    hyperparams = {
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.5,
        "d_model": D,
        "d_sae": F,
        "hook_point_in": "blocks.5.hook_mlp_out",
        "hook_point_out": "blocks.5.hook_mlp_out",
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 10.0, "out": 10.0},
        "sparsity_include_decoder_norm": False,
        "apply_decoder_bias_to_pre_encoder": False,
    }
    (directory / "hyperparams.json").write_text(json.dumps(hyperparams | changes))
    return directory


def by_saelens(monkeypatch, loader: Callable, root: Path, repository: str, folder: str, **overrides: object) -> SAE:
    """The SAE as SAELens's own loader reads it. Only the download is replaced, by files in `root`."""

    def from_root(repo_id: str, filename: str, subfolder: str | None = None, **_: object) -> str:
        return str(root / (subfolder or "") / filename)

    monkeypatch.setattr(saelens, "hf_hub_download", from_root)
    cfg, state, _ = loader(repository, folder, device="cpu", cfg_overrides={"d_in": D, "d_sae": F, **overrides})
    sae = SAE.from_dict(saelens.handle_config_defaulting(cfg))
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    return sae


def assert_same_sae(ours: SAE, theirs: SAE) -> None:
    features = theirs.encode(ACTS)
    assert 0.05 < (features > 0).double().mean() < 0.95
    assert_agree(ours.encode(ACTS), features)
    assert_agree(ours(ACTS), theirs(ACTS))
    for name in ("model_name", "hook_name"):
        assert ours.cfg.metadata[name] == theirs.cfg.metadata[name]


@pytest.mark.parametrize(
    ("repository", "folder", "hook"),
    [
        ("gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82", "blocks.12.hook_resid_post"),
        ("gemma-scope-9b-pt-mlp", "layer_3/width_131k/average_l0_10", "blocks.3.hook_mlp_out"),
        ("gemma-scope-9b-it-res", "layer_20/width_16k/average_l0_91", "blocks.20.hook_resid_post"),
        ("gemma-scope-27b-pt-att", "layer_0/width_16k/average_l0_104", "blocks.0.attn.hook_z"),
        ("gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", "hook_embed"),
    ],
)
def test_gemma_scope_is_read_as_saelens_reads_it(tmp_path, monkeypatch, repository, folder, hook):
    (file,) = find_saes([str(save_gemma_scope(tmp_path / repository / folder))])
    assert (file.library, file.form, file.name) == ("Gemma Scope", "jumprelu", Path(folder).name)
    sae = load_sae_file(file, "cpu")
    assert sae.cfg.metadata.hook_name == hook
    theirs = by_saelens(
        monkeypatch, saelens.gemma_2_sae_huggingface_loader, tmp_path / repository, f"google/{repository}", folder
    )
    theirs.turn_off_forward_pass_hook_z_reshaping()
    assert_same_sae(sae, theirs)


def test_gemma_scope_in_another_directory_does_not_guess_its_hook(tmp_path):
    metadata = load(save_gemma_scope(tmp_path / "layer_12/width_16k")).cfg.metadata
    assert (metadata.get("hook_name"), metadata.get("model_name")) == (None, None)


def test_one_layer_of_gemma_scope_is_chosen_by_its_number(tmp_path):
    root = tmp_path / "gemma-scope-2b-pt-res"
    for layer in (1, 11):
        save_gemma_scope(root / f"layer_{layer}/width_16k/average_l0_82")
    assert load(root, layer=1).cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert load(f"{root}:layer_11/width_16k/average_l0_82").cfg.metadata.hook_name == "blocks.11.hook_resid_post"


@pytest.mark.parametrize(
    ("point", "folder"),
    [
        ("model.layers.9.output", "resid_post/layer_9_width_16k_l0_small"),
        ("model.layers.9.self_attn.o_proj.input", "attn_out/layer_9_width_16k_l0_small"),
        ("model.layers.9.post_feedforward_layernorm.output", "mlp_out/layer_9_width_16k_l0_small"),
    ],
)
def test_gemma_scope_2_is_read_as_saelens_reads_it(tmp_path, monkeypatch, point, folder):
    sae = load(save_gemma_scope_2(tmp_path / folder, point))
    monkeypatch.setattr(saelens, "get_safetensors_tensor_shapes", lambda *_: {"w_enc": [D, F]})
    theirs = by_saelens(
        monkeypatch, saelens.gemma_3_sae_huggingface_loader, tmp_path, "google/gemma-scope-2-1b-pt", folder
    )
    assert_same_sae(sae, theirs)


def test_llama_scope_is_read_as_saelens_reads_it(tmp_path, monkeypatch):
    folder = "Llama3_1-8B-Base-L5M-8x"
    (file,) = find_saes([str(save_llama_scope(tmp_path / folder))])
    assert (file.library, file.form) == ("Llama Scope", "jumprelu")
    theirs = by_saelens(
        monkeypatch, saelens.llama_scope_sae_huggingface_loader, tmp_path, "fnlp/any", folder, dtype="float32"
    )
    theirs.fold_activation_norm_scaling_factor(D**0.5 / 10.0)  # as SAE.from_pretrained does
    assert_same_sae(load_sae_file(file, "cpu"), theirs)
    by_weights = find_saes([str(tmp_path / folder / "checkpoints/final.safetensors")])[0]
    assert by_weights.path == file.path


def test_llama_scope_compares_its_threshold_as_its_publisher_does(tmp_path):
    """By OpenMOSS's sae.py: folded to raw activations first, then JumpReLU on pre-activations times decoder norms."""
    state = as_linear(".")
    sae = load(save_llama_scope(tmp_path, state, sparsity_include_decoder_norm=True))
    s = {name: tensor.double() for name, tensor in state.items()}
    scale = D**0.5 / 10.0
    pre = ACTS.double() @ s["encoder.weight"].T + s["encoder.bias"] / scale
    features = pre * (pre * s["decoder.weight"].norm(dim=0) > 0.5)
    assert 0.05 < (features > 0).double().mean() < 0.95
    assert_agree(sae.encode(ACTS), features * scale)
    assert_agree(sae(ACTS), features @ s["decoder.weight"].T + s["decoder.bias"] / scale)


@pytest.mark.parametrize(
    ("model", "layer", "suffix"), [("Llama-3.1-8B-Instruct", 19, "pth"), ("Llama-3.3-70B-Instruct", 50, "pt")]
)
@pytest.mark.parametrize("by_directory", [False, True])
def test_a_file_of_goodfire_is_read_as_saelens_reads_it(tmp_path, monkeypatch, model, layer, suffix, by_directory):
    repository = f"{model}-SAE-l{layer}"
    path = tmp_path / f"{repository}.{suffix}"
    torch.save(as_linear("_linear."), path)
    (file,) = find_saes([str(tmp_path if by_directory else path)])
    assert (file.library, file.form, file.name) == ("Goodfire", "standard", path.name)
    loader = saelens.get_goodfire_huggingface_loader
    theirs = by_saelens(monkeypatch, loader, tmp_path, f"Goodfire/{repository}", path.name)
    assert_same_sae(load_sae_file(file, "cpu"), theirs)


def test_qwen_scope_is_read_as_saelens_reads_it(tmp_path, monkeypatch):
    repository = "SAE-Res-Qwen3-1.7B-Base-W32K-L0_6"
    (tmp_path / repository).mkdir()
    state = {name: tensor.mT.contiguous() if tensor.ndim == 2 else tensor for name, tensor in random_weights().items()}
    for layer in (1, 11):
        torch.save(state, tmp_path / repository / f"layer{layer}.sae.pt")
    (file,) = find_saes([str(tmp_path / repository)], layer=11)
    assert (file.library, file.form, file.name) == ("Qwen Scope", "topk", "layer11.sae.pt")
    loader = saelens.qwen_scope_sae_huggingface_loader
    theirs = by_saelens(monkeypatch, loader, tmp_path / repository, f"Qwen/{repository}", "layer11.sae.pt")
    sae = load_sae_file(file, "cpu")
    assert_same_sae(sae, theirs)
    assert (sae.encode(ACTS) > 0).sum(1).max() == 6

    elsewhere = tmp_path / "layer11.sae.pt"
    torch.save(state, elsewhere)
    with pytest.raises(UserError, match=f"^--sae_path {elsewhere}: k is said by the publisher's name"):
        load(elsewhere)


def test_checkpoints_of_a_dictionary_are_read_with_the_config_above_them(tmp_path):
    trainer = save_dictionary(tmp_path / "trainer_0", "AutoEncoder", random_dictionary("AutoEncoder"))
    (trainer / "checkpoints").mkdir()
    for step in (0, 500, 1000):
        state = random_dictionary("AutoEncoder")
        state["bias"] += step
        torch.save(state, trainer / f"checkpoints/ae_{step}.pt")
    at_1000 = trainer / "checkpoints/ae_1000.pt"
    (file,) = find_saes([str(at_1000)])
    assert (file.library, file.form, file.name) == ("dictionary_learning", "AutoEncoder", "ae_1000.pt")
    assert torch.equal(load_sae_file(file, "cpu").b_dec, random_dictionary("AutoEncoder")["bias"] + 1000)
    assert load(at_1000).cfg.metadata.hook_name == "blocks.4.hook_resid_post"
    in_order = ["ae_0.pt", "ae_500.pt", "ae_1000.pt"]
    assert [found.name for found in find_saes([str(trainer / "checkpoints")])] == in_order
    assert [found.name for found in find_saes([str(tmp_path / "*/checkpoints/*")])] == in_order
    assert [found.path for found in find_saes([str(tmp_path)])] == [trainer]  # the finished one alone
    assert [found.path for found in find_saes([str(trainer / "ae.pt")])] == [trainer]
    (trainer / "ae.pt").unlink()
    assert [found.name for found in find_saes([str(trainer)])] == in_order


def test_what_is_damaged_or_no_autoencoder_is_refused(tmp_path):
    refused = {
        save_gemma_scope(tmp_path / "gemma-scope-2b-pt-transcoders/layer_3/width_16k"): "a transcoder of Gemma Scope",
        save_gemma_scope_2(tmp_path / "a", architecture="topk"): "its architecture is 'topk', and must be 'jump_relu'",
        save_gemma_scope_2(tmp_path / "b", hf_hook_point_out="x"): "a transcoder from model.layers.9.output to x",
        save_llama_scope(tmp_path / "c", hook_point_out="x"): "a transcoder from blocks.5.hook_mlp_out to x",
        save_llama_scope(tmp_path / "d", act_fn="topk"): "hyperparams.json has act_fn 'topk'; only jumprelu",
        save_llama_scope(tmp_path / "e", norm_activation="token-wise"): "norm_activation 'token-wise'; only dataset",
        save_llama_scope(tmp_path / "f", jump_relu_threshold=None): "jump_relu_threshold None, and it must be a number",
        save_llama_scope(tmp_path / "g", dataset_average_activation_norm={}): "norm.in None, and it must be a number",
        save_llama_scope(tmp_path / "l", d_model=D + 1): f"d_model in hyperparams.json is {D + 1}, W_dec's is {D}",
        save_llama_scope(tmp_path / "h", use_glu_encoder=True): "use_glu_encoder, which no SAE of Llama Scope has",
    }
    for directory, says in refused.items():
        with pytest.raises(UserError, match=f"^--sae_path {directory}: .*{says}") as error:
            load(directory)
        assert "\n" not in str(error.value)
    for directory, name in (
        (save_gemma_scope(tmp_path / "i"), "params.npz"),
        (save_gemma_scope_2(tmp_path / "j"), "params.safetensors"),
        (save_llama_scope(tmp_path / "k"), "checkpoints/final.safetensors"),
    ):
        weights = directory / name
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
        with pytest.raises(UserError, match=f"^--sae_path {directory}: {weights.name} is damaged: "):
            load(directory)


def test_published_pickles_are_not_opened(tmp_path):
    opened = tmp_path / "opened"

    class Payload:
        def __reduce__(self):
            return Path.touch, (opened,)

    (tmp_path / "gemma").mkdir()
    np.savez(tmp_path / "gemma/params.npz", W_enc=np.array([Payload()], dtype=object))
    goodfire = tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    goodfire.write_bytes(pickle.dumps(Payload(), protocol=2))
    for path, says in ((tmp_path / "gemma", "params.npz holds a pickle"), (goodfire, "a pickle of more than tensors")):
        with pytest.raises(UserError, match=says):
            load(path)
    assert not opened.exists()


def test_a_directory_without_an_sae_says_which_files_each_layout_has(tmp_path):
    with pytest.raises(UserError) as error:
        find_saes([str(tmp_path)])
    for files in (
        "cfg.json + sae_weights.safetensors (SAELens)",
        "cfg.json + sae.safetensors (sparsify)",
        "config.json + ae.pt (dictionary_learning)",
        "config.json + checkpoints/ae_STEP.pt (dictionary_learning, in training)",
        "params.npz (Gemma Scope)",
        "config.json + params.safetensors (Gemma Scope 2)",
        "hyperparams.json + checkpoints/final.safetensors (Llama Scope)",
        "layerN.sae.pt (Qwen Scope)",
        "MODEL-SAE-lN.pth (Goodfire)",
    ):
        assert files in str(error.value)
