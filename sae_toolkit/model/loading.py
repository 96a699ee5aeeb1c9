"""Finds a language model by name and loads it: a Hugging Face id, a directory, a GGUF file or the embedded one."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from sae_lens.util import dtype_to_str
from safetensors import SafetensorError
from transformer_lens.loading_from_pretrained import get_official_model_name
from transformers import (
    AutoConfig,
    PreTrainedConfig,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from sae_toolkit.errors import UserError, is_out_of_memory, one_line
from sae_toolkit.files.connection import retrying
from sae_toolkit.files.embedded import EMBEDDED_MODEL, embedded_model_file
from sae_toolkit.files.hub import check_repository, download_small_files
from sae_toolkit.files.trust import check_kernels, check_model_kwargs, check_weight_index, needs_trust
from sae_toolkit.model.adapters import CONFIG_FILE as ADAPTER_CONFIG
from sae_toolkit.model.adapters import Adapter, find_adapter, merged_with_adapter
from sae_toolkit.model.building import auto_class, model_without_weights
from sae_toolkit.model.devices import free_memory, out_of_memory_answered, what_would_fit
from sae_toolkit.model.embedded_copy import KEPT_COPIES, embedded_copy
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.synthetic.directory import is_synthetic, synthetic_directory
from sae_toolkit.synthetic.language_model import load_synthetic, synthetic_config

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
    location: dict[str, Any]  # where Transformers' from_pretrained finds it, or the base of an adapter, as arguments
    model_kwargs: dict[str, Any] = field(default_factory=dict)  # further arguments of from_pretrained
    trust_remote_code: bool = False  # whether code that comes with the model may run
    adapter: Adapter | None = None  # a LoRA adapter, which is merged into the model's weights

    @property
    def is_synthetic(self) -> bool:
        """Whether it stands around a synthetic model of SAELens, whose features are known."""
        return is_synthetic(self.name)

    @property
    def max_context(self) -> int | None:
        """The longest context that the model was made for, in tokens; None if its configuration does not say."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def files(self) -> str | list[Any]:
        """Returns what identifies this version of the model: the Hub's commit, or each file's name, size and time.

        With an adapter it is that of the base, and each file of the adapter.
        """
        if self.adapter is not None:
            return [replace(self, adapter=None).files(), *map(_file_state, self.adapter.files())]
        if commit := getattr(self.config, "_commit_hash", None):
            return commit
        path = Path(self.location["pretrained_model_name_or_path"], self.location.get("subfolder", ""))
        if path.parent == KEPT_COPIES:
            return [_file_state(embedded_model_file())]  # a copy that is made again is the same model
        patterns = (
            [self.location["gguf_file"]] if "gguf_file" in self.location else ["*.safetensors", "*.bin", "*.json"]
        )
        files = sorted(file for pattern in patterns for file in path.glob(pattern))
        return [_file_state(file) for file in files]

    def is_here(self) -> bool:
        """Returns whether the weights can be loaded without a download."""
        if self.adapter is not None and self.adapter.weights_file(download=False) is None:
            return False
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


def _file_state(file: Path) -> list[Any]:
    return [file.name, file.stat().st_size, file.stat().st_mtime_ns]


def find_model(
    name: str,
    model_kwargs: dict[str, Any] | None = None,
    *,
    trust_remote_code: bool = False,
    with_adapter: bool = True,
) -> ModelSource:
    """Finds a model and reads its configuration.

    Args:
        name: a Hugging Face id, a directory that Transformers saved, a GGUF file, `embedded:smollm2-135m`, or
            `synthetic:` and the name of a synthetic model. A directory or id may also be of a LoRA adapter that peft
            saved. Then the model is its base with the adapter merged into it.
        model_kwargs: further arguments for `from_pretrained`, such as `revision`.
        trust_remote_code: whether code that comes with the model may run.
        with_adapter: whether the name may be that of an adapter.

    Raises:
        UserError: there is no such model, access to it is refused, Transformers does not know its architecture, it
            needs code of its own and `trust_remote_code` is False, or it is an adapter that cannot be merged.
    """
    model_kwargs = model_kwargs or {}
    check_model_kwargs(model_kwargs, trust_remote_code=trust_remote_code)
    if is_synthetic(name):
        return _find_synthetic(name, model_kwargs)
    location = _locate(name) | {k: model_kwargs[k] for k in ("revision", "subfolder") if k in model_kwargs}
    if not Path(repository := location["pretrained_model_name_or_path"]).exists():
        wanted = location.get("revision"), location.get("subfolder", "")
        if commit := download_small_files(repository, *wanted, "--model_name"):
            location["revision"] = commit
    if adapter := find_adapter(location, model_kwargs, f"--model_name {name}"):
        if not with_adapter:
            raise UserError(
                f"--model_name {name}: an adapter itself; merge it into its base, and name the merged model"
            )
        return _base_with(adapter, name, model_kwargs, trust_remote_code)
    # This is set even if it is False: without it Transformers would ask at the terminal.
    location["trust_remote_code"] = trust_remote_code
    with errors_of_files(f"--model_name {name}"):
        config = retrying(f"--model_name {name}", lambda: AutoConfig.from_pretrained(**location))
    if not trust_remote_code:
        check_kernels(config, f"--model_name {name}")
    return ModelSource(name, config, location, model_kwargs, trust_remote_code)


def _find_synthetic(name: str, model_kwargs: dict[str, Any]) -> ModelSource:
    if model_kwargs:
        raise UserError(f"--set model_from_pretrained_kwargs={model_kwargs}: not for a synthetic model; leave it out")
    directory = synthetic_directory(name, "--model_name")
    config = synthetic_config(directory, f"--model_name {name}")
    return ModelSource(name, config, {"pretrained_model_name_or_path": str(directory)})


def _base_with(adapter: Adapter, name: str, model_kwargs: dict[str, Any], trust_remote_code: bool) -> ModelSource:
    """Finds the base of an adapter, and returns it with the adapter."""
    base_kwargs = {key: value for key, value in model_kwargs.items() if key not in ("revision", "subfolder")}
    if revision := adapter.config.get("revision"):
        base_kwargs["revision"] = revision
    try:
        with errors_of_files(f"--model_name {name}"):
            base = find_model(adapter.base, base_kwargs, trust_remote_code=trust_remote_code, with_adapter=False)
    except UserError as error:
        raise UserError(f"--model_name {name}: an adapter, whose base cannot be used: {error}") from error
    location = {"revision": None, "subfolder": ""} | base.location  # those of `model_kwargs` are the adapter's
    return replace(base, name=name, location=location, model_kwargs=model_kwargs, adapter=adapter)


@contextmanager
def errors_of_files(where: str) -> Iterator[None]:
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
        if copy := embedded_copy(file, KEPT_COPIES):
            return {"pretrained_model_name_or_path": str(copy)}
        return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    if name.startswith("embedded:"):
        raise UserError(f"--model_name {name}: the only embedded model is {EMBEDDED_MODEL}")
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"--model_name {name}: no such file")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        if (path / "config.json").is_file() or (path / ADAPTER_CONFIG).is_file():
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
        if source.is_synthetic:
            directory = Path(source.location["pretrained_model_name_or_path"])
            return load_synthetic(directory, device, dtype, where), {"missing_keys": []}
        return auto_class(source.config).from_pretrained(
            **(source.model_kwargs | source.location),
            config=source.config,
            dtype=dtype,
            **where_to,
            output_loading_info=True,
        )

    with (
        out_of_memory_answered(
            f"{where}: loading it",
            lambda: what_would_fit(source.n_parameters, device, dtype, n_devices, devices, free),
        ),
        errors_of_files(f"{where}: its weights cannot be read"),
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
        if (adapter := source.adapter) is not None:
            log.info("merging the adapter into %s", adapter.base)
            model = retrying(where, lambda: merged_with_adapter(model, adapter, where))
    return LanguageModel(model, *([hook_names] if isinstance(hook_names, str) else hook_names))


class LanguageModels:
    """Loads language models and keeps the last one, so that another hook of the same model needs no loading."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._loaded: tuple[tuple[dict[str, Any], Adapter | None], LanguageModel] | None = None

    def load(self, source: ModelSource, hook_name: str) -> LanguageModel:
        key = source.location, source.adapter
        if self._loaded is not None and self._loaded[0] == key:
            model = LanguageModel(self._loaded[1].model, hook_name)
        else:
            self._loaded = None  # frees the last model before the next one is loaded
            model = load_language_model(source, hook_name, self.device, self.dtype)
        self._loaded = key, model
        return model
