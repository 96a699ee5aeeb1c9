"""The job that train_speed.py times: its sizes, and the model and the rows of tokens that every contender reads."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repository_text import BOS, EOS, save_tokenizer

JOBS: dict[str, dict[str, Any]] = {
    "embedded": {"layer": 12, "k": 64, "d_in": 576, "d_sae": 4608, "context": 256, "batch": 1024},
    "llama3-8b": {
        **{"layer": 12, "k": 64, "d_in": 4096, "d_sae": 131_072, "context": 2048, "batch": 4096},
        "model": {
            **{"num_hidden_layers": 32, "intermediate_size": 14_336, "vocab_size": 128_256},
            **{"num_attention_heads": 32, "num_key_value_heads": 8},
        },
    },
    # A job to try the benchmark itself. Its figures mean nothing.
    "tiny": {
        **{"layer": 1, "k": 4, "d_in": 32, "d_sae": 512, "context": 64, "batch": 128},
        "model": {
            **{"num_hidden_layers": 3, "intermediate_size": 64, "vocab_size": 8192},
            **{"num_attention_heads": 4, "num_key_value_heads": 2},
        },
    },
}
ROWS_PER_FORWARD = 8  # contexts in one forward pass of the language model


def job(flags: argparse.Namespace) -> dict[str, Any]:
    return JOBS[flags.job]


def n_rows(flags: argparse.Namespace) -> int:
    """Returns the number of rows for all steps, and for what a contender reads ahead."""
    size = job(flags)
    return (flags.warm_up + flags.steps + 24) * size["batch"] // size["context"] + 160


def prepare(flags: argparse.Namespace, work_dir: Path) -> None:
    """Saves the model and the rows of tokens that every contender reads, to `model` and `tokens` in a directory.

    Only the embedded job needs the packages with the embedded model and text.
    """
    if flags.job == "embedded":
        save_rows(_save_embedded_model(flags, work_dir / "model"), work_dir)
    else:
        size = job(flags)
        save_random_model(size, work_dir / "model", flags.device, size["layer"] + 1)
        save_rows(random_rows(size, n_rows(flags)), work_dir)


def save_rows(rows_NT: Any, work_dir: Path) -> None:
    """Saves rows of token ids as the data set `tokens` in a directory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (work_dir / "tokens").mkdir()
    pq.write_table(pa.table({"input_ids": rows_NT.tolist()}), work_dir / "tokens" / "train.parquet")


def _save_embedded_model(flags: argparse.Namespace, directory: Path) -> Any:
    """Saves the embedded model in float32 and its tokenizer, and returns rows [N, T] of the embedded text."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sae_toolkit.files.embedded import EMBEDDED_MODEL, EMBEDDED_TEXT
    from sae_toolkit.model.loading import find_model, load_language_model
    from sae_toolkit.model.tokenizer import load_tokenizer
    from sae_toolkit.text.rows import ContextFormat, token_rows
    from sae_toolkit.text.sources import open_text

    size = job(flags)
    hook_name = f"model.layers.{size['layer']}"
    model = load_language_model(find_model(EMBEDDED_MODEL), hook_name, "cpu", torch.float32).model
    fields = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "quantization_config")}
    unquantized = LlamaForCausalLM(LlamaConfig(**fields))
    unquantized.load_state_dict(model.state_dict())
    unquantized.save_pretrained(directory)
    tokenizer = load_tokenizer(find_model(EMBEDDED_MODEL))
    tokenizer.save_pretrained(directory)
    documents = open_text(EMBEDDED_TEXT, flag="--dataset").documents()
    rows = [row for _, row in token_rows(documents, tokenizer, ContextFormat(size["context"]), tokenized=False)]
    return np.stack(rows)[: n_rows(flags)]


def random_rows(size: Mapping[str, Any], n: int) -> Any:
    """Returns n rows [N, T] of random tokens; the first of each row is BOS."""
    import numpy as np

    rows_NT = np.random.default_rng(0).integers(3, size["model"]["vocab_size"], (n, size["context"]))
    rows_NT[:, 0] = BOS
    return rows_NT


def llama_config(size: Mapping[str, Any], n_layers: int | None = None) -> Any:
    """Returns the configuration of a job's random Llama, with all of its layers or with the first `n_layers`."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=size["d_in"],
        **size["model"] | ({} if n_layers is None else {"num_hidden_layers": n_layers}),
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def save_random_model(size: Mapping[str, Any], directory: Path, device: str, n_layers: int | None = None) -> None:
    """Saves a Llama of random weights and a tokenizer made from this repository's text.

    The weights are in bfloat16 on a GPU and in float32 on a CPU, and are drawn there.
    """
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        model = LlamaForCausalLM._from_config(llama_config(size, n_layers), dtype=dtype)
    model.save_pretrained(directory)
    save_tokenizer(directory)
