"""Directories that are whole or absent: written beside, checksummed, synced, renamed, and checked when read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError

from sae_toolkit.errors import UserError, one_line

MANIFEST_FILENAME = "manifest.json"
_PARTIAL = ".{}.partial"


class NotSaved(Exception):
    """A directory could not be written, and is absent; what was there before is as it was."""


@contextmanager
def whole_directory(target: Path, **about: Any) -> Iterator[Path]:
    """A directory to write into, which takes the target's name once all of it is on the disk.

    Its manifest has the size and checksum of each file. Killed at any moment this leaves the target as it was, or
    new and whole; never a part. A target that is there and whole stays.

    Args:
        target: its parent is made.
        about: what else the manifest records, as JSON.

    Raises:
        NotSaved: the disk is full, or fails.
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
            if path.is_file():  # safetensors writes files that only their owner may read
                path.chmod(partial.stat().st_mode & 0o666)  # as the person's umask says
            _sync(path)
        if target.exists():
            try:
                check_manifest(target, str(target))
                return  # a run that was resumed comes by the same place again
            except UserError:
                shutil.rmtree(target)
        partial.replace(target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise NotSaved(one_line(error)) from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
            raise
        raise NotSaved(one_line(error)) from error  # how torch.save says that the disk is full
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_manifest(directory: Path, where: str) -> dict[str, Any]:
    """Holds a directory's files against its manifest, if it has one; files that the manifest does not name are fine.

    Args:
        where: the flag and directory, for messages.

    Returns:
        What the manifest says of the directory; empty if there is none.

    Raises:
        UserError: a file is missing or is not what was written.
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
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{where}: damaged: {MANIFEST_FILENAME} names a file that is not within it")
        file = directory / name
        if not file.is_file():
            raise UserError(f"{where}: incomplete: {name} is missing")
        if _size_and_checksum(file) != written:
            raise UserError(
                f"{where}: damaged: {name} is not what was written there; if you changed it yourself, delete"
                f" {MANIFEST_FILENAME}"
            )
    return manifest


def remove_partial_directories(parent: Path) -> None:
    """Removes what a process that was killed had begun to write."""
    for partial in parent.glob(_PARTIAL.format("*")):
        shutil.rmtree(partial, ignore_errors=True)


def _size_and_checksum(file: Path) -> dict[str, Any]:
    """XXH3 of 128 bits, against damage and mix-ups; no protection against somebody who means harm."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
    return {"bytes": file.stat().st_size, "xxh3_128": digest.hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
