"""What files that somebody else wrote may ask for: no code, unless a person allowed it, and no other files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME, cached_file

from sae_toolkit.errors import UserError, one_line

# Arguments of Transformers' from_pretrained that a person may set. The others are set here already, or would run code
# (trust_remote_code, weights_only, use_kernels), or put a token on record.
_MODEL_KWARGS = {
    **dict.fromkeys(("attn_implementation", "cache_dir", "offload_folder", "revision", "subfolder", "variant"), str),
    **dict.fromkeys(("force_download", "local_files_only", "use_safetensors"), bool),
    **dict.fromkeys(("max_memory", "quantization_config"), dict),
}
# Those that an SAE may ask for: which weights it was trained on. TransformerLens's own do not concern Transformers.
_SAE_MODEL_KWARGS = ("revision", "subfolder")

_SET = "--set model_from_pretrained_kwargs"
_NAME = re.compile(r"(embedded:)?[\w.-]+(/[\w.-]+)?")


def check_model_kwargs(kwargs: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """Holds a person's arguments for `from_pretrained` to those that are safe and not set elsewhere.

    Raises:
        UserError: one is not among them, or is of another type.
    """
    for name, value in kwargs.items():
        if name == "trust_remote_code":
            raise UserError(f"{_SET}: trust_remote_code is not set there; the flag --trust_remote_code allows it")
        if name in ("token", "use_auth_token"):
            raise UserError(f"{_SET}: a {name} would end up on record; set HF_TOKEN or run `hf auth login` instead")
        if name not in _MODEL_KWARGS:
            raise UserError(f"{_SET}: {name} cannot be set; these can: {', '.join(_MODEL_KWARGS)}")
        if not isinstance(value, _MODEL_KWARGS[name]):
            raise UserError(f"{_SET}: {name} is {value!r:.60}, and must be {_MODEL_KWARGS[name].__name__}")
    if leaves_its_directory(kwargs.get("subfolder", "")):
        raise UserError(f"{_SET}: subfolder {kwargs['subfolder']} is not within the model")
    if "/" in kwargs.get("attn_implementation", "") and not trust_remote_code:
        raise UserError(
            f"{_SET}: attn_implementation {kwargs['attn_implementation']} is code of a Hub repository; read it, and"
            " allow it with --trust_remote_code"
        )


def model_kwargs_of_sae(kwargs: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """What an SAE's record may tell `from_pretrained`: which weights it was trained on; and the names left out."""
    allowed = {
        name: value
        for name, value in kwargs.items()
        if name in _SAE_MODEL_KWARGS and isinstance(value, str) and value and not leaves_its_directory(value)
    }
    return allowed, [name for name in kwargs if name not in allowed]


def leaves_its_directory(path: str) -> bool:
    """Whether a relative path of a downloaded file leads elsewhere."""
    return "\\" in path or "\0" in path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts


def is_hub_name(name: str) -> bool:
    """Whether a name can be a Hub repository's or an embedded one's; else it is a path."""
    return _NAME.fullmatch(name) is not None and ".." not in name


def needs_trust(where: str) -> UserError:
    return UserError(
        f"{where}: comes with code of its own, which it needs run; read it, and allow it with --trust_remote_code"
    )


def check_kernels(config: PreTrainedConfig, where: str) -> None:
    """Refuses a configuration that names an implementation to be fetched from the Hub, which Transformers would run.

    Raises:
        UserError: it does.
    """
    for part in (config, config.get_text_config()):
        for name in ("_attn_implementation", "_experts_implementation"):
            if "/" in str(getattr(part, name, None)):
                raise needs_trust(where)


def check_weight_index(location: Mapping[str, Any], variant: str | None, where: str) -> None:
    """Refuses a model whose index of weight files leads out of its directory, which Transformers would follow.

    Args:
        location: arguments of `from_pretrained`.
        variant: likewise.
        where: the flag and the model, for messages.

    Raises:
        UserError: it does, or it is damaged.
    """
    for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME):
        file = cached_file(
            location["pretrained_model_name_or_path"],
            name.replace(".json", f".{variant}.json") if variant else name,
            subfolder=location.get("subfolder", ""),
            revision=location.get("revision"),
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if file is None:
            continue
        try:
            index = json.loads(Path(file).read_text())
            shards = set(index["weight_map"].values())
            outside = next((shard for shard in shards if leaves_its_directory(shard)), None)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{where}: {Path(file).name} is damaged ({one_line(error)}); fetch it anew") from error
        if outside is not None:
            raise UserError(f"{where}: {Path(file).name} names {outside!r:.80}, which is not within the model")


@contextmanager
def tensors_only(where: str) -> Iterator[None]:
    """Says in one line that a file which torch reads is damaged, or holds more than tensors."""
    try:
        yield
    except UnpicklingError as error:
        raise UserError(
            f"{where}: holds a pickle of more than tensors, which could run any code if it were opened"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise UserError(f"{where}: damaged: {one_line(error)}") from error
