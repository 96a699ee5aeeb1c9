"""LoRA adapters that peft saved: found beside a model's name, and merged into the weights of their base."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import cached_file

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.files.trust import is_hub_name
from sae_toolkit.model.devices import random_states_restored

log = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
_BASE = "base_model_name_or_path"  # its field with the base's name
_WEIGHTS, _PICKLED_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
# Fields of peft's LoraConfig with which an adapter cannot be merged into its base, changes the number of layers, or
# names a module to import.
_REFUSED_FIELDS = (
    *("alora_invocation_tokens", "arrow_config", "layer_replication", "megatron_config", "monteclora_config"),
    *("kasa_config", "use_bdlora", "velora_config"),
)
# The largest difference that merging may make, as the root mean square over logits and a multiple of their standard
# deviation. It is the rounding of the weights: with a large adapter of the embedded model 1e-5, in bfloat16 0.07.
_LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_LARGEST_DIFFERENCE_HALF = 0.25


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that was found and whose configuration was read. Its weights are not loaded yet.

    Args:
        location: where Transformers' `cached_file` finds its files, as arguments.
        config: the content of adapter_config.json.
        use_safetensors: whether a pickled file is refused.
    """

    location: dict[str, Any]
    config: dict[str, Any]
    use_safetensors: bool = False

    @property
    def base(self) -> str:
        """The base's name: a path, from the working directory or else from the adapter's, or a Hugging Face id."""
        base, directory = self.config[_BASE], Path(self.location["path_or_repo_id"])
        inside = directory / base
        return str(inside) if not Path(base).exists() and directory.is_dir() and inside.exists() else base

    def weights_file(self, *, download: bool) -> Path | None:
        """Returns the file of its weights, or None if there is none, or none here and `download` is False."""
        names = [_WEIGHTS] if self.use_safetensors else [_WEIGHTS, _PICKLED_WEIGHTS]
        return next((file for name in names if (file := _find_file(self.location, name, download=download))), None)

    def files(self) -> list[Path]:
        """Returns the adapter's files that are on this machine."""
        weights = self.weights_file(download=False)
        return [] if weights is None else [weights, weights.with_name(CONFIG_FILE)]


def _find_file(location: Mapping[str, Any], name: str, *, download: bool) -> Path | None:
    found = cached_file(
        filename=name,
        **location,
        local_files_only=not download,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=download,
    )
    return None if found is None else Path(found)


def find_adapter(location: Mapping[str, Any], model_kwargs: Mapping[str, Any], where: str) -> Adapter | None:
    """Returns the adapter that a model's directory or repository holds, or None if it holds none.

    Args:
        location: arguments of `from_pretrained` that say where the model is. Of a repository on the Hub the small
            files have been downloaded.
        model_kwargs: the user's arguments of `from_pretrained`.
        where: the flag and the model, for messages.

    Raises:
        UserError: the adapter is not one that can be merged, is beside a whole model, or is a download whose base is
            not a name on the Hub, which could be any path of this machine.
    """
    if "gguf_file" in location:
        return None
    repository = location["pretrained_model_name_or_path"]
    of_files = {"path_or_repo_id": repository, "subfolder": location.get("subfolder", "")}
    of_files |= {"revision": location["revision"]} if location.get("revision") else {}
    file = _find_file(of_files, CONFIG_FILE, download=False)
    if file is None:
        return None
    try:
        config = json.loads(file.read_text())
        is_named = isinstance(config[_BASE], str)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{where}: {CONFIG_FILE} is damaged ({one_line(error)}); save the adapter again") from error
    if not is_named or not config[_BASE]:
        raise UserError(f"{where}: {CONFIG_FILE} names no base; set its {_BASE}")
    _check_kind(config, where)
    if _holds_a_model(file.parent):
        raise UserError(f"{where}: holds a whole model and {CONFIG_FILE}; keep the two in directories of their own")
    if not Path(repository).is_dir() and not is_hub_name(base := config[_BASE]):
        raise UserError(
            f"{where}: a downloaded adapter, whose base {base!r:.80} is not a name on the Hub; download it, and correct"
            f" {_BASE} in its {CONFIG_FILE}"
        )
    return Adapter(of_files, config, bool(model_kwargs.get("use_safetensors")))


def _holds_a_model(directory: Path) -> bool:
    weights = [*directory.glob("*model*.safetensors"), *directory.glob("pytorch_model*.bin")]
    return (directory / "config.json").is_file() and any(not file.name.startswith("adapter_") for file in weights)


def _check_kind(config: Mapping[str, Any], where: str) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{where}: an adapter of the type {config.get('peft_type')!r:.40}, and only LORA is merged into its base;"
            " save the merged model and name that"
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(
            f"{where}: an adapter for {config['task_type']!r:.40}, whose base has another head than a causal language"
            " model; use one for CAUSAL_LM"
        )
    for field in _REFUSED_FIELDS:
        if config.get(field):
            raise UserError(f"{where}: {field} in {CONFIG_FILE} cannot be merged into the base; use another adapter")


def merged_with_adapter(model: PreTrainedModel, adapter: Adapter, where: str) -> PreTrainedModel:
    """Merges an adapter into the weights of its base, whose modules keep their names. The base itself changes.

    The logits of the merged model are compared with those of peft's model on a few tokens.

    Args:
        model: the base.
        adapter: the adapter.
        where: the flag and the model, for messages.

    Raises:
        UserError: the adapter's weights are missing, damaged, or those of another base, or cannot be merged.
    """
    import peft  # takes seconds, and not every environment that loads models has it

    weights = adapter.weights_file(download=True)
    if weights is None:
        raise UserError(f"{where}: holds {CONFIG_FILE} and no {_WEIGHTS}; save or download the adapter again")
    known = peft.LoraConfig.__dataclass_fields__
    if unknown := [name for name, value in adapter.config.items() if value and name not in known]:
        raise UserError(
            f"{where}: peft {peft.__version__} does not know {', '.join(unknown)} in {CONFIG_FILE}; save the merged"
            " model and name that"
        )
    # Without the base's name, which peft would compare with the path that the base was loaded from.
    given = {name: value for name, value in adapter.config.items() if name in known and name != _BASE}
    config = peft.PeftConfig.from_peft_type(**given)
    state = peft.load_peft_weights(str(weights.parent), device="cpu")
    device = model.device
    n_tokens = min(model.config.get_text_config().vocab_size, 8)
    tokens_BT = torch.arange(n_tokens, device=device)[None]
    try:
        with random_states_restored(str(device)), torch.no_grad():
            adapted = peft.get_peft_model(model, config)
            loaded: Any = peft.set_peft_model_state_dict(adapted, state)
            missing = [name for name in loaded.missing_keys if "lora_" in name or "modules_to_save" in name]
            if wrong := sorted(missing + list(loaded.unexpected_keys)):
                raise UserError(
                    f"{where}: {len(wrong)} weights of the adapter are missing or have no place in its base"
                    f" {adapter.base}, {wrong[0]} among them; name the base that it was trained on in {CONFIG_FILE}"
                )
            expected_BTV = adapted.eval()(tokens_BT, use_cache=False).logits.float()
            merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
            logits_BTV = merged.eval()(tokens_BT, use_cache=False).logits.float()
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, NotImplementedError, ImportError) as error:
        raise UserError(
            f"{where}: peft cannot merge it into its base {adapter.base}: {one_line(error)}; name the base that it was"
            f" trained on in {CONFIG_FILE}, or save the merged model and name that"
        ) from error
    difference = ((logits_BTV - expected_BTV).square().mean().sqrt() / expected_BTV.std()).item()
    log.debug("%s: merging changes logits by %.2g of their standard deviation", where, difference)
    largest = _LARGEST_DIFFERENCE.get(model.dtype, _LARGEST_DIFFERENCE_HALF)
    if not difference <= largest:
        raise UserError(
            f"{where}: merged into its base it gives other logits than beside it ({difference:.2g} of their standard"
            " deviation); use another adapter, or --lm_dtype float32"
        )
    return merged
