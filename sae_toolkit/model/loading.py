"""Finds a language model by name and loads it: a Hugging Face id, a directory, a GGUF file or the embedded one."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from sae_lens.util import dtype_to_str
from safetensors import SafetensorError
from transformer_lens.loading_from_pretrained import get_official_model_name
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from sae_toolkit.errors import UserError, is_out_of_memory, one_line
from sae_toolkit.files.connection import retrying
from sae_toolkit.files.embedded import EMBEDDED_MODEL, embedded_model_file
from sae_toolkit.files.hub import check_repository, download_small_files
from sae_toolkit.files.trust import check_kernels, check_model_kwargs, check_weight_index, needs_trust
from sae_toolkit.model.building import auto_class, model_without_weights
from sae_toolkit.model.devices import choose_lm_dtype, free_memory, out_of_memory_answered
from sae_toolkit.model.language_model import LanguageModel

log = logging.getLogger(__name__)

_FILE_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError, RecursionError),
    *(ImportError, SafetensorError, StrictDataclassError),  # the last one: values that do not fit together
)


@dataclass(frozen=True)
class ModelSource:
    """A model that was found and checked. Its weights are not loaded yet."""

    name: str
    config: PreTrainedConfig
    location: dict[str, Any]  # where Transformers' from_pretrained finds it, as arguments
    model_kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of from_pretrained
    trust_remote_code: bool = False  # whether code that comes with the model may run

    @property
    def max_context(self) -> int | None:
        """The longest context that the model was made for, in tokens; None if its configuration does not say."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def files(self) -> str | list[list[Any]]:
        """Returns what identifies this version of the model: the Hub's commit, or each file's name, size and time."""
        if commit := getattr(self.config, "_commit_hash", None):
            return commit
        path = Path(self.location["pretrained_model_name_or_path"], self.location.get("subfolder", ""))
        patterns = (
            [self.location["gguf_file"]] if "gguf_file" in self.location else ["*.safetensors", "*.bin", "*.json"]
        )
        files = sorted(file for pattern in patterns for file in path.glob(pattern))
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    def is_here(self) -> bool:
        """Returns whether the weights can be loaded without a download."""
        name = self.location["pretrained_model_name_or_path"]
        if Path(name).is_dir():
            return True

        def cached(file: str) -> Path | None:
            subfolder, revision = self.location.get("subfolder", ""), self.location.get("revision")
            found = try_to_load_from_cache(name, str(Path(subfolder, file)), revision=revision)
            return Path(found) if isinstance(found, str) else None

        for index_file in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
            if index := cached(index_file):
                return all(map(cached, set(json.loads(index.read_text())["weight_map"].values())))
        return any(map(cached, (SAFE_WEIGHTS_NAME, WEIGHTS_NAME)))

    @property
    def n_parameters(self) -> int:
        """The model's number of parameters. No weights are loaded to count them."""
        return model_without_weights(self.config, self.trust_remote_code).num_parameters()


def find_model(
    name: str, model_kwargs: dict[str, Any] | None = None, *, trust_remote_code: bool = False
) -> ModelSource:
    """Finds a model and reads its configuration.

    Args:
        name: a Hugging Face id, a directory that Transformers saved, a GGUF file, or `embedded:smollm2-135m`.
        model_kwargs: further arguments for `from_pretrained`, such as `revision`.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        UserError: there is no such model, access to it is refused, Transformers does not know its architecture, or it
            needs code of its own and `trust_remote_code` is False.
    """
    model_kwargs = model_kwargs or {}
    check_model_kwargs(model_kwargs, trust_remote_code=trust_remote_code)
    location = _locate(name) | {k: model_kwargs[k] for k in ("revision", "subfolder") if k in model_kwargs}
    if not Path(repository := location["pretrained_model_name_or_path"]).exists():
        wanted = location.get("revision"), location.get("subfolder", "")
        if commit := download_small_files(repository, *wanted, "--model_name"):
            location["revision"] = commit
    # This is set even if it is False: without it Transformers would ask at the terminal.
    location["trust_remote_code"] = trust_remote_code
    with _errors_of_files(f"--model_name {name}"):
        config = retrying(f"--model_name {name}", lambda: AutoConfig.from_pretrained(**location))
    if not trust_remote_code:
        check_kernels(config, f"--model_name {name}")
    return ModelSource(name, config, location, model_kwargs, trust_remote_code)


@contextmanager
def _errors_of_files(where: str) -> Iterator[None]:
    """Context manager that turns Transformers' errors about a model's files into a `UserError` of one line."""
    try:
        yield
    except UnpicklingError as error:
        raise UserError(
            f"{where}: holds a pickle of more than tensors, which could run any code if it were opened; use safetensors"
        ) from error
    except _FILE_ERRORS as error:
        if is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise needs_trust(where) from error
        raise UserError(f"{where}: {one_line(error)}") from error


def _locate(name: str) -> dict[str, Any]:
    if name == EMBEDDED_MODEL:
        file = embedded_model_file()
        return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    if name.startswith("embedded:"):
        raise UserError(f"--model_name {name}: the only embedded model is {EMBEDDED_MODEL}")
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"--model_name {name}: no such file")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        if (path / "config.json").is_file():
            return {"pretrained_model_name_or_path": str(path)}
        gguf_files = sorted(path.glob("*.gguf"))
        if len(gguf_files) != 1:
            raise UserError(
                f"--model_name {name}: the directory holds no config.json and {len(gguf_files)} .gguf files; name one"
                " of the files"
            )
        return {"pretrained_model_name_or_path": str(path), "gguf_file": gguf_files[0].name}
    if path.exists():
        raise UserError(f"--model_name {name}: this file is not a model; give a directory or a .gguf file")
    return {"pretrained_model_name_or_path": check_repository(_hub_name(name), "model", "--model_name")}


def _hub_name(name: str) -> str:
    """Returns a model's name on the Hub. Many SAEs give TransformerLens's name (`gpt2-small`, `gemma-2-2b`)."""
    try:
        return name if "/" in name else get_official_model_name(name)
    except ValueError:
        return name


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer. If it has no BOS token, its EOS token becomes the BOS token.

    Raises:
        UserError: Transformers cannot load the tokenizer, or it has neither a BOS nor an EOS token.
    """
    with _errors_of_files(f"--model_name {source.name}: no tokenizer"):
        tokenizer = retrying(f"--model_name {source.name}", lambda: AutoTokenizer.from_pretrained(**source.location))
    if tokenizer.bos_token_id is None:
        # TransformerLens does the same: the contexts of models without a BOS token start with EOS.
        if tokenizer.eos_token_id is None:
            raise UserError(f"--model_name {source.name}: the tokenizer has neither a BOS nor an EOS token")
        tokenizer.bos_token = tokenizer.eos_token
    return tokenizer


def load_language_model(
    source: ModelSource, hook_names: str | Sequence[str], device: str, dtype: torch.dtype, n_devices: int | None = None
) -> LanguageModel:
    """Loads a model's weights onto a device.

    Args:
        source: the model, as `find_model` returns it.
        hook_names: the hook, or several hooks to be read at once.
        device: where to put the weights.
        dtype: the dtype to load them in.
        n_devices: the number of CUDA devices, from `device` on, that Transformers spreads the layers over; None for
            one device, where the script has no --n_devices.

    Raises:
        UserError: the weights are missing or damaged, the memory does not suffice, or the model has no such hook.
    """
    where_to: dict[str, Any] = {"device_map": device}
    devices, free = device, free_memory(device)
    if n_devices is not None and n_devices > 1:
        first = torch.device(device).index or 0
        each_free = {index: torch.cuda.mem_get_info(index)[0] for index in range(first, first + n_devices)}
        where_to = {"device_map": "balanced", "max_memory": each_free}
        devices, free = f"{device} and the {n_devices - 1} after it", sum(each_free.values())
    log.info("loading %s in %s on %s", source.name, dtype_to_str(dtype), devices)
    where = f"--model_name {source.name}"

    def load() -> Any:
        return auto_class(source.config).from_pretrained(
            **(source.model_kwargs | source.location),
            config=source.config,
            dtype=dtype,
            **where_to,
            output_loading_info=True,
        )

    with (
        out_of_memory_answered(
            f"{where}: loading it", lambda: _what_would_fit(source, device, dtype, n_devices, devices, free)
        ),
        _errors_of_files(f"{where}: its weights cannot be read"),
    ):
        check_weight_index(source.location, source.model_kwargs.get("variant"), where)
        try:
            model, loading = retrying(where, load)
        except (TypeError, AttributeError) as error:
            if not source.model_kwargs:
                raise
            raise UserError(
                f"--set model_from_pretrained_kwargs={source.model_kwargs}: Transformers refuses it: {one_line(error)}"
            ) from None
    if missing := sorted(loading["missing_keys"]):  # Transformers fills them with random numbers
        raise UserError(f"{where}: {len(missing)} weights are missing, {missing[0]} among them; download it again")
    return LanguageModel(model, *([hook_names] if isinstance(hook_names, str) else hook_names))


def _what_would_fit(
    source: ModelSource, device: str, dtype: torch.dtype, n_devices: int | None, devices: str, free: int
) -> str:
    """Returns a phrase that says what a model takes, what was free, and which flags would let it fit.

    Args:
        device, dtype, n_devices: as for `load_language_model`.
        devices: the devices that it was to be loaded on, in words.
        free: bytes that were free on them.
    """
    n_parameters = source.n_parameters
    takes = n_parameters * dtype.itemsize
    flags = []
    if dtype.itemsize > 2 and 2 * n_parameters < free:
        flags.append("--lm_dtype bfloat16")
    if torch.device(device).type == "cuda":
        if n := _n_devices_for(takes, device, n_devices, free):
            flags.append(f"--n_devices {n}")
        on_cpu = n_parameters * max(dtype.itemsize, choose_lm_dtype("auto", "cpu").itemsize)
        if on_cpu < free_memory("cpu"):
            flags.append("--device cpu" if n_devices is None else "--llm_device cpu")
    return (
        f"it takes about {takes / 2**30:.2f} GiB in {dtype_to_str(dtype)}, and {free / 2**30:.2f} GiB were free on"
        f" {devices}; " + (f"it would fit with {' or '.join(flags)}" if flags else "a smaller model is needed")
    )


def _n_devices_for(takes: int, device: str, n_devices: int | None, free: int) -> int | None:
    """Returns how many CUDA devices, from `device` on, have room for `takes` bytes; None if no number has."""
    if n_devices is None:
        return None
    first = torch.device(device).index or 0
    for index in range(first + n_devices, torch.cuda.device_count()):
        free += free_memory(f"cuda:{index}")
        if takes < free:
            return index + 1 - first
    return None


class LanguageModels:
    """Loads language models and keeps the last one, so that another hook of the same model needs no loading."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._loaded: tuple[dict[str, Any], LanguageModel] | None = None

    def load(self, source: ModelSource, hook_name: str) -> LanguageModel:
        if self._loaded is not None and self._loaded[0] == source.location:
            model = LanguageModel(self._loaded[1].model, hook_name)
        else:
            self._loaded = None  # frees the last model before the next one is loaded
            model = load_language_model(source, hook_name, self.device, self.dtype)
        self._loaded = source.location, model
        return model


def check_token_ids(rows_NT: np.ndarray, source: ModelSource, where: str) -> None:
    """Checks that the token ids are in the model's vocabulary.

    Args:
        rows_NT: token ids.
        source: the model.
        where: the flag and the text, for messages.

    Raises:
        UserError: a token id is outside the vocabulary.
    """
    n_tokens = source.config.get_text_config().vocab_size
    for token in (rows_NT.min(), rows_NT.max()):
        if not 0 <= token < n_tokens:
            raise UserError(
                f"{where}: holds the token id {token}, and {source.name} has 0 to {n_tokens - 1}; it was tokenized for"
                " another model, so name that model or tokenize the text again"
            )
