"""Reads what wandb recorded offline: protocol buffers in LevelDB's log format."""

from __future__ import annotations

import json
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
    """One offline run: its history rows, its summary and its configuration, values as JSON text, and its artifacts."""

    id: str
    files: Path
    history: list[dict[str, str]] = field(default_factory=list)
    summary: dict[str, str] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)

    def table(self, name: str) -> dict[str, Any]:
        """A table of the summary: `columns` and `data`."""
        path = self.summary.get(f"{name}/path")  # or, in the summary of a run that logged it there, within the value
        return json.loads(
            (self.files / (json.loads(path) if path else json.loads(self.summary[name])["path"])).read_text()
        )


def read_offline_runs(directory: Path) -> list[OfflineRun]:
    """The offline runs below {directory}/wandb, oldest first."""
    runs = []
    for file in sorted(directory.glob("wandb/offline-run-*/run-*.wandb")):
        run = OfflineRun(file.stem.removeprefix("run-"), file.parent / "files")
        for data in _records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                run.history.append(_items(record.history.item))
            if record.HasField("summary"):
                run.summary |= _items(record.summary.update)
            if record.HasField("run"):
                run.config |= _items(record.run.config.update)
            if record.HasField("config"):
                run.config |= _items(record.config.update)
            if record.HasField("artifact"):
                run.artifacts.append(record.artifact)
            if record.HasField("request") and record.request.HasField("log_artifact"):
                run.artifacts.append(record.request.log_artifact.artifact)
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
