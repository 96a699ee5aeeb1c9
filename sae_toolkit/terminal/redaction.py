"""Keeps access tokens, keys and passwords out of what this project prints, logs and saves."""

from __future__ import annotations

import os
import re

# Where the libraries look for a token. Shorter values are no tokens, and would hide ordinary words.
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
_SHORTEST = 8

_HIDDEN = "[hidden]"
_TOKENS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}"  # the Hugging Face Hub's
    r"|wandb_v\d+_\w{16,}|local-[0-9a-f]{40})\b"  # wandb's; its old ones, 40 hex digits, look like commits
)
# What stands after these is secret: `https://` before a user and an `@`, `Bearer`, `?token=`, `api_key: `.
_AFTER = re.compile(
    r"(?P<before>://)[^/\s@'\"]+(?=@)"
    r"|(?P<scheme>\bBearer )[^\s'\"]+"
    r"|(?P<parameter>[?&][\w-]*(?:token|signature|secret|password|api_?key)[\w-]*=)[^&\s'\"]+"
    r"|(?P<key>(?<![A-Za-z])api[_ -]?key['\"]?\s*[:=]\s*['\"]?)[^\s'\",}]{8,}",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """A text with `[hidden]` in place of tokens: those of this process's environment, and what looks like one."""
    for name in _VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= _SHORTEST:
            text = text.replace(value, _HIDDEN)
    text = _TOKENS.sub(_HIDDEN, text)
    return _AFTER.sub(lambda match: (match[match.lastgroup] if match.lastgroup else "") + _HIDDEN, text)


def holds_secret(text: str) -> bool:
    return redact(text) != text
