#!/usr/bin/env python
"""Counts the bytes and operations of a training step and of a language-model pass on a CUDA device. No GPU is needed.

    python benchmarks/counted_step.py                                # the cases of BENCHMARKS.md
    python benchmarks/counted_step.py topk:65536 batchtopk:65536:0.1  # architecture, features, share of dead features

The package runs at Llama-3-8B's shapes on the fake CUDA tensors of tests/cuda. It prints Markdown tables of
microseconds a token. They are lower bounds, not measurements: each operator takes the longer of two times, its bytes at
3.0 TB/s and its operations at the rate of its products. The rules of counting:

- An operator reads each input once and writes each output once. One that works in place reads and writes its target.
- An operator that gathers or scatters rows counts the rows that it touches, each time, as if none were in a cache,
  and not their indices.
- A fused kernel counts what it reads and writes itself. Adam: 4 tensors read, 3 written; where it also clips, it writes
  the clipped gradient too.
- A topk of a flat tensor reads it five times: four passes for the bits of the k-th value, and one to gather, as
  torch's multi-block kernel does. A topk of rows of up to 1 MB reads them once, since a row stays in the cache between
  these passes. A sort counts as one pass. A view and an allocation count nothing.
- A product of m x k and k x n is 2 m k n operations: at 700 TFLOP/s if its inputs are bfloat16, else at 400 (TF32). It
  adds a bias while it writes.
- Attention is 2 products of T x T for each head, half of them masked. Its bytes are its inputs and its output.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "cuda")]

import fake_device

CASES = ["topk:32768", "batchtopk:32768", "topk:131072", "batchtopk:131072", "topk:131072:0.1", "batchtopk:131072:0.1"]
BATCH, D_IN, K = 4096, 4096, 64
ROWS, CONTEXT, N_LAYERS, HOOK = 8, 2048, 13, "blocks.12.hook_resid_post"
BANDWIDTH, TF32, BFLOAT16 = 3.0e12, 400e12, 700e12  # bytes and operations a second, of an H100
_FIRST_STEPS = 10  # until the number of dead features is known

# The innermost of these functions that an operator is called in says what part of a step it belongs to.
_PARTS = {
    "encoder": ("_scaled_pre_activations", "bfloat16_linear"),
    "selection": ("_select", "update_topk_threshold"),
    "decoding": ("matmul",),
    "gradients": ("gradients", "t_matmul", "sum_by_feature", "by_feature", "_starts"),
    "gradient norm": ("_grad_norm",),
    "clipping": ("_clip", "_clip_grads_with_norm_"),
    "dead features": ("_auxiliary_loss", "reconstruct_with_dead", "find_dead_features"),
    "firings": ("_count_firings", "_record_firings", "_dead_bound"),
}
_PART_OF = {function: part for part, functions in _PARTS.items() for function in functions}
_ADAM, _REST = "Adam", "losses and the rest"
_ORDER = [
    "encoder",
    "selection",
    "decoding",
    "gradients",
    "gradient norm",
    "clipping",
    _ADAM,
    "dead features",
    "firings",
]
_FREE = ("empty", "detach", "alias", "_local_scalar_dense", "lift_fresh", "sparse_coo", "_indices", "_values")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="ARCHITECTURE:FEATURES[:DEAD]")
    cases = parser.parse_args().cases
    fake_device.install()
    counts = {case: count_step(*case.split(":")) for case in cases}
    print(f"A step, microseconds a token (batch {BATCH:,}, d_in {D_IN:,}, k {K}, float32 weights):\n")
    print_table(counts, BATCH)
    print(f"\nA pass of Llama-3-8B to {HOOK}, microseconds a token ({ROWS} x {CONTEXT:,} tokens, bfloat16, eager):\n")
    print_table({"": count_model_pass()}, ROWS * CONTEXT)


class Count:
    """Bytes, operations and seconds by part."""

    def __init__(self) -> None:
        self.n_bytes: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def add(self, part: str, n_bytes: float, operations: float = 0, rate: float = TF32) -> None:
        self.n_bytes[part] += int(n_bytes)
        self.operations[part] += int(operations)
        self.seconds[part] += max(n_bytes / BANDWIDTH, operations / rate)


def counting(part_of: Any) -> Any:
    """Returns a mode that counts the operators on CUDA tensors that are called in it, in its `count`.

    Args:
        part_of: returns the part that an operator belongs to, from its name and its tensors.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.count = Count()

        def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            namespace, name = func._schema.name.split("::")
            found = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            tensors = {id(t): t for t in found if t.device.type == "cuda" and t.layout == torch.strided}
            if tensors and namespace != "prim" and not func.is_view and not name.startswith(_FREE):
                part = part_of(name, list(tensors.values()))
                n_bytes = _bytes_touched(name, args, kwargs or {}, out, list(tensors.values()))
                self.count.add(part, n_bytes, *_operations(name, args))
            return out

    return Counting()


def _size(tensor: Any) -> int:
    """Returns the bytes of a tensor that are in memory: an expanded one counts once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _bytes_touched(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, tensors: list[Any]) -> float:
    if name.startswith("_fused_adam"):
        return (7 if kwargs.get("grad_scale") is None else 8) * sum(map(_size, args[0]))
    if name == "_embedding_bag_per_sample_weights_backward":  # grad, weight, indices: a row of each for each entry
        return 2 * args[2].numel() * args[1].shape[1] * args[1].element_size() + 2 * _size(args[2])
    if name.startswith("_embedding_bag"):  # weight, indices: a row for each entry
        return args[1].numel() * args[0].shape[1] * args[0].element_size() + _size(args[1]) + _size(out[0])
    if name == "feature_gradients":  # values, rows, starts, grad, input, decoder: two rows for each entry
        row = args[5].shape[1] * args[5].element_size()
        return len(args[0]) * (2 * row + args[0].element_size() + args[1].element_size()) + sum(
            map(_size, (args[2], args[5], *out))
        )
    if name in ("index", "index_select", "gather"):
        return 2 * _size(out)
    if name in ("index_add_", "scatter_", "scatter_add_", "index_put_"):  # rows are read, added to and written
        source = args[3] if len(args) > 3 and hasattr(args[3], "numel") else args[2]
        n_bytes = _size(source) if hasattr(source, "numel") else 8 * args[2][0].numel()
        return 3 * n_bytes
    if name == "topk":
        row = args[0].shape[-1] * args[0].element_size()
        return (1 if row <= 2**20 else 5) * _size(args[0]) + sum(map(_size, out))
    n_bytes = sum(map(_size, tensors))
    in_place = name.endswith("_") and hasattr(args[0], "numel") and name not in ("zero_", "fill_", "copy_")
    return n_bytes + (_size(args[0]) if in_place else 0)


def _operations(name: str, args: Sequence[Any]) -> tuple[float, float]:
    """Returns the operations of a product, and the rate at which they are done."""
    if name not in ("mm", "addmm", "bmm", "mv"):
        return 0, TF32
    left, right = args[1:3] if name == "addmm" else args[:2]
    inner = left.shape[-1]
    n_outputs = left.numel() // inner * (right.shape[-1] if right.ndim > 1 else 1)
    return 2 * n_outputs * inner, BFLOAT16 if left.element_size() == 2 else TF32


def count_step(architecture: str, d_sae: str, dead: str = "0") -> Count:
    """Counts a step after the first ones, with a share of dead features."""
    import torch
    from recorder import fake_cuda
    from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
    from sae_lens.registry import get_sae_training_class

    from sae_toolkit.steps.trainer import Trainer
    from sae_toolkit.training.run import create_sae

    n_features = int(d_sae)
    n_dead = int(float(dead) * n_features)
    _, config_class = get_sae_training_class(architecture)
    cfg = LanguageModelSAERunnerConfig(
        sae=config_class(d_in=D_IN, d_sae=n_features, k=K, device="cuda"),
        train_batch_size_tokens=BATCH,
        training_tokens=1000 * BATCH,
        device="cuda",
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )

    def part_of(name: str, tensors: list[Any]) -> str:
        return _part_of_step(name, tensors, n_features, n_dead)

    with fake_cuda() as recorder:
        trainer = Trainer(cfg.to_sae_trainer_config(), create_sae(cfg), iter(()))
        trainer.products_in_bfloat16 = True  # as with a language model in bfloat16
        trainer.activation_scaler.scaling_factor = 1.0
        batch_BD = torch.randn(BATCH, D_IN, device="cuda")
        recorder.integer = n_dead
        for _ in range(_FIRST_STEPS):
            recorder.begin()
            trainer.step(batch_BD)
            trainer.n_training_steps += 1
        recorder.begin()
        with counting(part_of) as mode:
            trainer.step(batch_BD)
    return mode.count


def _part_of_step(name: str, tensors: list[Any], n_features: int, n_dead: int) -> str:
    if name.startswith("_fused_adam"):
        return _ADAM
    rounded = range(n_dead, n_dead + 256) if n_dead else range(0)
    if any(size in rounded for tensor in tensors for size in tensor.shape):  # also in the loss's backward pass
        return "dead features"
    is_large = any(n_features in tensor.shape for tensor in tensors)
    frame = sys._getframe(2)
    while frame is not None:
        if part := _PART_OF.get(frame.f_code.co_name):
            return part
        if frame.f_code.co_name == "training_forward_pass":  # the products and norms that are written there
            return "encoder" if is_large else _REST
        frame = frame.f_back  # type: ignore[assignment]
    return "gradients" if is_large else _REST  # in the backward pass


def count_model_pass() -> Count:
    """Counts a pass of the language model up to the hook. It has the layers up to there only."""
    import torch
    from recorder import fake_cuda
    from transformers import LlamaConfig, LlamaForCausalLM

    from sae_toolkit.model.language_model import LanguageModel

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )

    def part_of(name: str, _tensors: list[Any]) -> str:
        return "products" if name in ("mm", "addmm", "bmm") else "embedding, norms, activations, rotation"

    with fake_cuda():
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        source = LanguageModel(model, HOOK)
        with counting(part_of) as mode:
            source.activations(torch.ones(ROWS, CONTEXT, dtype=torch.long))
    tokens = ROWS * CONTEXT
    for _ in range(N_LAYERS):  # queries, keys and values of 32, 8 and 8 heads of 128, and the output
        mode.count.add("attention", 2 * tokens * (32 + 8 + 8 + 32) * 128, 4 * tokens * CONTEXT * 4096 / 2, BFLOAT16)
    return mode.count


def print_table(counts: dict[str, Count], tokens: int) -> None:
    """Prints a Markdown table with a row for each part and a column for each case."""
    found = {part for count in counts.values() for part in count.seconds}
    parts = [part for part in _ORDER if part in found] + sorted(found - set(_ORDER))
    print(f"| | {' | '.join(counts)} |\n| --- |{' --- |' * len(counts)}")
    for part in parts:
        print(f"| {part} | {' | '.join(f'{1e6 * count.seconds[part] / tokens:.2f}' for count in counts.values())} |")
    each = counts.values()
    print(f"| all | {' | '.join(f'{1e6 * sum(count.seconds.values()) / tokens:.2f}' for count in each)} |")
    print(f"| GB | {' | '.join(f'{sum(count.n_bytes.values()) / 1e9:.1f}' for count in each)} |")
    print(f"| TFLOP | {' | '.join(f'{sum(count.operations.values()) / 1e12:.2f}' for count in each)} |")


if __name__ == "__main__":
    main()
