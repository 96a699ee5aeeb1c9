"""The text of a synthetic model: rows of token ids that its language model predicts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
import xxhash

from sae_toolkit.files.assets import assets
from sae_toolkit.synthetic.language_model import ROW_LENGTH, SyntheticForCausalLM, load_synthetic, samples_of_row

log = logging.getLogger(__name__)

_ROWS_IN_FILE = 64


def rows_of_text(directory: Path) -> Iterator[np.ndarray]:
    """Yields the rows of token ids [ROW_LENGTH] of a synthetic model's text, as many as it has tokens.

    The first token is the number of the row. Each other token is drawn from what the language model predicts there.
    Rows that were drawn once are kept in Hugging Face's cache, and read there the next time.

    Args:
        directory: as `synthetic_directory` returns it.
    """
    model = _model_of_text(directory)
    kept = assets("synthetic", f"text-{_digest(directory)}")
    for first in range(0, model.config.vocab_size, _ROWS_IN_FILE):
        file = kept / f"{first}.npy"
        try:
            rows_NT = np.load(file)
        except (OSError, ValueError):  # not there yet, or cut off
            rows_NT = np.stack([_row(model, row) for row in range(first, first + _ROWS_IN_FILE)])
            with suppress(OSError):  # without room they are drawn again
                kept.mkdir(parents=True, exist_ok=True)
                partial = file.with_name(f"{first}.{os.getpid()}.npy")
                np.save(partial, rows_NT)
                partial.replace(file)
        yield from rows_NT


@cache
def _model_of_text(directory: Path) -> SyntheticForCausalLM:
    return load_synthetic(directory, "cpu", torch.float32, str(directory))


def _digest(directory: Path) -> str:
    """Returns what identifies the synthetic model in a directory, wherever that lies."""
    digest = xxhash.xxh3_128()
    for file in sorted((*directory.glob("*.json"), *directory.glob("*.safetensors"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _row(model: SyntheticForCausalLM, row: int) -> np.ndarray:
    acts_TD = samples_of_row(model.synthetic, row, ROW_LENGTH)
    n_tokens = model.config.vocab_size
    cumulated_TV = model.lm_head(acts_TD[:-1]).softmax(dim=-1).cumsum(dim=-1)
    generator = torch.Generator().manual_seed(row)
    drawn_T = torch.rand(ROW_LENGTH - 1, generator=generator) * cumulated_TV[:, -1]
    tokens_T = torch.searchsorted(cumulated_TV, drawn_T[:, None])[:, 0].clamp(max=n_tokens - 1)
    return np.concatenate(([row], tokens_T.numpy())).astype(np.uint32)
