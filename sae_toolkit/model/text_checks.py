"""Checks that a text is one for a model: its token ids, and the text of a synthetic model."""

from __future__ import annotations

import numpy as np

from sae_toolkit.errors import UserError
from sae_toolkit.model.loading import ModelSource
from sae_toolkit.synthetic.directory import is_synthetic
from sae_toolkit.synthetic.language_model import ROW_LENGTH


def check_fits_text(source: ModelSource, text_name: str, context_size: int, flag: str, context_flag: str) -> None:
    """Checks that a synthetic model gets its own text in whole rows, and that no other model gets it.

    Args:
        source: the model.
        text_name: name of the text.
        context_size: tokens in a context.
        flag, context_flag: the flags that named the text and the size of contexts, for messages.

    Raises:
        UserError: they do not fit together.
    """
    if not source.is_synthetic and not is_synthetic(text_name):
        return
    if source.name != text_name:
        raise UserError(
            f"{flag} {text_name}: not the text of {source.name}; a synthetic model and its text have the same name, so"
            f" give {flag} {source.name if source.is_synthetic else 'another text'}"
        )
    if context_size != ROW_LENGTH:
        raise UserError(
            f"{context_flag} {context_size}: the rows of {text_name} are of {ROW_LENGTH} tokens and cannot be cut; give"
            f" {context_flag} {ROW_LENGTH}"
        )


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
