"""Writes every activation of features as delphi caches them, so that delphi's own code reads it.

The format is that of `LatentCache.save_splits` and `save_config` in delphi/latents/cache.py (eai-delphi 0.1.3): in
`latents` below a directory of the hook's name, files `FIRST_LAST.safetensors` of ranges of features with

    locations [N, 3]: row, position and feature less FIRST, of each activation
    activations [N]: its value in float16
    tokens [rows, context]: all token ids

and config.json. As there, activations of a magnitude of 1e-5 or less are left out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.numpy import save_file

from sae_toolkit.errors import UserError
from sae_toolkit.files.whole_directory import NotSaved, is_about, whole_directory
from sae_toolkit.inspection.run import InspectedSAE, encoded_rows
from sae_toolkit.model.devices import out_of_memory_answered
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.terminal.progress import Progress

DIRECTORY, LATENTS = "delphi", "latents"
WINDOW = 32  # tokens of an example; delphi's default, of which a row must be a multiple
_SMALLEST = 1e-5
_FIRINGS_OF_A_FILE = 2**24  # 230 MiB at most
_LOCATION = np.dtype("<u4")


def export_latents(inspected: InspectedSAE, model: LanguageModel, batch_size: int) -> Path:
    """Writes the activations of all features into the directory `delphi` beside features.parquet.

    Returns:
        The directory of the hook in it, which holds the files.

    Raises:
        UserError: as `write_latents`.
    """
    directory = inspected.directory / DIRECTORY
    features = list(range(inspected.evaluated.sae.cfg.d_sae))
    return write_latents(inspected, model, features, directory, about={}, batch_size=batch_size)


def write_latents(
    inspected: InspectedSAE,
    model: LanguageModel,
    features: Sequence[int],
    directory: Path,
    *,
    about: dict[str, Any],
    batch_size: int,
) -> Path:
    """Runs the rows of text through the model again, and writes the activations of features.

    Memory is bounded: activations go to the disk as they come, in ranges of features, and one range is read at a time.

    Args:
        inspected: the SAE, and how often its features fire.
        model: the language model, hooked where the SAE is.
        features: indices of the features whose activations are written.
        directory: where; written whole or not at all. What is there with the same `about` is kept.
        about: what the activations depend on.
        batch_size: rows in one forward pass.

    Returns:
        The directory of the hook below it.

    Raises:
        UserError: the disk is full, or the memory does not suffice.
    """
    prepared = inspected.prepared
    target = directory / LATENTS / prepared.hook_name
    if directory.is_dir():
        if about and is_about(directory, about):
            return target
        shutil.rmtree(directory)
    n_firings_F = np.zeros(inspected.evaluated.sae.cfg.d_sae, np.int64)
    n_firings_F[list(features)] = inspected.statistics.n_firings_F.cpu().numpy()[list(features)]
    ranges = _ranges(n_firings_F)
    where = f"{directory}: {int(n_firings_F.sum()):,} activations"
    try:
        with (
            whole_directory(directory, about=about) as partial,
            out_of_memory_answered(where, "lower --batch_size or --tokens"),
        ):
            of_hook = partial / LATENTS / prepared.hook_name
            of_hook.mkdir(parents=True)
            _write_ranges(inspected, model, sorted(features), ranges, of_hook, batch_size)
            (of_hook / "config.json").write_text(json.dumps(_config(inspected), indent=4) + "\n")
    except NotSaved as error:
        raise UserError(f"{where} cannot be written: {error}; free some space, or give --output") from None
    return target


def _ranges(n_firings_F: np.ndarray) -> list[tuple[int, int]]:
    """Returns ranges of features, first and last, each with as many firings as one file takes, or one feature."""
    ranges, first, n = [], 0, 0
    for feature, n_firings in enumerate(n_firings_F.tolist()):
        if n and n + n_firings > _FIRINGS_OF_A_FILE:
            ranges.append((first, feature - 1))
            first, n = feature, 0
        n += n_firings
    return [*ranges, (first, len(n_firings_F) - 1)]


def rows_of_windows(rows_NT: np.ndarray) -> np.ndarray:
    """Returns the rows without the tokens at their ends that do not fill a window."""
    return rows_NT[:, : rows_NT.shape[1] - rows_NT.shape[1] % WINDOW]


@torch.no_grad()
def _write_ranges(
    inspected: InspectedSAE,
    model: LanguageModel,
    features: list[int],
    ranges: list[tuple[int, int]],
    directory: Path,
    batch_size: int,
) -> None:
    sae = inspected.evaluated.sae.to(inspected.prepared.device)
    files = [
        (_Appended(directory / f"{first}.locations"), _Appended(directory / f"{first}.values")) for first, _ in ranges
    ]
    starts_R = np.array([first for first, _ in ranges])
    try:
        for location_N3, value_N in _firings(inspected, model, features, batch_size):
            range_N = np.searchsorted(starts_R, location_N3[:, 2], side="right") - 1
            for r in np.unique(range_N):
                chosen = range_N == r
                shifted_N3 = location_N3[chosen]
                shifted_N3[:, 2] -= starts_R[r].astype(_LOCATION)
                files[r][0].append(shifted_N3)
                files[r][1].append(value_N[chosen])
        tokens = np.ascontiguousarray(rows_of_windows(inspected.prepared.rows_NT)).astype(np.int64)
        for (first, last), (locations, values) in zip(ranges, files, strict=True):
            location_N3 = locations.read(_LOCATION).reshape(-1, 3)
            fits = max(len(tokens), last - first + 1, tokens.shape[1]) <= 2**16  # as delphi chooses between the two
            save_file(
                {
                    "locations": location_N3.astype(np.uint16 if fits else np.uint32),
                    "activations": values.read(np.dtype("<f2")),
                    "tokens": tokens,
                },
                directory / f"{first}_{last}.safetensors",
            )
    finally:
        for pair in files:
            for file in pair:
                file.remove()
        sae.to("cpu")


def _firings(
    inspected: InspectedSAE, model: LanguageModel, features: list[int], batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields rows, positions and features [N, 3] and values [N] of the firings of these features, a batch at a time."""
    prepared = inspected.prepared
    rows_NT = prepared.rows_NT
    n_used = rows_of_windows(rows_NT).shape[1]
    index_F = torch.tensor(features, device=inspected.evaluated.sae.device)
    is_all = len(features) == inspected.evaluated.sae.cfg.d_sae
    with Progress("activations of features", rows_NT.size) as progress:
        for start in range(0, len(rows_NT), batch_size):
            rows = slice(start, start + batch_size)
            batch_BT = rows_NT[rows].astype(np.int64)
            acts_BTD = model.activations(torch.from_numpy(batch_BT)).flatten(2)
            for first, features_BTF, _ in encoded_rows(inspected, batch_BT, acts_BTD, prepared.assistant_at(rows)):
                of_features_BTF = features_BTF[:, :n_used] if is_all else features_BTF[:, :n_used, index_F]
                at_N3 = (of_features_BTF.abs() > _SMALLEST).nonzero()
                value_N = of_features_BTF[tuple(at_N3.T)].clamp(-65504, 65504).half()  # what float16 holds
                at_N3[:, 0] += start + first
                at_N3[:, 2] = index_F[at_N3[:, 2]]
                yield at_N3.cpu().numpy().astype(_LOCATION), value_N.cpu().numpy()
            progress.advance(batch_BT.size)


class _Appended:
    """A file of numbers that grows, and is read whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO = path.open("wb")

    def append(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values).tobytes())

    def read(self, dtype: np.dtype) -> np.ndarray:
        self._file.close()
        return np.fromfile(self._path, dtype)

    def remove(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


def _config(inspected: InspectedSAE) -> dict[str, Any]:
    """Returns what delphi's CacheConfig records, with the names of this project's model and text."""
    prepared = inspected.prepared
    tokens = rows_of_windows(prepared.rows_NT)
    return {
        "dataset_repo": prepared.text.name,
        "dataset_split": prepared.text.split,
        "dataset_name": prepared.text.config or "",
        "dataset_column": "text",
        "batch_size": 1,
        "cache_ctx_len": tokens.shape[1],
        "ctx_len": tokens.shape[1],
        "n_tokens": int(tokens.size),
        "n_splits": 1,
        "model_name": prepared.model.name,
    }
