"""Recognizes conversations in the values of a data set, and reads them as messages with a role and a text."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import numpy as np

from sae_toolkit.text.records import Bad, Conversation, Row, value_at

# The names that data sets give to who speaks and to what is said: OpenAI's, and ShareGPT's.
_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai"), "assistant"),
}
# Fields of a message that say something which its text leaves out.
_BESIDE_THE_TEXT = (
    *("tool_calls", "function_call", "images", "image", "audio", "videos"),
    *("reasoning_content", "reasoning", "thinking"),
)


def is_conversation(value: Any) -> bool:
    """Returns whether a value is a list of messages, each with `role` and `content` or with `from` and `value`."""
    messages = _messages(value)
    return messages is not None and any(isinstance(m, Mapping) and _keys_of(m) is not None for m in messages[:1])


def conversation_document(row: Row, column: str) -> Conversation | Bad:
    """Returns the conversation in a column of a row, or why it cannot be used.

    The names of roles become `system`, `user` and `assistant`. If the content of a message is a list of parts of
    text, they are joined without anything between them.
    """
    messages = _messages(value_at(row, column))
    if messages is None:
        value = value_at(row, column)
        return Bad(f"its {column!r} is {'null' if value is None else type(value).__name__}, not a list of messages")
    read = []
    for place, message in enumerate(messages, 1):
        one = _read_message(message)
        if isinstance(one, Bad):
            return Bad(f"message {place} of its {column!r} {one.reason}")
        read.append(one)
    return Conversation(tuple(read))


def _messages(value: Any) -> list[Any] | None:
    """Returns the messages of a value, or None. `datasets` can store a list of messages as a dictionary of lists."""
    if isinstance(value, Mapping) and (keys := _keys_of(value)) is not None:
        columns = [value[key] for key in keys]
        if not all(isinstance(column, list | tuple | np.ndarray) for column in columns):
            return None
        return [dict(zip(keys, pair, strict=False)) for pair in zip(*columns, strict=False)]
    return list(value) if isinstance(value, list | tuple | np.ndarray) else None


def _keys_of(message: Mapping[str, Any]) -> tuple[str, str] | None:
    return next((keys for keys in _KEYS if all(key in message for key in keys)), None)


def _read_message(message: Any) -> tuple[str, str] | Bad:
    """Returns the role and the text of a message, or why it cannot be used, without its subject."""
    if not isinstance(message, Mapping) or (keys := _keys_of(message)) is None:
        return Bad("has no role and content")
    role, content = (message[key] for key in keys)
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        return Bad(f"has the role {role!r:.40}, which is none of system, user and assistant")
    for name in _BESIDE_THE_TEXT:
        if (value := message.get(name)) is not None and not (isinstance(value, Sized) and len(value) == 0):
            return Bad(f"holds {name}, which is beside its text")
    if isinstance(content, list | tuple | np.ndarray):
        if not all(_is_text_part(part) for part in content):
            return Bad("holds parts that are no text")
        content = "".join(part if isinstance(part, str) else part["text"] for part in content)
    if not isinstance(content, str):
        return Bad(f"is {'null' if content is None else type(content).__name__}, not text")
    try:
        content.encode()
    except UnicodeEncodeError:  # JSON can write half a surrogate pair
        return Bad("is not valid Unicode")
    return known, content


def _is_text_part(part: Any) -> bool:
    if isinstance(part, Mapping):
        return part.get("type", "text") == "text" and isinstance(part.get("text"), str)
    return isinstance(part, str)
