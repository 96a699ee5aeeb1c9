"""SAEs of random weights, saved as each library saves them, and how they are compared."""

import json
from pathlib import Path

import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig

from sae_toolkit.saes.formats import load_sae_file
from sae_toolkit.saes.search import find_saes

D, F, K = 16, 48, 6
ACTS = 3 * torch.randn(50, D, generator=torch.Generator().manual_seed(0)) + 1


def load(*names: object, layer: int | None = None) -> SAE:
    (file,) = find_saes([str(name) for name in names], layer=layer)
    return load_sae_file(file, "cpu")


def assert_agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """To 1e-5 of the largest value."""
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error < 1e-5, error


def save_saelens(directory: Path) -> Path:
    StandardSAE(StandardSAEConfig(d_in=D, d_sae=F)).save_model(directory)
    return directory


def random_sparse_coder(sparsify, directory: Path, **config):
    torch.manual_seed(1)
    coder = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=F, k=K, **config))
    with torch.no_grad():
        coder.encoder.bias.normal_()
        coder.b_dec.normal_()
        coder.W_dec.normal_()
    coder.save_to_disk(directory)
    return coder


def assert_agrees_with_sparsify(sae: SAE, coder, acts: torch.Tensor) -> None:
    with torch.no_grad():
        theirs = coder(acts)
        features = torch.zeros(len(acts), coder.num_latents).scatter(1, theirs.latent_indices, theirs.latent_acts)
        assert_agree(sae.encode(acts), features)
        assert_agree(sae(acts), theirs.sae_out)


def random_dictionary(dict_class: str) -> dict[str, torch.Tensor]:
    """A state dict as dictionary_learning 0.1.0 saves it, of random weights."""
    shapes = {
        "AutoEncoder": {"bias": [D], "encoder.weight": [F, D], "encoder.bias": [F], "decoder.weight": [D, F]},
        "AutoEncoderNew": {
            "encoder.weight": [F, D],
            "encoder.bias": [F],
            "decoder.weight": [D, F],
            "decoder.bias": [D],
        },
        "GatedAutoEncoder": {
            "decoder_bias": [D],
            "r_mag": [F],
            "gate_bias": [F],
            "mag_bias": [F],
            "encoder.weight": [F, D],
            "decoder.weight": [D, F],
        },
        "AutoEncoderTopK": {"b_dec": [D], "decoder.weight": [D, F], "encoder.weight": [F, D], "encoder.bias": [F]},
        "MatryoshkaBatchTopKSAE": {"W_enc": [D, F], "b_enc": [F], "W_dec": [F, D], "b_dec": [D]},
        "JumpReluAutoEncoder": {"W_enc": [D, F], "b_enc": [F], "W_dec": [F, D], "b_dec": [D], "threshold": [F]},
    }
    shapes["BatchTopKSAE"] = shapes["AutoEncoderTopK"]
    generator = torch.Generator().manual_seed(2)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes[dict_class].items()}
    if "TopK" in dict_class:
        state |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(2.5)}
    if dict_class == "MatryoshkaBatchTopKSAE":
        state["group_sizes"] = torch.tensor([F // 4, F - F // 4])
    return state


def save_dictionary(directory: Path, kind: str, state: object, **trainer: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(state, directory / "ae.pt")
    trainer = {"dict_class": kind, "k": K, "layer": 4, "lm_name": "owner/model"} | trainer
    (directory / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": "out", "ctx_len": 64}}))
    return directory
