"""A cache on disk of a run's activations, for later runs on the same model, hook and text.

SAELens's own cache is a data set of contexts in float32 that is read in one fixed order. This cache keeps bfloat16 and
finds a context by its tokens. So a run with another seed, order or filter of positions can use it too, in half the
space and less time (benchmarks/cache_speed.py).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from sae_toolkit.errors import UserError, one_line
from sae_toolkit.model.devices import out_of_memory_answered
from sae_toolkit.model.language_model import LanguageModel

log = logging.getLogger(__name__)

_PARAMETERS, _INDEX, _ACTIVATIONS = "parameters.json", "index.bin", "activations.bin"
_NEW_PARAMETERS, _LOCK = ".parameters.json", ".lock"
_INDEX_ROW = np.dtype([("tokens", "<u8"), ("checksum", "<u8")])


class ActivationCache:
    """A directory of activations, [T, D] in bfloat16 for each row of T tokens.

    A row is found by the hash of its tokens. Its checksum is written after the activations, so a matching checksum
    shows that the row is complete; a row whose checksum does not match is computed again. The files are memory-mapped.

    Args:
        directory: created if it does not exist.
        parameters: what the activations depend on besides the tokens, as JSON. They must equal the recorded ones.
        rows_NT: the rows of tokens that will be read.
        d_in: width D of the activations.

    Raises:
        UserError: the directory holds other activations, is not a cache, or the disk has too little room.
    """

    def __init__(self, directory: Path, parameters: dict[str, Any], rows_NT: np.ndarray, d_in: int) -> None:
        self.directory = directory
        self.shape = (rows_NT.shape[1], d_in)
        self.n_read = self.n_computed = self.n_damaged = 0
        wanted = dict.fromkeys(map(_hash_of_tokens, rows_NT))  # without repetitions, in order
        with _named_in_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            with _locked(directory):
                if not check_cache_directory(directory, parameters):
                    (directory / _NEW_PARAMETERS).write_text(json.dumps(parameters, indent=1) + "\n")
                    (directory / _NEW_PARAMETERS).replace(directory / _PARAMETERS)
                index_path, acts_path = directory / _INDEX, directory / _ACTIVATIONS
                known = np.fromfile(index_path, _INDEX_ROW) if index_path.exists() else np.empty(0, _INDEX_ROW)
                known_tokens = set(known["tokens"].tolist())
                new = [tokens for tokens in wanted if tokens not in known_tokens]
                n_slots = len(known) + len(new)
                row_bytes = 2 * self.shape[0] * self.shape[1]
                _check_room(directory, row_bytes * (n_slots - int((known["checksum"] > 0).sum())))
                with acts_path.open("ab") as file:
                    os.posix_fallocate(file.fileno(), 0, row_bytes * n_slots)  # so that a full disk raises an error now
                index_path.touch()
                os.truncate(index_path, known.nbytes)  # drops a record that an interrupted run left incomplete
                with index_path.open("ab") as file:
                    np.array([(tokens, 0) for tokens in new], _INDEX_ROW).tofile(file)
            self._index = np.memmap(index_path, _INDEX_ROW, "r+", shape=(n_slots,))
            self._acts = np.memmap(acts_path, np.uint16, "r+", shape=(n_slots, *self.shape))
        self._slots = {tokens: slot for slot, tokens in enumerate(self._index["tokens"].tolist())}

    def slots(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Returns the slots [B] of rows of tokens [B, T]."""
        return np.array([self._slots[_hash_of_tokens(tokens_T)] for tokens_T in tokens_BT])

    def holds(self, slot: int) -> bool:
        """Returns whether a slot holds a complete row."""
        checksum = int(self._index[slot]["checksum"])
        if checksum == 0:
            return False
        whole = checksum == _checksum(self._acts[slot])
        self.n_damaged += not whole
        return whole

    def read(self, slots_B: np.ndarray) -> torch.Tensor:
        """Returns activations [B, T, D] in bfloat16, on the CPU."""
        return torch.from_numpy(self._acts[slots_B]).view(torch.bfloat16)

    def write(self, slots_B: np.ndarray, acts_BTD: torch.Tensor) -> None:
        """Writes activations [B, T, D], rounded to bfloat16, into their slots."""
        rows = acts_BTD.to(torch.bfloat16).cpu().contiguous().view(torch.uint16).numpy()
        for slot, row in zip(slots_B, rows, strict=True):
            self._index[slot]["checksum"] = 0
            self._acts[slot] = row
            self._index[slot]["checksum"] = _checksum(row)


class CachedActivations:
    """An `ActivationSource` that reads activations from a cache, and computes and caches those that are missing.

    The language model is loaded only if a row is missing.

    Args:
        cache: a cache that was made for all rows that will be read.
        load_model: loads the model.
        device: where to put the activations.
    """

    dtype = torch.bfloat16

    def __init__(self, cache: ActivationCache, load_model: Callable[[], LanguageModel], device: str) -> None:
        self.cache = cache
        self.device = torch.device(device)
        self._load_model = load_model

    @cached_property
    def model(self) -> LanguageModel:
        """The language model, which is loaded at the first use."""
        return self._load_model()

    def activations(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Returns the activations at the hook, [B, T, D] in bfloat16, for tokens [B, T]."""
        slots_B = self.cache.slots(tokens_BT.numpy())
        missing_B = np.array([not self.cache.holds(slot) for slot in slots_B])
        if missing_B.any():
            acts = self.model.activations(tokens_BT[torch.from_numpy(missing_B)])
            self.cache.write(slots_B[missing_B], acts)
        self.cache.n_computed += int(missing_B.sum())
        self.cache.n_read += int((~missing_B).sum())
        return self.cache.read(slots_B).to(self.device)

    def describe(self) -> str:
        """Returns a line that says how many contexts were read and how many were computed."""
        cache = self.cache
        damaged = f", {cache.n_damaged} of them because their checksums did not match" if cache.n_damaged else ""
        return f"{cache.directory}: {cache.n_read:,} contexts read, {cache.n_computed:,} computed{damaged}"


def _hash_of_tokens(tokens_T: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(tokens_T, dtype="<u4").data)


def _checksum(acts: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(acts.data) or 1  # 0 marks an empty slot


def check_cache_directory(directory: Path, parameters: dict[str, Any]) -> bool:
    """Returns whether a directory is a cache with these parameters; False if it does not exist or is empty.

    Raises:
        UserError: the directory is a cache with other parameters, or holds other files.
    """
    with _named_in_errors(directory):
        if not directory.exists():
            return False
        if not (directory / _PARAMETERS).exists():
            if any(file.name not in (_LOCK, _NEW_PARAMETERS) for file in directory.iterdir()):
                raise UserError(f"--cache_activations {directory}: not empty, and not a cache; name a new directory")
            return False
        _check_parameters(directory, parameters)
    return True


def holds_rows(directory: Path, parameters: dict[str, Any], rows_NT: np.ndarray) -> bool:
    """Returns whether a directory is a cache that has the activations of all rows of tokens.

    Raises:
        UserError: as `check_cache_directory`.
    """
    if not check_cache_directory(directory, parameters):
        return False
    with _named_in_errors(directory):
        path = directory / _INDEX
        known = np.fromfile(path, _INDEX_ROW) if path.exists() else np.empty(0, _INDEX_ROW)
    complete = set(known["tokens"][known["checksum"] > 0].tolist())
    return all(_hash_of_tokens(tokens_T) in complete for tokens_T in rows_NT)


def _check_parameters(directory: Path, parameters: dict[str, Any]) -> None:
    path = directory / _PARAMETERS
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"--cache_activations {directory}: {_PARAMETERS} is damaged; delete the directory")
    for name, value in parameters.items():
        if found.get(name) != value:
            raise UserError(
                f"--cache_activations {directory}: holds activations with {name} {found.get(name)}, and this run's is"
                f" {value}; name another directory"
            )


def _check_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"--cache_activations {directory}: needs {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free there;"
            " free some space or name another directory"
        )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds the directory's lock, so that two runs that start at the same time do not use the same slots."""
    with (directory / _LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _named_in_errors(directory: Path) -> Iterator[None]:
    """Turns an error of the file system, of a damaged file or of memory into a `UserError` that names the directory."""
    where = f"--cache_activations {directory}"
    with out_of_memory_answered(f"{where}: opening it", "free memory, or leave --cache_activations out"):
        try:
            yield
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: {one_line(error)}") from error
