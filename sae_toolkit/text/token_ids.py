"""The tokenizer of a model that has none: it knows special tokens, and shows a token as its id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizer

from sae_toolkit.errors import UserError


class TokenIds(PreTrainedTokenizer):
    """Takes the place of the tokenizer of a model that has none, such as Othello-GPT. It refuses all text.

    Args:
        name: name of the model, for messages.
        n_tokens: size of the model's vocabulary.
        special: token ids by the name of the special token, such as `{"bos_token": 1}`.
    """

    def __init__(self, name: str, n_tokens: int, special: Mapping[str, int]) -> None:
        self._n_tokens = n_tokens
        super().__init__(**{token: str(number) for token, number in special.items()})
        self.name_or_path = name

    @property
    def vocab_size(self) -> int:
        return self._n_tokens

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(self._n_tokens)}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        raise UserError(
            f"--model_name {self.name_or_path}: no tokenizer there, and the text is not tokenized; give rows of token"
            " ids, or save a tokenizer there"
        )

    def _convert_token_to_id(self, token: str) -> int:
        return int(token)

    def _convert_id_to_token(self, index: int) -> str:
        return str(index)
