"""The choice of the positions in a context at which an SAE is trained, replaces activations and is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch


@dataclass(frozen=True)
class PositionFilter:
    """Leaves out special tokens, the first positions of a context, massive activations, and parts of conversations.

    The norm of the activation at the first position, and at a few other tokens, can be hundreds of times that of the
    median token (Sun et al. 2024, "Massive Activations in Large Language Models"). If an SAE is trained and scored
    with them, mean squared error and explained variance measure little else.

    Args:
        special_token_ids: tokens left out at every position.
        skip_positions: how many positions at the start of a context are left out.
        max_activation_norm: activations with a larger L2 norm are left out; None keeps all.
        chat_tokens: `assistant` leaves out all but what the assistant says in a conversation, `all` does not; None
            where the text holds no conversations.
    """

    special_token_ids: tuple[int, ...] = ()
    skip_positions: int = 0
    max_activation_norm: float | None = None
    chat_tokens: Literal["all", "assistant"] | None = None

    def keeps_tokens(self, tokens_BT: np.ndarray, assistant_BT: np.ndarray | None = None) -> np.ndarray:
        """Returns [B, T] booleans that are False at special tokens, at skipped positions, and where `keeps_speaker` is.

        Args:
            tokens_BT: [B, T] token ids.
            assistant_BT: [B, T] booleans, True where the assistant speaks. Needed if `chat_tokens` is `assistant`.
        """
        keep_BT = ~np.isin(tokens_BT, self.special_token_ids)
        keep_BT[:, : self.skip_positions] = False
        return keep_BT & self.keeps_speaker(tokens_BT, assistant_BT)

    def keeps_speaker(self, tokens_BT: np.ndarray, assistant_BT: np.ndarray | None) -> np.ndarray:
        """Returns [B, T] booleans that are False where `chat_tokens` leaves out who speaks.

        Args:
            tokens_BT, assistant_BT: as for `keeps_tokens`.

        Raises:
            ValueError: `chat_tokens` is `assistant`, and it is not known where the assistant speaks.
        """
        if self.chat_tokens != "assistant":
            return np.ones(tokens_BT.shape, dtype=bool)
        if assistant_BT is None or assistant_BT.shape != tokens_BT.shape:
            raise ValueError("assistant_BT is missing, or is not of the shape of tokens_BT")
        return np.array(assistant_BT, dtype=bool)

    def keeps_norms(self, acts: torch.Tensor) -> torch.Tensor:
        """Returns booleans that are False at massive activations.

        Args:
            acts: [..., d_in] activations.

        Returns:
            [...] booleans, on the device of `acts`.
        """
        if self.max_activation_norm is None:
            return torch.ones(acts.shape[:-1], dtype=torch.bool, device=acts.device)
        return acts.float().norm(dim=-1) <= self.max_activation_norm

    def described(self, sources: Mapping[str, str]) -> str:
        """Returns a phrase that says which positions are kept.

        Args:
            sources: where each of `chat_tokens`, `exclude_special_tokens`, `skip_positions` and `max_activation_norm`
                comes from, to be named behind it. A setting without a source is shown without one.
        """
        n_special, limit = len(self.special_token_ids), self.max_activation_norm
        without = f"without {n_special} special token{'s' if n_special > 1 else ''}"
        whole = {"all": "whole conversations", "assistant": "what the assistant says"}
        phrases = {
            **({"chat_tokens": whole[self.chat_tokens]} if self.chat_tokens else {}),
            "exclude_special_tokens": without if n_special else "with special tokens",
            "skip_positions": f"from position {self.skip_positions} on",
            "max_activation_norm": "norms of any size" if limit is None else f"norms up to {_shown(limit)}",
        }
        return ", ".join(
            f"{phrase} ({sources[name]})" if name in sources else phrase for name, phrase in phrases.items()
        )


def _shown(norm: float) -> str:
    return f"{norm:,.0f}" if norm >= 1000 else f"{norm:.4g}"
