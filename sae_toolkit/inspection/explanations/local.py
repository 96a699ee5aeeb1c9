"""Finds a language model that can judge in this process. Without delphi, so that it can be looked for at once."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from sae_toolkit.errors import UserError
from sae_toolkit.model.loading import ModelSource, find_model
from sae_toolkit.model.tokenizer import load_tokenizer
from sae_toolkit.text.token_ids import TokenIds


def find_judge(name: str) -> tuple[ModelSource, PreTrainedTokenizerBase]:
    """Returns a model, whose weights are not loaded, and its tokenizer, which has a chat template.

    Raises:
        UserError: there is no such model, or it was not tuned to follow instructions.
    """
    try:
        source = find_model(name)
        tokenizer = load_tokenizer(source)
    except UserError as error:
        raise UserError(str(error).replace("--model_name", "--explain")) from error
    if isinstance(tokenizer, TokenIds) or not tokenizer.chat_template:
        raise UserError(f"--explain {name}: has no chat template; name a model that was tuned to follow instructions")
    return source, tokenizer
