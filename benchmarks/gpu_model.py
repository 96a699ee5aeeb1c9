"""Part c of gpu.py: the language model up to the hook, as it is and with its layers compiled. It also saves the model.

The weights are random and have Llama-3-8B's shapes. They are saved once, for the parts that run scripts.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from gpu_device import Bench, Table, shown
from train_job import ROWS_PER_FORWARD, save_random_model

from sae_toolkit.model.devices import choose_lm_dtype
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.model.loading import find_model, load_language_model


def save_model(bench: Bench) -> None:
    """Saves the language model and its tokenizer, unless an earlier run left them in the work directory."""
    done = bench.model_dir / "complete"
    if not done.exists():
        print("saving the language model", file=sys.stderr)
        save_random_model(bench.size, bench.model_dir, bench.device)
        done.touch()
        bench.free()


def products_of_token(size: Mapping[str, Any]) -> int:
    """Returns the operations of the matrix products of a token, in the layers up to the hook."""
    model, d = size["model"], size["d_in"]
    of_keys = d * model["num_key_value_heads"] // model["num_attention_heads"]
    weights = 2 * d * d + 2 * d * of_keys + 3 * d * model["intermediate_size"]
    return 2 * (size["layer"] + 1) * weights


def time_language_model(bench: Bench) -> None:
    """Prints the time of a forward pass that ends at the hook, before and after its layers are compiled."""
    save_model(bench)
    size = bench.size
    dtype = choose_lm_dtype("auto", bench.device)
    hook_name = f"blocks.{size['layer']}.hook_resid_post"
    model = load_language_model(find_model(str(bench.model_dir)), hook_name, bench.device, dtype)
    model.keep_only_up_to_hook()
    bench.free()
    tokens_BT = torch.randint(3, size["model"]["vocab_size"], (ROWS_PER_FORWARD, size["context"]))
    table = Table("language model to the hook", "ms", "us a token", "products, TFLOP/s", "peak, GiB")

    def time_passes(name: str, warm_up: int) -> torch.Tensor:
        ms = bench.milliseconds(lambda: model.activations(tokens_BT), 5, warm_up)
        us = ms / tokens_BT.numel() * 1e3
        bench.found[f"language model, {name}"] = us
        rate = products_of_token(size) / us / 1e6
        where = f"{name}, {ROWS_PER_FORWARD} x {size['context']:,}"
        table.row(where, f"{ms:.1f}", f"{us:.2f}", f"{rate:.1f}", shown(bench.peak_gib()))
        return model.activations(tokens_BT).float()

    eager_BTD = time_passes("eager", warm_up=2)
    _compile_layers(model, bench)
    bench.free()
    compiled_BTD = time_passes("layers compiled", warm_up=3)
    off = ((compiled_BTD - eager_BTD).norm() / eager_BTD.norm()).item()
    print(f"\nThe activations of both differ by {off:.1e} of their norm.", flush=True)


def _compile_layers(model: LanguageModel, bench: Bench) -> None:
    """Compiles each layer. On a CPU Dynamo alone is used, which needs no C++ compiler."""
    for layer in model.layers:
        layer.compile() if bench.on_cuda else layer.compile(backend="eager")
