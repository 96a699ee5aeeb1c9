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
from sae_lens.util import dtype_to_str
from safetensors import SafetensorError
from transformer_lens.loading_from_pretrained import get_official_model_name
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.files.connection import retrying
from sae_toolkit.files.embedded import EMBEDDED_MODEL, embedded_model_file
from sae_toolkit.files.hub import check_repository, download_small_files
from sae_toolkit.files.trust import check_kernels, check_model_kwargs, check_weight_index, needs_trust
from sae_toolkit.model.language_model import LanguageModel, model_without_weights

log = logging.getLogger(__name__)

_FILE_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError, RecursionError),
    *(ImportError, SafetensorError),
)


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, checked, with nothing of its weights loaded yet."""

    name: str
    config: PreTrainedConfig
    location: dict[str, Any]  # arguments of Transformers' from_pretrained
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False  # whether code that comes with the model may run

    @property
    def max_context(self) -> int | None:
        """The longest context that the model was made for, in tokens, if its configuration says."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def files(self) -> str | list[list[Any]]:
        """What tells one version of a model from another: the Hub's commit, or its files' names, sizes and times."""
        if commit := getattr(self.config, "_commit_hash", None):
            return commit
        path = Path(self.location["pretrained_model_name_or_path"], self.location.get("subfolder", ""))
        patterns = (
            [self.location["gguf_file"]] if "gguf_file" in self.location else ["*.safetensors", "*.bin", "*.json"]
        )
        files = sorted(file for pattern in patterns for file in path.glob(pattern))
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    def is_here(self) -> bool:
        """Whether its weights can be loaded without downloading anything."""
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
        """From the shapes alone."""
        return model_without_weights(self.config, self.trust_remote_code).num_parameters()


def find_model(
    name: str, model_kwargs: dict[str, Any] | None = None, *, trust_remote_code: bool = False
) -> ModelSource:
    """Finds a model and reads its configuration.

    Args:
        name: a Hugging Face id, a directory that Transformers saved, a GGUF file, or `embedded:smollm2-135m`.
        model_kwargs: more arguments for `from_pretrained`, such as `revision`.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        UserError: there is no such model, it may not be read, Transformers does not know its architecture, or it
            needs code of its own that may not run.
    """
    model_kwargs = model_kwargs or {}
    check_model_kwargs(model_kwargs, trust_remote_code=trust_remote_code)
    location = _locate(name) | {k: model_kwargs[k] for k in ("revision", "subfolder") if k in model_kwargs}
    if not Path(repository := location["pretrained_model_name_or_path"]).exists():
        wanted = location.get("revision"), location.get("subfolder", "")
        if commit := download_small_files(repository, *wanted, "--model_name"):
            location["revision"] = commit
    # Said either way: Transformers asks at the terminal where it is left open.
    location["trust_remote_code"] = trust_remote_code
    with _errors_of_files(f"--model_name {name}"):
        config = retrying(f"--model_name {name}", lambda: AutoConfig.from_pretrained(**location))
    if not trust_remote_code:
        check_kernels(config, f"--model_name {name}")
    return ModelSource(name, config, location, model_kwargs, trust_remote_code)


@contextmanager
def _errors_of_files(where: str) -> Iterator[None]:
    """What Transformers raises over a model's files, in one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except UnpicklingError as error:
        raise UserError(
            f"{where}: holds a pickle of more than tensors, which could run any code if it were opened; use safetensors"
        ) from error
    except _FILE_ERRORS as error:
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
            raise UserError(f"--model_name {name}: the directory holds neither config.json nor one .gguf file")
        return {"pretrained_model_name_or_path": str(path), "gguf_file": gguf_files[0].name}
    if path.exists():
        raise UserError(f"--model_name {name}: this file is not a model; give a directory or a .gguf file")
    return {"pretrained_model_name_or_path": check_repository(_hub_name(name), "model", "--model_name")}


def _hub_name(name: str) -> str:
    """The Hub's name of a model that goes by TransformerLens's (`gpt2-small`, `gemma-2-2b`), as many SAEs say it."""
    try:
        return name if "/" in name else get_official_model_name(name)
    except ValueError:
        return name


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer.

    Raises:
        UserError: it has none that Transformers can load, or one without a BOS and an EOS token.
    """
    with _errors_of_files(f"--model_name {source.name}: no tokenizer"):
        tokenizer = retrying(f"--model_name {source.name}", lambda: AutoTokenizer.from_pretrained(**source.location))
    if tokenizer.bos_token_id is None:
        # As TransformerLens does: models without a BOS token start their contexts with EOS.
        if tokenizer.eos_token_id is None:
            raise UserError(f"--model_name {source.name}: the tokenizer has neither a BOS nor an EOS token")
        tokenizer.bos_token = tokenizer.eos_token
    return tokenizer


def load_language_model(
    source: ModelSource, hook_names: str | Sequence[str], device: str, dtype: torch.dtype, n_devices: int = 1
) -> LanguageModel:
    """Loads a model's weights onto a device.

    Args:
        hook_names: the hook, or the hooks to be read at once.
        n_devices: over how many CUDA devices Transformers spreads its layers, from `device` on.

    Raises:
        UserError: the weights are missing or damaged, or the model has no such hook.
    """
    where_to: dict[str, Any] = {"device_map": device}
    if n_devices > 1:
        first = torch.device(device).index or 0
        free = {index: torch.cuda.mem_get_info(index)[0] for index in range(first, first + n_devices)}
        where_to = {"device_map": "balanced", "max_memory": free}
    and_more = f" and the {n_devices - 1} after it" if n_devices > 1 else ""
    log.info("loading %s in %s on %s%s", source.name, dtype_to_str(dtype), device, and_more)
    where = f"--model_name {source.name}"

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            **(source.model_kwargs | source.location),
            config=source.config,
            dtype=dtype,
            **where_to,
            output_loading_info=True,
        )

    with _errors_of_files(f"{where}: its weights cannot be read"):
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
        raise UserError(
            f"--model_name {source.name}: {len(missing)} weights are missing, {missing[0]} among them; fetch it anew"
        )
    return LanguageModel(model, *([hook_names] if isinstance(hook_names, str) else hook_names))


class LanguageModels:
    """Loads language models one at a time; another hook of the same one does not load it again."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._loaded: tuple[dict[str, Any], LanguageModel] | None = None

    def load(self, source: ModelSource, hook_name: str) -> LanguageModel:
        if self._loaded is not None and self._loaded[0] == source.location:
            model = LanguageModel(self._loaded[1].model, hook_name)
        else:
            self._loaded = None  # free the one before
            model = load_language_model(source, hook_name, self.device, self.dtype)
        self._loaded = source.location, model
        return model


def check_token_ids(rows_NT: np.ndarray, source: ModelSource, where: str) -> None:
    """Holds token ids against a model's vocabulary.

    Raises:
        UserError: the model has no such token.
    """
    n_tokens = source.config.get_text_config().vocab_size
    for token in (rows_NT.min(), rows_NT.max()):
        if not 0 <= token < n_tokens:
            raise UserError(
                f"{where}: holds the token id {token}, and {source.name} has 0 to {n_tokens - 1}; it was tokenized for"
                " another model"
            )
