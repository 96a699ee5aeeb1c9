"""Recognizes and loads SAEs on disk in the formats of SAELens, sparsify, dictionary_learning and publishers of SAEs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path, PurePath
from typing import Any

import httpx2
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from safetensors import SafetensorError

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.model.devices import out_of_memory_answered
from sae_toolkit.saes.checkpoints import load_sae
from sae_toolkit.saes.foreign import (
    DICTIONARY_LEARNING_FILES,
    SPARSIFY_FILES,
    dictionary_learning_form,
    is_dictionary_checkpoint,
    load_dictionary_learning,
    load_sparsify,
    sparsify_form,
)
from sae_toolkit.saes.metadata import check_are_floats, check_cfg
from sae_toolkit.saes.published import (
    GEMMA_SCOPE_2_FILES,
    GEMMA_SCOPE_FILES,
    LLAMA_SCOPE_FILES,
    llama_scope_form,
    load_gemma_scope,
    load_gemma_scope_2,
    load_goodfire,
    load_llama_scope,
    load_qwen_scope,
    publisher_with_name,
)
from sae_toolkit.saes.weights import read_json

# A directory that holds all of a library's files is an SAE of that library. The first file is in the directory itself.
FILES = {
    "SAELens": (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME),
    "sparsify": SPARSIFY_FILES,
    "dictionary_learning": DICTIONARY_LEARNING_FILES,
    "Gemma Scope": GEMMA_SCOPE_FILES,
    "Gemma Scope 2": GEMMA_SCOPE_2_FILES,
    "Llama Scope": LLAMA_SCOPE_FILES,
}
_LARGEST_WEIGHT = 1e10  # products of larger weights overflow float32
WHAT_IS_AN_SAE = "; ".join(
    [f"{' + '.join(files)} ({library})" for library, files in FILES.items()]
    + [
        "config.json + checkpoints/ae_STEP.pt (dictionary_learning, in training)",
        "layerN.sae.pt (Qwen Scope)",
        "MODEL-SAE-lN.pth (Goodfire)",
    ]
)
_FORMS = {
    "sparsify": sparsify_form,
    "dictionary_learning": dictionary_learning_form,
    "Llama Scope": llama_scope_form,
    "Gemma Scope": lambda _path, _where: "jumprelu",
    "Gemma Scope 2": lambda _path, _where: "jumprelu",
    "Qwen Scope": lambda _path, _where: "topk",
    "Goodfire": lambda _path, _where: "standard",
}
_LOADERS = {
    "sparsify": load_sparsify,
    "dictionary_learning": load_dictionary_learning,
    "Llama Scope": load_llama_scope,
    "Gemma Scope": load_gemma_scope,
    "Gemma Scope 2": load_gemma_scope_2,
    "Qwen Scope": load_qwen_scope,
    "Goodfire": load_goodfire,
}


@dataclass(frozen=True)
class SAEFile:
    """An SAE that was found and is not loaded yet."""

    name: str  # for tables: the name on the Hub, or the last parts of the path that tell it from the other SAEs
    path: Path  # the SAE's directory, or its only file; for a SAELens release its repository in the Hub's cache
    library: str  # "SAELens", or a key of `_LOADERS`
    form: str  # such as "inference form, jumprelu", "SparseCoder, topk" or "BatchTopKSAE"
    release: tuple[str, str] | None = None  # SAELens's release and SAE id
    one_of_many: bool = False  # whether a run directory or a pattern led to it, instead of its own name

    @property
    def given_name(self) -> str:
        """The name by which --sae_path and --init_from find the SAE from the same directory."""
        if self.release is not None:
            return ":".join(self.release)
        return self.name if self.is_download else str(self.path)

    @property
    def is_download(self) -> bool:
        """Whether the SAE is in the Hub's cache."""
        return self.release is not None or self.path.resolve().is_relative_to(Path(constants.HF_HUB_CACHE).resolve())


def library_with(names: Collection[str], folder: str = ".") -> str | None:
    """Returns the library with all its files in a folder; None if there is none.

    Args:
        names: names of all files, as paths relative to a common directory.
        folder: path of the folder relative to that directory.
    """
    return next(
        (library for library, files in FILES.items() if all(str(PurePath(folder, file)) in names for file in files)),
        None,
    )


def library_of(path: Path) -> str | None:
    """Returns the library that the SAE in a directory, or in a file of its own, comes from; None if it is no SAE."""
    if path.is_dir():
        names = {file for files in FILES.values() for file in files}
        return library_with({name for name in names if (path / name).is_file()})
    if is_dictionary_checkpoint(path):
        return "dictionary_learning"
    return publisher_with_name(path.name) if path.is_file() else None


def recognize_sae(path: Path, name: str, where: str) -> SAEFile:
    """Returns the `SAEFile` for a directory that holds an SAE, or for a file that is one.

    Args:
        path: the SAE's directory or file.
        name: the SAE's name for tables.
        where: the flag and its value, for messages.

    Raises:
        UserError: its configuration is damaged.
    """
    library = library_of(path)
    assert library is not None
    form = _saelens_form if library == "SAELens" else _FORMS[library]
    return SAEFile(name, path, library, form(path, where))


def _saelens_form(directory: Path, where: str) -> str:
    cfg = read_json(directory / SAE_CFG_FILENAME, where)
    check_cfg(cfg, where)
    architecture = cfg.get("architecture", "standard")
    inference, training = (
        {field.name for field in fields(registry[architecture][1])} if architecture in registry else set()
        for registry in (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY)
    )
    is_training_form = bool((training - inference) & cfg.keys())
    return f"{'training' if is_training_form else 'inference'} form, {architecture}"


def load_sae_file(file: SAEFile, device: str, flag: str = "--sae_path") -> SAE[Any]:
    """Loads an SAE for inference, in float32.

    Args:
        file: returned by `find_saes`.
        device: where to put the SAE.
        flag: the flag that named it, for messages.

    Returns:
        The SAE, for activations of shape [..., d_in]. Its features and reconstruction equal those of its library.

    Raises:
        UserError: the SAE is damaged, incomplete, not finite, or not an autoencoder of one activation; or the memory
            does not suffice.
    """
    where = f"{flag} {':'.join(file.release) if file.release else file.path}"
    with out_of_memory_answered(f"{where}: loading it on {device}", "free memory there, or name fewer SAEs at once"):
        try:
            sae = _load(file, device, flag, where)
        except UserError:
            raise
        except Exception as error:  # SAELens raises many kinds of errors for impossible values
            raise UserError(f"{where}: damaged or incomplete: {one_line(error)}") from error
        _check_weights(sae, where)
        return sae.to(dtype=torch.float32)


def _load(file: SAEFile, device: str, flag: str, where: str) -> SAE[Any]:
    if file.release is not None:
        return _load_release(*file.release, device, where)
    if file.library in _LOADERS:
        return _LOADERS[file.library](file.path, device, where)
    check_are_floats(file.path / SAE_WEIGHTS_FILENAME, where)
    return load_sae(file.path, device, flag)


def _check_weights(sae: SAE[Any], where: str) -> None:
    """Refuses SAEs that are not autoencoders of one activation, and weights that are not finite or far too large."""
    if hasattr(sae.cfg, "d_out"):
        raise UserError(f"{where}: a transcoder ({sae.cfg.architecture()}), not an autoencoder of one activation")
    if sae.cfg.architecture() == "temporal":
        raise UserError(f"{where}: a temporal SAE, which needs whole sequences, not one activation at a time")
    for name, tensor in sae.state_dict().items():
        if not torch.isfinite(tensor).all():
            n_bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(f"{where}: {n_bad} of the {tensor.numel()} numbers of {name} are NaN or infinite")
        if name != "threshold" and (largest := tensor.abs().max().item() if tensor.numel() else 0.0) > _LARGEST_WEIGHT:
            raise UserError(
                f"{where}: {name} holds {largest:.3g}, too large for a trained SAE; are the weights damaged?"
            )


def _load_release(release: str, sae_id: str, device: str, where: str) -> SAE[Any]:
    try:
        sae = SAE.from_pretrained(release, sae_id, device=device)
    except (OSError, HfHubHTTPError, httpx2.TransportError) as error:
        raise UserError(f"{where}: cannot be downloaded: {download_failure(error)}") from error
    except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{where}: SAELens cannot load it: {one_line(error)}") from error
    sae.turn_off_forward_pass_hook_z_reshaping()  # this project flattens heads
    return sae.eval()


def download_failure(error: Exception) -> str:
    """Returns why a download failed, in one line. In huggingface_hub's errors the reason is the `__cause__`."""
    cause = error.__cause__
    return one_line(cause if isinstance(error, LocalEntryNotFoundError) and isinstance(cause, Exception) else error)
