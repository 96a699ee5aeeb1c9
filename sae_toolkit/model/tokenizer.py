"""Loads the tokenizer of a model, or says what its special tokens are if it has no tokenizer."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from sae_toolkit.errors import UserError
from sae_toolkit.files.connection import retrying
from sae_toolkit.model.adapters import CONFIG_FILE as ADAPTER_CONFIG
from sae_toolkit.model.loading import ModelSource, errors_of_files
from sae_toolkit.text.token_ids import TokenIds

log = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "spiece.model", "*.tiktoken")


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer. If it has no BOS token, its EOS token becomes the BOS token.

    An adapter's own tokenizer comes before that of its base. If there is none, the special tokens are those of the
    model's configuration, and the tokenizer that is returned refuses all text.

    Raises:
        UserError: Transformers cannot load the tokenizer.
    """
    if source.adapter is not None:
        of_adapter = source.adapter.location
        location = {"pretrained_model_name_or_path": of_adapter["path_or_repo_id"], "trust_remote_code": False}
        location |= {key: value for key, value in of_adapter.items() if key != "path_or_repo_id"}
        if (tokenizer := _tokenizer_at(location, source.name)) is not None:
            return tokenizer
    tokenizer = _tokenizer_at(source.location, source.name)
    return _without_tokenizer(source) if tokenizer is None else tokenizer


def _tokenizer_at(location: dict[str, Any], name: str) -> PreTrainedTokenizerBase | None:
    """Returns the tokenizer in a model's directory or repository; None if no file there is of a tokenizer."""
    try:
        with errors_of_files(f"--model_name {name}: no tokenizer"):
            tokenizer = retrying(f"--model_name {name}", lambda: AutoTokenizer.from_pretrained(**location))
    except UserError:
        if _has_tokenizer_files(location):
            raise
        return None
    # Without files Transformers makes a tokenizer of the model's family that knows nothing but special tokens.
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
        return None
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is not None:
        # TransformerLens does the same: the contexts of models without a BOS token start with EOS.
        tokenizer.bos_token = tokenizer.eos_token
    return tokenizer


def _has_tokenizer_files(location: dict[str, Any]) -> bool:
    if "gguf_file" in location:
        return True
    name, subfolder = location["pretrained_model_name_or_path"], location.get("subfolder") or ""
    directory = Path(name, subfolder)
    if not Path(name).is_dir():
        of_model = (
            try_to_load_from_cache(name, str(Path(subfolder, file)), revision=location.get("revision"))
            for file in ("config.json", ADAPTER_CONFIG)
        )
        directory = next(Path(file).parent for file in of_model if isinstance(file, str))
    return any(file.match(pattern) for file in directory.iterdir() for pattern in _TOKENIZER_FILES)


def _without_tokenizer(source: ModelSource) -> TokenIds:
    """Returns what takes the place of a model's tokenizer. It has the special tokens that the model's files name."""
    config = source.config.get_text_config()
    try:
        which: dict[str, Any] = {
            key: source.location[key] for key in ("revision", "subfolder") if source.location.get(key)
        }
        named: Any = GenerationConfig.from_pretrained(source.location["pretrained_model_name_or_path"], **which)
    except OSError:  # there is none
        named = config
    special = {}
    for name in ("bos", "eos", "pad"):
        ids = getattr(named, f"{name}_token_id", None)
        number = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(number, int) and 0 <= number < config.vocab_size:
            special[f"{name}_token"] = number
    _say_no_tokenizer(source.name, tuple(special.items()))
    return TokenIds(source.name, config.vocab_size, special)


@cache
def _say_no_tokenizer(model: str, special: tuple[tuple[str, int], ...]) -> None:
    known = ", ".join(f"{number} ({name.partition('_')[0].upper()})" for name, number in special)
    log.info(
        "%s has no tokenizer: tokens are shown as their ids, and %s",
        model,
        f"the special tokens are {known}, by its configuration" if known else "none of them is special",
    )
