"""Removes access tokens, keys and passwords from what this project prints, logs and saves."""

from __future__ import annotations

import os
import re

# The libraries look for a token in these variables.
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY")
_SHORTEST = 8  # a shorter value is not a token, and replacing it would hide ordinary words

_HIDDEN = "[hidden]"
_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}"  # of the Hugging Face Hub
    r"|wandb_v\d+_\w{16,}|local-[0-9a-f]{40}"  # of wandb; its old keys, 40 hex digits, look like git commits
    r"|sk-(?:[a-z0-9]+-){0,3}\w{20,})\b"  # of OpenAI and those who follow it
)
# The text right after one of these is a secret: `https://` (up to an `@`), `Bearer`, `?token=`, `api_key: `.
_AFTER = re.compile(
    r"(?P<before>://)[^/\s@'\"]+(?=@)"
    r"|(?P<scheme>\bBearer )[^\s'\"]+"
    r"|(?P<parameter>[?&][\w-]*(?:token|signature|secret|password|api_?key)[\w-]*=)[^&\s'\"]+"
    r"|(?P<key>(?<![A-Za-z])api[_ -]?key['\"]?\s*[:=]\s*['\"]?)[^\s'\",}]{8,}",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """Returns a text with `[hidden]` in place of each token, key and password.

    Secrets are the values of the environment variables in `_VARIABLES`, and everything that has the form of a secret.
    """
    for name in _VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= _SHORTEST:
            text = text.replace(value, _HIDDEN)
    text = _TOKENS.sub(_HIDDEN, text)
    return _AFTER.sub(lambda match: (match[match.lastgroup] if match.lastgroup else "") + _HIDDEN, text)


def holds_secret(text: str) -> bool:
    """Returns whether a text holds a token, key or password."""
    return redact(text) != text
