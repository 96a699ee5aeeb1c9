"""Checks on files that somebody else wrote, so that they run no code without permission and reach no other files."""

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

# The arguments of Transformers' from_pretrained that a user may set. All others are refused: this project sets them
# itself, or they could run code (trust_remote_code, weights_only, use_kernels), or a token would be saved with the run.
_MODEL_KWARGS = {
    **dict.fromkeys(("attn_implementation", "cache_dir", "offload_folder", "revision", "subfolder", "variant"), str),
    **dict.fromkeys(("force_download", "local_files_only", "use_safetensors"), bool),
    **dict.fromkeys(("max_memory", "quantization_config"), dict),
}
# The arguments that an SAE's metadata may set: they choose the weights that the SAE was trained on. Metadata may hold
# arguments of TransformerLens too, which Transformers does not know.
_SAE_MODEL_KWARGS = ("revision", "subfolder")

_SET = "--set model_from_pretrained_kwargs"
_NAME = re.compile(r"(embedded:)?[\w.-]+(/[\w.-]+)?")


def check_model_kwargs(kwargs: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """Checks the user's arguments for `from_pretrained`. Safe arguments that this project does not set are allowed.

    Args:
        kwargs: the arguments by name.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        UserError: an argument is not allowed or has the wrong type.
    """
    for name, value in kwargs.items():
        if name == "trust_remote_code":
            raise UserError(f"{_SET}: trust_remote_code cannot be set here; use the flag --trust_remote_code")
        if name in ("token", "use_auth_token"):
            raise UserError(f"{_SET}: a {name} would be saved with the run; set HF_TOKEN or run `hf auth login`")
        if name not in _MODEL_KWARGS:
            raise UserError(f"{_SET}: {name} cannot be set; use one of {', '.join(_MODEL_KWARGS)}")
        if not isinstance(value, _MODEL_KWARGS[name]):
            raise UserError(f"{_SET}: {name} is {value!r:.60}, and must be {_MODEL_KWARGS[name].__name__}")
    if leaves_its_directory(kwargs.get("subfolder", "")):
        raise UserError(f"{_SET}: subfolder {kwargs['subfolder']} is not within the model")
    if "/" in kwargs.get("attn_implementation", "") and not trust_remote_code:
        raise UserError(
            f"{_SET}: attn_implementation {kwargs['attn_implementation']} is code of a Hub repository; read the"
            " code, and allow it with --trust_remote_code"
        )


def model_kwargs_of_sae(kwargs: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Returns the arguments for `from_pretrained` that an SAE's metadata may set, and the names of the others."""
    allowed = {
        name: value
        for name, value in kwargs.items()
        if name in _SAE_MODEL_KWARGS and isinstance(value, str) and value and not leaves_its_directory(value)
    }
    return allowed, [name for name in kwargs if name not in allowed]


def leaves_its_directory(path: str) -> bool:
    """Returns whether a path that a downloaded file gives could lead out of the file's directory."""
    return "\\" in path or "\0" in path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts


def is_hub_name(name: str) -> bool:
    """Returns whether a name has the form of a Hub id or of an embedded model or text. If not, it is a path."""
    return _NAME.fullmatch(name) is not None and ".." not in name


def needs_trust(where: str) -> UserError:
    """Returns the error for a model that needs `--trust_remote_code`. `where` is the flag and the model."""
    return UserError(
        f"{where}: comes with code of its own and needs to run it; read the code, and allow it with --trust_remote_code"
    )


def check_kernels(config: PreTrainedConfig, where: str) -> None:
    """Refuses a configuration that names an implementation on the Hub, which Transformers would download and run.

    Args:
        config: the model's configuration.
        where: the flag and the model, for messages.

    Raises:
        UserError: the configuration names one.
    """
    for part in (config, config.get_text_config()):
        for name in ("_attn_implementation", "_experts_implementation"):
            if "/" in str(getattr(part, name, None)):
                raise needs_trust(where)


def check_weight_index(location: Mapping[str, Any], variant: str | None, where: str) -> None:
    """Refuses a model whose index of weight files names a file outside its directory, which Transformers would read.

    Args:
        location: arguments of `from_pretrained` that say where the model is.
        variant: the argument `variant` of `from_pretrained`.
        where: the flag and the model, for messages.

    Raises:
        UserError: the index names a file outside the directory, or is damaged.
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
            raise UserError(f"{where}: {Path(file).name} is damaged ({one_line(error)}); download it again") from error
        if outside is not None:
            raise UserError(f"{where}: {Path(file).name} names {outside!r:.80}, which is not within the model")


@contextmanager
def tensors_only(where: str) -> Iterator[None]:
    """Context manager that turns torch's errors for a damaged file, or one that holds code, into a `UserError`.

    Args:
        where: the flag and the file, for messages.
    """
    try:
        yield
    except UnpicklingError as error:
        raise UserError(
            f"{where}: holds a pickle of more than tensors, which could run any code if it were opened; use another"
            " copy of the file"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise UserError(f"{where}: damaged: {one_line(error)}") from error
