"""The embedded model in Transformers' own format, which is made once: its GGUF file takes seconds to read."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import torch
import transformers
import xxhash
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_toolkit.files.assets import assets, kept_directory

KEPT_COPIES = assets("embedded", "models")  # one for each file and version of Transformers


@cache
def embedded_copy(gguf_file: Path, directory: Path) -> Path | None:
    """Returns a directory with the weights of a GGUF file in float32, its configuration and its tokenizer.

    It is made if it is not there yet, or damaged. The weights are those that Transformers reads from the file, bit for
    bit, at four bytes a parameter.

    Args:
        gguf_file: the file.
        directory: where copies are kept.

    Returns:
        The directory of the copy; None if it cannot be kept there.
    """
    about = {"gguf_xxh3": xxhash.xxh3_128(gguf_file.read_bytes()).hexdigest(), "transformers": transformers.__version__}
    name = f"{gguf_file.stem}-{about['gguf_xxh3'][:8]}-transformers-{about['transformers']}"
    return kept_directory(directory / name, "the unpacked model", about, partial(_unpack, gguf_file))


def _unpack(gguf_file: Path, directory: Path) -> None:
    location = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    read = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32)
    del read.config.quantization_config  # a model from a GGUF file counts as quantized, which is not saved
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**location).save_pretrained(directory)
