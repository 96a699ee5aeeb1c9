"""Reads what wandb recorded offline: protocol buffers in LevelDB's log format."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK, _FILE_HEADER, _HEADER = 32_768, 7, struct.Struct("<IHB")
_FULL, _LAST = 1, 4


@dataclass
class OfflineRun:
    """One offline run's directory, its history rows and its summary, values as JSON text."""

    id: str
    history: list[dict[str, str]] = field(default_factory=list)
    summary: dict[str, str] = field(default_factory=dict)


def read_offline_runs(directory: Path) -> list[OfflineRun]:
    """The offline runs below {directory}/wandb, oldest first."""
    runs = []
    for file in sorted(directory.glob("wandb/offline-run-*/run-*.wandb")):
        run = OfflineRun(file.stem.removeprefix("run-"))
        for data in _records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                run.history.append(_items(record.history.item))
            if record.HasField("summary"):
                run.summary |= _items(record.summary.update)
        runs.append(run)
    return runs


def _items(items: Any) -> dict[str, str]:
    return {"/".join(item.nested_key) or item.key: item.value_json for item in items}


def _records(data: bytes) -> Iterator[bytes]:
    position, parts = _FILE_HEADER, b""
    while position + _HEADER.size <= len(data):
        if _BLOCK - position % _BLOCK < _HEADER.size:  # the rest of a block that no header fits into
            position += _BLOCK - position % _BLOCK
            continue
        _checksum, length, kind = _HEADER.unpack_from(data, position)
        parts += data[position + _HEADER.size : position + _HEADER.size + length]
        position += _HEADER.size + length
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""
