"""Files that somebody hostile could have written."""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

_CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig
Path({marker!r}).write_text("code of the model ran")
class OwnConfig(LlamaConfig):
    model_type = "own"
"""
_MODELING = """
from pathlib import Path
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
Path({marker!r}).write_text("code of the model ran")
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


class TouchesFile:
    """Pickled, it makes a file when it is opened by an unpickler that allows any code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.open, (str(self.marker), os.O_CREAT | os.O_WRONLY)


def model_with_code(tiny_model: Path, directory: Path, marker: Path) -> Path:
    """The tiny model as one that Transformers does not know, whose code writes the marker when it runs."""
    shutil.copytree(tiny_model, directory)
    edit_json(
        directory / "config.json",
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    )
    (directory / "configuration_own.py").write_text(_CONFIGURATION.format(marker=str(marker)))
    (directory / "modeling_own.py").write_text(_MODELING.format(marker=str(marker)))
    return directory


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_metadata(sae: Path, **values: Any) -> None:
    metadata = json.loads((sae / "cfg.json").read_text())["metadata"]
    edit_json(sae / "cfg.json", metadata=metadata | values)


def edit_tensors(file: Path, edit: Any) -> None:
    """Saves a safetensors file anew with the tensors that `edit(tensors)` changed in place."""
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def split_safetensors(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_safetensors(file: Path, header: Any, data: bytes, length: int | None = None) -> None:
    """Writes a safetensors file with any header, and any length given for it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
