"""Loads SAEs of sparsify and dictionary_learning as SAELens inference SAEs with the same features and reconstruction.

The formulas are those of sparsify 1.3.3 (sparse_coder.py, fused_encoder.py) and dictionary_learning 0.1.0
(dictionary.py, trainers/top_k.py, trainers/batch_top_k.py, trainers/matryoshka_batch_top_k.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    SAE,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.saes.weights import build_sae, check_k, named_weights, read_json, read_state_dict

SPARSIFY_FILES = ("cfg.json", "sae.safetensors")
DICTIONARY_LEARNING_FILES = ("config.json", "ae.pt")

# SAELens's name -> the name in ae.pt. A `.weight` is an nn.Linear's, [outputs, inputs]. SAELens's is its transpose.
_LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}
_TOP_K = _LINEAR | {"b_enc": "encoder.bias", "b_dec": "b_dec"}
_PLAIN = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
_TENSORS = {
    "AutoEncoder": _LINEAR | {"b_enc": "encoder.bias", "b_dec": "bias"},
    "AutoEncoderNew": _LINEAR | {"b_enc": "encoder.bias", "b_dec": "decoder.bias"},
    "GatedAutoEncoder": _LINEAR
    | {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag", "b_dec": "decoder_bias"},
    "AutoEncoderTopK": _TOP_K,
    "BatchTopKSAE": _TOP_K | {"threshold": "threshold"},
    "MatryoshkaBatchTopKSAE": _PLAIN | {"threshold": "threshold"},
    "JumpReluAutoEncoder": _PLAIN | {"threshold": "threshold"},
}
_UNCENTRED = {"AutoEncoderNew", "JumpReluAutoEncoder"}  # these do not subtract b_dec before encoding
# These have one threshold for all features. SAELens trains them under these names, and saves them as jumprelu too.
_ONE_THRESHOLD = {"BatchTopKSAE": "batchtopk", "MatryoshkaBatchTopKSAE": "matryoshka_batchtopk"}

_LAYER = r"(?:.+\.)?(?:layers|h|blocks)\.(\d+)"  # the module path of a decoder layer


class _GroupMax(nn.Module):
    """Keeps the largest of each of k groups of neighbouring features after ReLU, and sets the others to 0."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, hidden_pre: torch.Tensor) -> torch.Tensor:
        grouped = hidden_pre.relu().unflatten(-1, (self.k, -1))
        values, indices = grouped.max(dim=-1, keepdim=True)
        return torch.zeros_like(grouped).scatter(-1, indices, values).flatten(-2)


@dataclass
class GroupMaxSAEConfig(TopKSAEConfig):
    @classmethod
    def architecture(cls) -> str:
        return "groupmax"


class GroupMaxSAE(TopKSAE):
    """sparsify's `groupmax`: the features form k groups of equal size, and the largest of each group is kept."""

    def get_activation_fn(self) -> nn.Module:
        return _GroupMax(self.cfg.k)


def hook_of_hookpoint(hookpoint: str) -> str:
    """Returns TransformerLens's name for the output of a decoder layer (`layers.12`); other module paths unchanged.

    The output of a module within a layer can differ from what TransformerLens names alike. In Gemma 2, `hook_mlp_out`
    lies after a norm that follows the module `mlp`.
    """
    layer = re.fullmatch(_LAYER, hookpoint)
    return hookpoint if layer is None else f"blocks.{layer[1]}.hook_resid_post"


def sparsify_form(directory: Path, where: str) -> str:
    """Returns the kind of a sparsify SAE, as tables show it."""
    return f"SparseCoder, {read_json(directory / 'cfg.json', where).get('activation', 'topk')}"


def dictionary_learning_form(path: Path, where: str) -> str:
    """Returns the class of a dictionary_learning dictionary, or of a checkpoint of its training."""
    config_file, _ = _dictionary_files(path)
    return str(_trainer_config(read_json(config_file, where), where)["dict_class"])


def is_dictionary_checkpoint(path: Path) -> bool:
    """Returns whether a path is that of a dictionary during its training: `trainer_0/checkpoints/ae_1000.pt`."""
    in_checkpoints = path.parent.name == "checkpoints" and re.fullmatch(r"ae_\d+\.pt", path.name) is not None
    return in_checkpoints and path.is_file() and _dictionary_files(path)[0].is_file()


def _dictionary_files(path: Path) -> tuple[Path, Path]:
    """Returns `config.json` and the weights of a dictionary. They are beside each other, except for checkpoints."""
    return (path / "config.json", path / "ae.pt") if path.is_dir() else (path.parents[1] / "config.json", path)


def load_sparsify(directory: Path, device: str, where: str) -> SAE[Any]:
    """Loads a sparsify `SparseCoder`.

    Args:
        directory: holds `cfg.json` and `sae.safetensors`. Its name is the hookpoint. The `config.json` that sparsify's
            trainer writes in the directory above names the model and the text.
        device: where to put the SAE.
        where: the flag and its value, for messages.

    Raises:
        UserError: the SAE is damaged, or is not an autoencoder of one activation.
    """
    cfg = read_json(directory / "cfg.json", where)
    for field in ("transcode", "skip_connection"):
        if cfg.get(field):
            raise UserError(f"{where}: a transcoder ({field} in cfg.json), not an autoencoder of one activation")
    if cfg.get("signed"):
        raise UserError(f"{where}: a signed SAE of an old sparsify (cfg.json), which sparsify no longer reads")
    activation = cfg.get("activation", "topk")
    if activation not in ("topk", "groupmax"):
        raise UserError(f"{where}: activation {activation!r} in cfg.json; known are topk and groupmax")
    try:
        tensors = load_file(directory / "sae.safetensors", device=device)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where}: sae.safetensors is damaged: {one_line(error)}; download it again") from error
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
    weights = named_weights(tensors, names, where)
    n_features = len(weights["b_enc"])
    k = check_k(cfg.get("k", 32), n_features, where)
    if activation == "groupmax" and n_features % k:
        raise UserError(f"{where}: groupmax of k {k} (cfg.json) does not divide the {n_features} features")
    sae_class, cfg_class = (TopKSAE, TopKSAEConfig) if activation == "topk" else (GroupMaxSAE, GroupMaxSAEConfig)
    return build_sae(sae_class, cfg_class, weights, device, where, metadata=_sparsify_metadata(directory, where), k=k)


def load_dictionary_learning(path: Path, device: str, where: str) -> SAE[Any]:
    """Loads a dictionary_learning dictionary in inference form, as the library's `load_dictionary` does.

    Args:
        path: a directory with `config.json` and `ae.pt`, a state dict; or a checkpoint,
            `trainer_0/checkpoints/ae_1000.pt`, with `config.json` in `trainer_0`.
        device: where to put the SAE.
        where: the flag and its value, for messages.

    Raises:
        UserError: the dictionary is damaged, is of an unknown kind, is a pickle of more than tensors, or lacks the
            threshold that it needs.
    """
    config_file, weights_file = _dictionary_files(path)
    config = read_json(config_file, where)
    trainer = _trainer_config(config, where)
    dict_class = trainer["dict_class"]
    if dict_class not in _TENSORS:
        raise UserError(f"{where}: dict_class {dict_class!r} in config.json; known are {', '.join(_TENSORS)}")
    tensors = read_state_dict(weights_file, device, where)
    weights = named_weights(tensors, _TENSORS[dict_class], where)
    metadata = _dictionary_learning_metadata(config, trainer, where)
    apply_b_dec_to_input = dict_class not in _UNCENTRED
    options: dict[str, Any] = {"metadata": metadata, "apply_b_dec_to_input": apply_b_dec_to_input}
    if dict_class == "GatedAutoEncoder":
        return build_sae(GatedSAE, GatedSAEConfig, weights, device, where, **options)
    if dict_class == "AutoEncoderTopK":
        k = check_k(tensors.get("k", trainer.get("k")), len(weights["b_enc"]), where)
        return build_sae(TopKSAE, TopKSAEConfig, weights, device, where, k=k, **options)
    if dict_class in _ONE_THRESHOLD:
        threshold = weights["threshold"]
        if threshold.ndim == 0 and threshold < 0:
            raise UserError(
                f"{where}: the threshold of this {dict_class} was never set: its training ended before"
                f" threshold_start_step {trainer.get('threshold_start_step')} (config.json); train it longer"
            )
        weights["threshold"] = threshold.expand(len(weights["b_enc"]))
        metadata.training_architecture = _ONE_THRESHOLD[dict_class]
        metadata.training_architecture_details = _batchtopk_details(tensors, trainer)
    if "threshold" in weights:
        return build_sae(JumpReLUSAE, JumpReLUSAEConfig, weights, device, where, **options)
    if dict_class == "AutoEncoder":
        _normalize_decoder(weights)
    return build_sae(StandardSAE, StandardSAEConfig, weights, device, where, **options)


def _batchtopk_details(tensors: Mapping[str, torch.Tensor], trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a BatchTopK dictionary's training that are known, by SAELens's names."""
    details: dict[str, Any] = {}
    if isinstance(k := trainer.get("k"), int):
        details["k"] = k
    if (sizes := tensors.get("group_sizes")) is not None:
        details["matryoshka_widths"] = sizes.cumsum(0).tolist()
    return details


def _trainer_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    trainer = config.get("trainer")
    if not isinstance(trainer, dict) or "dict_class" not in trainer:
        raise UserError(f"{where}: config.json is not dictionary_learning's: no trainer.dict_class in it")
    return trainer


def _normalize_decoder(weights: dict[str, torch.Tensor]) -> None:
    """Moves the norms of the decoder's rows into the encoder, in place. The reconstruction stays the same."""
    norms_F = weights["W_dec"].norm(dim=-1)
    norms_F = norms_F.where(norms_F > 0, 1.0)
    if torch.allclose(norms_F, torch.ones_like(norms_F)):
        return
    weights["W_dec"] = weights["W_dec"] / norms_F[:, None]
    weights["W_enc"] = weights["W_enc"] * norms_F
    weights["b_enc"] = weights["b_enc"] * norms_F


def _sparsify_metadata(directory: Path, where: str) -> SAEMetadata:
    """Returns the model, hook and text from sparsify's files. sparsify separates documents by EOS (data.py)."""
    # A hookpoint's directory may hold one directory for each random seed.
    hookpoint = directory.parent if directory.name.startswith("seed") else directory
    metadata = SAEMetadata(hook_name=hook_of_hookpoint(hookpoint.name), sequence_separator_token="eos")
    config_file = hookpoint.parent / "config.json"
    run = read_json(config_file, where) if config_file.is_file() else {}
    fields = {
        "model_name": "model",
        "dataset_path": "dataset",
        "text_column": "text_column",
        "context_size": "ctx_len",
        "exclude_special_tokens": "exclude_tokens",
    }
    return _fill(metadata, fields, run)


def _dictionary_learning_metadata(config: Mapping[str, Any], trainer: Mapping[str, Any], where: str) -> SAEMetadata:
    buffer = config.get("buffer") or {}
    io = buffer.get("io", "out")
    if io == "in_and_out":
        raise UserError(f"{where}: a transcoder (buffer.io in config.json), not an autoencoder of one activation")
    metadata = SAEMetadata()
    if trainer.get("layer") is not None:
        metadata.hook_name = _hook_of_submodule(trainer["layer"], trainer.get("submodule_name"), io)
    if buffer.get("remove_bos"):
        metadata.seqpos_slice = [1, None]
    return _fill(_fill(metadata, {"model_name": "lm_name"}, trainer), {"context_size": "ctx_len"}, buffer)


def _hook_of_submodule(layer: int, submodule_name: str | None, io: str) -> str:
    """Returns the hook of a submodule that a user of dictionary_learning named, by TransformerLens's name or by path.

    Users choose these names freely. Without a name, the activations are the layer's own (utils.get_submodule).
    """
    name = submodule_name or "resid_post"
    if re.fullmatch(rf"{_LAYER}\..+", name):  # a module's path
        return name if io == "out" else f"input of {name}"
    if re.fullmatch(_LAYER, name):
        kind = "hook_resid_post"
    elif "resid_pre" in name:
        kind = "hook_resid_pre"
    elif "resid" in name:
        kind = "hook_resid_post"
    elif "mlp" in name:
        kind = "hook_mlp_out"
    elif "att" in name:
        kind = "hook_attn_out"
    else:
        return name
    if io == "in":
        return f"blocks.{layer}.hook_resid_pre" if kind == "hook_resid_post" else f"input of {name}"
    return f"blocks.{layer}.{kind}"


def _fill(metadata: SAEMetadata, fields: Mapping[str, str], source: Mapping[str, Any]) -> SAEMetadata:
    """Copies fields from the source into the metadata and returns it. Fields without a value are left out."""
    for ours, theirs in fields.items():
        if source.get(theirs):
            metadata[ours] = source[theirs]
    return metadata
