"""Writes directories as a whole or not at all, and checks them by a manifest of checksums.

A directory is written under another name, checksummed, synced to the disk and then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError

from sae_toolkit.errors import UserError, is_disk_full, is_out_of_memory, one_line
from sae_toolkit.files.trust import leaves_its_directory

MANIFEST_FILENAME = "manifest.json"
_PARTIAL = ".{}.partial"


class NotSaved(Exception):
    """A directory could not be written. What was there before is unchanged."""


@contextmanager
def whole_directory(target: Path, **about: Any) -> Iterator[Path]:
    """Context manager that yields a new directory to write into, and renames it to the target once it is on the disk.

    A manifest with the size and checksum of each file is added. If the process is killed at any moment, the target is
    either as it was before or new and complete. If the target exists and is complete already, it is kept.

    Args:
        target: the directory to make; its parent is made if needed.
        about: more entries for the manifest, as JSON values.

    Raises:
        NotSaved: the disk is full or fails, or there is too little memory to write from.
    """
    partial = target.with_name(_PARTIAL.format(target.name))
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        names = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
        files = {name: _size_and_checksum(partial / name) for name in names}
        (partial / MANIFEST_FILENAME).write_text(json.dumps(about | {"files": files}, indent=1) + "\n")
        for path in (*partial.rglob("*"), partial):
            if path.is_file():  # safetensors writes files that only their owner may read, whatever the umask
                path.chmod(partial.stat().st_mode & 0o666)
            _sync(path)
        if target.exists():
            try:
                check_manifest(target, str(target))
                return  # a resumed run writes the same checkpoint again
            except UserError:
                shutil.rmtree(target)
        partial.replace(target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise NotSaved(one_line(error)) from error
    except (RuntimeError, MemoryError) as error:
        if not is_disk_full(error) and not is_out_of_memory(error):
            raise
        raise NotSaved(one_line(error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_about(directory: Path, about: dict[str, Any]) -> bool:
    """Returns whether a directory is whole, and what it was written about."""
    try:
        return check_manifest(directory, str(directory)).get("about") == about
    except UserError:
        return False


def check_manifest(directory: Path, where: str) -> dict[str, Any]:
    """Checks the files of a directory against its manifest. Files that the manifest does not name are ignored.

    Args:
        directory: the directory.
        where: the flag and the directory, for messages.

    Returns:
        The manifest; empty if the directory has none.

    Raises:
        UserError: a file is missing or has changed, or the manifest is damaged.
    """
    path = directory / MANIFEST_FILENAME
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text())
        files = dict(manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{where}: damaged: {MANIFEST_FILENAME} cannot be read") from None
    for name, written in files.items():
        if leaves_its_directory(name):
            raise UserError(f"{where}: damaged: {MANIFEST_FILENAME} names a file that is not within it")
        file = directory / name
        if not file.is_file():
            raise UserError(f"{where}: incomplete: {name} is missing")
        if _size_and_checksum(file) != written:
            raise UserError(
                f"{where}: damaged: {name} is not what was written there; take another copy, or delete"
                f" {MANIFEST_FILENAME} if you changed the file yourself"
            )
    return manifest


def remove_partial_directories(parent: Path) -> None:
    """Removes the directories that killed processes left unfinished."""
    for partial in parent.glob(_PARTIAL.format("*")):
        shutil.rmtree(partial, ignore_errors=True)


def _size_and_checksum(file: Path) -> dict[str, Any]:
    """Returns a file's manifest entry. XXH3 (128 bits) finds damage and mix-ups; it does not stop an attacker."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, xxhash.xxh3_128)
    return {"bytes": file.stat().st_size, "xxh3_128": digest.hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
