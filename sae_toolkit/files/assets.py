"""Where what was made once is kept, in Hugging Face's cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants


def assets(*parts: str) -> Path:
    """Returns a directory of this project in Hugging Face's cache (HF_HOME). It may not exist yet.

    huggingface_hub's `cached_assets_path` would make it, and raise where it cannot.
    """
    return Path(constants.HF_ASSETS_CACHE, "sae_toolkit", *parts)
