"""Loads SAEs from disk in the layouts of Gemma Scope, Llama Scope, Qwen Scope and Goodfire, with SAELens's formulas.

The formulas and what a directory's name says are those of SAELens (loading/pretrained_sae_loaders.py). The threshold of
Llama Scope also follows its publisher (Language-Model-SAEs: sae.py, Initializer) where SAELens leaves out a factor.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.loading.pretrained_sae_loaders import (
    LLM_METADATA_KEYS,
    get_gemma_2_config_from_hf,
    get_goodfire_config_from_hf,
    get_qwen_scope_config_from_hf,
)
from sae_lens.saes.sae import SAEMetadata
from safetensors import SafetensorError
from safetensors.torch import load_file

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.saes.weights import build_sae, check_k, named_weights, read_json, read_state_dict

GEMMA_SCOPE_FILES = ("params.npz",)
GEMMA_SCOPE_2_FILES = ("config.json", "params.safetensors")
LLAMA_SCOPE_FILES = ("hyperparams.json", "checkpoints/final.safetensors")

_GEMMA_SCOPE_REPOSITORY = re.compile(r"gemma-scope-(?:2b|9b|27b)-(?:pt|it)-(?:res|mlp|att|transcoders)")
_GOODFIRE_NAME = re.compile(r"(.+)-SAE-l(\d+)\.pth?")
_QWEN_SCOPE_NAME = re.compile(r"layer(\d+)\.sae\.pt")
_QWEN_SCOPE_REPOSITORY = re.compile(r"SAE-Res-[^/]+-W\d+K-L0_(\d+)")

# SAELens's name -> the publisher's.
_PLAIN = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
_GEMMA_SCOPE = _PLAIN | {"threshold": "threshold"}
_GEMMA_SCOPE_2 = _GEMMA_SCOPE | {"W_enc": "w_enc", "W_dec": "w_dec"}
_LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias", "b_dec": "decoder.bias"}
_GOODFIRE = {ours: theirs.replace(".", "_linear.") for ours, theirs in _LINEAR.items()}

# The end of a hook point in Gemma Scope 2's config.json, after `model.layers.N.` -> TransformerLens's name.
_GEMMA_3_HOOKS = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}


def load_gemma_scope(directory: Path, device: str, where: str) -> SAE[Any]:
    """Loads a Gemma Scope SAE, a JumpReLU SAE of Gemma 2.

    Args:
        directory: holds `params.npz`. The model and the hook follow from its path, if that has the name of the
            publisher's repository: `gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82`.
        device: where to put the SAE.
        where: the flag and its value, for messages.

    Raises:
        UserError: the file is damaged, holds more than arrays, or is of a transcoder.
    """
    path = str(directory.absolute())
    repository = next(reversed(list(_GEMMA_SCOPE_REPOSITORY.finditer(path))), None)
    if repository is not None and "transcoder" in path[repository.start() :]:
        raise UserError(f"{where}: a transcoder of Gemma Scope, not an autoencoder of one activation")
    weights = named_weights(_read_npz(directory / "params.npz", device, where), _GEMMA_SCOPE, where)
    folder = path[repository.end() :] if repository else ""
    if "/embedding/" in folder + "/":  # trained on embeddings that were not yet multiplied by sqrt(D)
        scale = weights["W_dec"].shape[-1] ** 0.5
        weights["W_enc"], weights["W_dec"] = weights["W_enc"] / scale, weights["W_dec"] * scale
    metadata = SAEMetadata()
    if repository is not None and re.search(r"/(layer_\d+|embedding)(/|$)", folder):
        metadata = _metadata(get_gemma_2_config_from_hf(repository[0], folder, device))
    return _jump_relu(weights, device, where, metadata)


def load_gemma_scope_2(directory: Path, device: str, where: str) -> SAE[Any]:
    """Loads a Gemma Scope 2 SAE, a JumpReLU SAE of Gemma 3.

    Args:
        directory: holds `params.safetensors`, and `config.json`, which names the model and the hook.
        device: where to put the SAE.
        where: the flag and its value, for messages.

    Raises:
        UserError: the files are damaged or of another kind, or of a transcoder.
    """
    config = read_json(directory / "config.json", where)
    if config.get("architecture") != "jump_relu":
        raise UserError(
            f"{where}: config.json beside params.safetensors is not Gemma Scope 2's: its architecture is"
            f" {config.get('architecture')!r:.60}, and must be 'jump_relu'"
        )
    point, out = str(config.get("hf_hook_point_in")), config.get("hf_hook_point_out")
    if out not in (None, point):
        raise UserError(f"{where}: a transcoder from {point} to {out!s:.80}, not an autoencoder of one activation")
    weights = named_weights(_read_safetensors(directory / "params.safetensors", device, where), _GEMMA_SCOPE_2, where)
    metadata = SAEMetadata(prepend_bos=True)
    if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", point):
        known = _GEMMA_3_HOOKS.get(found[2])
        metadata.hook_name = f"blocks.{found[1]}.{known}" if known else point.removesuffix(".output")
    if name := config.get("model_name"):
        # As SAELens corrects it: published files say gemma-v3, and the 270m model has no suffix on the Hub.
        name = f"google/{str(name).removeprefix('google/')}".replace("-v3", "-3")
        metadata.model_name = name.replace("-pt", "") if "270m" in name else name
    return _jump_relu(weights, device, where, metadata)


def llama_scope_form(directory: Path, where: str) -> str:
    """Returns the activation function of a Llama Scope SAE."""
    return str(read_json(directory / "hyperparams.json", where).get("act_fn"))


def load_llama_scope(directory: Path, device: str, where: str) -> SAE[Any]:
    """Loads a Llama Scope SAE, a JumpReLU SAE with one threshold for all features.

    Its activations are scaled to the norm sqrt(D) on average. Here the scale is folded into the weights. As in SAELens,
    the features keep the magnitudes that they have for scaled activations.

    Args:
        directory: holds `hyperparams.json`, which names the hook, and `checkpoints/final.safetensors`.
        device: where to put the SAE.
        where: the flag and its value, for messages.

    Raises:
        UserError: the files are damaged, or are of a transcoder or of another kind of SAE.
    """
    hyperparams = read_json(directory / "hyperparams.json", where)
    scale, threshold = _check_hyperparams(hyperparams, where)
    weights = named_weights(_read_safetensors(directory / LLAMA_SCOPE_FILES[1], device, where), _LINEAR, where)
    if weights["W_dec"].shape[-1] != hyperparams["d_model"]:
        width = weights["W_dec"].shape[-1]
        raise UserError(
            f"{where}: damaged: d_model in hyperparams.json is {hyperparams['d_model']}, W_dec's is {width}"
        )
    # The threshold is for the activations' own units, and for features whose decoder vectors have the norm 1.
    weights["threshold"] = torch.full_like(weights["b_enc"], threshold * scale)
    if hyperparams.get("sparsity_include_decoder_norm"):
        norms_F = weights["W_dec"].norm(dim=-1)
        is_one_F = ((norms_F - 1).abs() < 0.01) | (norms_F == 0)  # bfloat16 rounds norms by up to 0.4%
        weights["threshold"] = weights["threshold"] / norms_F.where(~is_one_F, 1.0)
    weights["W_enc"] = weights["W_enc"] * scale
    weights["W_dec"], weights["b_dec"] = weights["W_dec"] / scale, weights["b_dec"] / scale
    metadata = SAEMetadata(prepend_bos=True, context_size=1024)  # as SAELens says
    if point := hyperparams.get("hook_point_in"):
        metadata.hook_name = point
    if "Llama3_1-8B" in str(directory.absolute()):
        metadata.model_name, metadata.dataset_path = "meta-llama/Llama-3.1-8B", "cerebras/SlimPajama-627B"
    return _jump_relu(weights, device, where, metadata)


def _check_hyperparams(hyperparams: Mapping[str, Any], where: str) -> tuple[float, float]:
    """Returns the factor on the activations and the threshold, and refuses what is not an SAE of Llama Scope's kind."""
    said = f"{where}: hyperparams.json has"
    point_in = hyperparams.get("hook_point_in")
    if (out := hyperparams.get("hook_point_out", point_in)) != point_in:
        raise UserError(f"{where}: a transcoder from {point_in} to {out!s:.80}, not an autoencoder of one activation")
    if (act_fn := hyperparams.get("act_fn")) != "jumprelu":
        raise UserError(f"{said} act_fn {act_fn!r:.60}; only jumprelu can be loaded")
    for name in ("apply_decoder_bias_to_pre_encoder", "use_glu_encoder"):
        if hyperparams.get(name):
            raise UserError(f"{said} {name}, which no SAE of Llama Scope has, and which cannot be loaded")
    if (normalization := hyperparams.get("norm_activation", "dataset-wise")) not in ("dataset-wise", "inference"):
        raise UserError(f"{said} norm_activation {normalization!r:.60}; only dataset-wise can be loaded")
    threshold = _positive(hyperparams.get("jump_relu_threshold"), f"{said} jump_relu_threshold")
    d_model = _positive(hyperparams.get("d_model"), f"{said} d_model")
    if normalization == "inference":  # the scale is in the weights already
        return 1.0, threshold
    norms = hyperparams.get("dataset_average_activation_norm")
    norm = _positive(
        norms.get("in") if isinstance(norms, dict) else norms, f"{said} dataset_average_activation_norm.in"
    )
    return d_model**0.5 / norm, threshold


def _positive(value: Any, said: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise UserError(f"{said} {value!r:.60}, and it must be a number above 0")
    return float(value)


def publisher_with_name(name: str) -> str | None:
    """Returns the publisher whose SAEs are single files with names like the given one; None if there is none.

    Such names are `layer12.sae.pt` (Qwen Scope) and `Llama-3.1-8B-Instruct-SAE-l19.pth` (Goodfire).
    """
    if _QWEN_SCOPE_NAME.fullmatch(name):
        return "Qwen Scope"
    return "Goodfire" if _GOODFIRE_NAME.fullmatch(name) else None


def load_goodfire(file: Path, device: str, where: str) -> SAE[Any]:
    """Loads a Goodfire SAE, an SAE with ReLU that does not subtract b_dec before encoding.

    Args:
        file: a state dict, whose name gives the model and the layer.
        device: where to put the SAE.
        where: the flag and its value, for messages.

    Raises:
        UserError: the file is damaged, of another kind, or a pickle of more than tensors.
    """
    weights = named_weights(read_state_dict(file, device, where), _GOODFIRE, where)
    name = _GOODFIRE_NAME.fullmatch(file.name)
    assert name is not None
    try:
        metadata = _metadata(get_goodfire_config_from_hf(f"Goodfire/{file.stem}", file.name, device))
    except ValueError:  # SAELens does not know this model
        metadata = SAEMetadata(hook_name=f"blocks.{name[2]}.hook_resid_post")
    return build_sae(
        StandardSAE, StandardSAEConfig, weights, device, where, metadata=metadata, apply_b_dec_to_input=False
    )


def load_qwen_scope(file: Path, device: str, where: str) -> SAE[Any]:
    """Loads a Qwen Scope SAE, a TopK SAE that does not subtract b_dec before encoding.

    Args:
        file: a state dict. Its name gives the layer, and the name of its directory the model and k:
            `SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer12.sae.pt`.
        device: where to put the SAE.
        where: the flag and its value, for messages.

    Raises:
        UserError: the file is damaged, of another kind, or a pickle of more than tensors; or k is not known.
    """
    repository = next(reversed(list(_QWEN_SCOPE_REPOSITORY.finditer(str(file.absolute())))), None)
    if repository is None:
        raise UserError(
            f"{where}: k is said by the publisher's name for the directory alone; name it so again, as in"
            f" SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/{file.name}"
        )
    weights = named_weights(read_state_dict(file, device, where), _PLAIN, where)
    weights["W_enc"], weights["W_dec"] = weights["W_enc"].mT, weights["W_dec"].mT
    layer = _QWEN_SCOPE_NAME.fullmatch(file.name)
    assert layer is not None
    try:
        metadata = _metadata(get_qwen_scope_config_from_hf(repository[0], file.name, device))
    except ValueError:  # SAELens does not know this model
        metadata = SAEMetadata(hook_name=f"blocks.{layer[1]}.hook_resid_post")
    k = check_k(int(repository[1]), len(weights["b_enc"]), where)
    return build_sae(TopKSAE, TopKSAEConfig, weights, device, where, k=k, metadata=metadata, apply_b_dec_to_input=False)


def _jump_relu(weights: dict[str, torch.Tensor], device: str, where: str, metadata: SAEMetadata) -> SAE[Any]:
    return build_sae(
        JumpReLUSAE, JumpReLUSAEConfig, weights, device, where, metadata=metadata, apply_b_dec_to_input=False
    )


def _metadata(cfg: Mapping[str, Any]) -> SAEMetadata:
    """Returns what SAELens's configuration of a published SAE says about its model, hook and text."""
    return SAEMetadata(**{name: value for name, value in cfg.items() if name in LLM_METADATA_KEYS})


def _read_npz(file: Path, device: str, where: str) -> dict[str, torch.Tensor]:
    """Returns the arrays of a file, and refuses what would have to be unpickled."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        kind = "holds a pickle, not arrays alone" if "pickle" in str(error) else "is damaged"
        raise UserError(f"{where}: {file.name} {kind}: {one_line(error)}; download it again") from error
    numbers = {name: array for name, array in found.items() if array.dtype.kind in "fiu"}
    return {name: torch.from_numpy(array).to(device) for name, array in numbers.items()}


def _read_safetensors(file: Path, device: str, where: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(file, device=device)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{where}: {file.name} is damaged: {one_line(error)}; download it again") from error
