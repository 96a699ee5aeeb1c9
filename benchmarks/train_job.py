"""The job that train_speed.py times: its sizes, and the model and the rows of tokens that every contender reads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

JOBS: dict[str, dict[str, Any]] = {
    "embedded": {"layer": 12, "k": 64, "d_in": 576, "d_sae": 4608, "context": 256, "batch": 1024},
    "llama3-8b": {
        **{"layer": 12, "k": 64, "d_in": 4096, "d_sae": 131_072, "context": 2048, "batch": 4096},
        "model": {"intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab": 128_256},
    },
    # A job to try the benchmark itself. Its figures mean nothing.
    "tiny": {
        **{"layer": 1, "k": 4, "d_in": 32, "d_sae": 128, "context": 64, "batch": 128},
        "model": {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab": 49_152},
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
    """Saves the model and the rows of tokens that every contender reads, to `model` and `tokens` in a directory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from sae_toolkit.files.embedded import EMBEDDED_MODEL
    from sae_toolkit.model.loading import find_model, load_tokenizer

    tokenizer = load_tokenizer(find_model(EMBEDDED_MODEL))
    save = _save_embedded_model if flags.job == "embedded" else _save_random_model
    rows_NT = save(flags, tokenizer, work_dir / "model")
    tokenizer.save_pretrained(work_dir / "model")
    (work_dir / "tokens").mkdir()
    pq.write_table(pa.table({"input_ids": rows_NT.tolist()}), work_dir / "tokens" / "train.parquet")


def _save_embedded_model(flags: argparse.Namespace, tokenizer: Any, directory: Path) -> Any:
    """Saves the embedded model in float32, and returns rows [N, T] of the embedded text."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sae_toolkit.files.embedded import EMBEDDED_MODEL, EMBEDDED_TEXT
    from sae_toolkit.model.loading import find_model, load_language_model
    from sae_toolkit.text.rows import ContextFormat, token_rows
    from sae_toolkit.text.sources import open_text

    size = job(flags)
    hook_name = f"model.layers.{size['layer']}"
    model = load_language_model(find_model(EMBEDDED_MODEL), hook_name, "cpu", torch.float32).model
    fields = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "quantization_config")}
    unquantized = LlamaForCausalLM(LlamaConfig(**fields))
    unquantized.load_state_dict(model.state_dict())
    unquantized.save_pretrained(directory)
    documents = open_text(EMBEDDED_TEXT, flag="--dataset").documents()
    rows = [row for _, row in token_rows(documents, tokenizer, ContextFormat(size["context"]), tokenized=False)]
    return np.stack(rows)[: n_rows(flags)]


def _save_random_model(flags: argparse.Namespace, tokenizer: Any, directory: Path) -> Any:
    """Saves a Llama of random weights, and returns rows [N, T] of random tokens."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    size = job(flags)
    config = LlamaConfig(
        hidden_size=size["d_in"],
        num_hidden_layers=size["layer"] + 1,
        vocab_size=size["model"]["vocab"],
        **{name: value for name, value in size["model"].items() if name != "vocab"},
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device(flags.device):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16 if flags.device != "cpu" else torch.float32).save_pretrained(directory)
    rows_NT = np.random.default_rng(0).integers(3, 49_000, (n_rows(flags), size["context"]))
    rows_NT[:, 0] = tokenizer.bos_token_id
    return rows_NT
