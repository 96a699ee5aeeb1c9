#!/usr/bin/env python
"""Times reading activations from this project's cache and from SAELens's own, on the same contexts.

    python benchmarks/train_speed.py --repeats 1 --contenders this --work_dir /tmp/job   # leaves model and tokens
    python benchmarks/cache_speed.py --work_dir /tmp/job

Both caches are filled first, from the same model and rows of tokens. Then each is read whole, in passes of 8
contexts, in turn; the operating system holds both files in memory, so that what is timed is the reading code.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from datasets import load_dataset
from sae_lens import ActivationsStore, CacheActivationsRunner, CacheActivationsRunnerConfig
from sae_lens.load_model import load_model

from sae_toolkit.activations.cache import ActivationCache, CachedActivations
from sae_toolkit.model.loading import find_model, load_language_model

HOOK, ROWS_AT_ONCE = "model.layers.12", 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", required=True, help="where train_speed.py left model and tokens")
    parser.add_argument("--rows", type=int, default=128, help="contexts (default: 128)")
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    model_dir, tokens_file = (str(Path(flags.work_dir, part)) for part in ("model", "tokens/train.parquet"))
    dataset = load_dataset("parquet", data_files=tokens_file, split="train").select(range(flags.rows))
    rows_NT = np.array(dataset["input_ids"], dtype=np.uint32)
    source = find_model(model_dir)
    d_in = source.config.hidden_size

    with tempfile.TemporaryDirectory() as directory:
        model = load_language_model(source, HOOK, "cpu", torch.float32)
        model.keep_only_up_to_hook()
        cache = ActivationCache(Path(directory, "ours"), {}, rows_NT, d_in)
        ours = CachedActivations(cache, lambda: model, "cpu")
        batches = [torch.from_numpy(part.astype(np.int64)) for part in np.split(rows_NT, flags.rows // ROWS_AT_ONCE)]
        for batch in batches:
            ours.activations(batch)

        cfg = CacheActivationsRunnerConfig(
            dataset_path="tokens",
            model_name=model_dir,
            model_class_name="AutoModelForCausalLM",
            model_batch_size=ROWS_AT_ONCE,
            hook_name=HOOK,
            d_in=d_in,
            training_tokens=rows_NT.size,
            context_size=rows_NT.shape[1],
            new_cached_activations_path=str(Path(directory, "theirs")),
            shuffle=False,
            device="cpu",
            buffer_size_gb=0.1,
        )
        CacheActivationsRunner(cfg, override_dataset=dataset).run()
        theirs = ActivationsStore(
            load_model("AutoModelForCausalLM", model_dir, device="cpu", hook_names=[HOOK]),
            dataset=dataset,
            streaming=False,
            hook_name=HOOK,
            hook_head_index=None,
            context_size=rows_NT.shape[1],
            d_in=d_in,
            n_batches_in_buffer=8,
            total_training_tokens=rows_NT.size,
            store_batch_size_prompts=ROWS_AT_ONCE,
            train_batch_size_tokens=1024,
            prepend_bos=True,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            cached_activations_path=str(Path(directory, "theirs")),
        )

        times: dict[str, list[float]] = {"this project": [], "SAELens": []}
        for _ in range(flags.repeats + 1):
            start = time.perf_counter()
            mine = [ours.activations(batch) for batch in batches]
            times["this project"].append(time.perf_counter() - start)
            start = time.perf_counter()
            other = [theirs.get_filtered_llm_batch() for _ in batches]
            times["SAELens"].append(time.perf_counter() - start)
        # SAELens fills whole buffers, so that its last contexts may be others; the bulk must be the same.
        medians = [
            torch.cat([part.reshape(-1, d_in) for part in acts]).float().norm(dim=-1).median() for acts in (mine, other)
        ]
        torch.testing.assert_close(*medians, rtol=1e-2, atol=0)
        assert theirs.cached_activation_dataset is not None
        n_tokens = {"this project": rows_NT.size, "SAELens": len(theirs.cached_activation_dataset) * rows_NT.shape[1]}
        folders = {"this project": "ours", "SAELens": "theirs"}
        sizes = {name: _size(Path(directory, folders[name])) / n_tokens[name] for name in times}

    print(f"{datetime.now(UTC):%Y-%m-%d}, {flags.rows} contexts of {rows_NT.shape[1]}, medians of {flags.repeats}\n")
    print("| cache | tokens/s | bytes a token |\n| --- | --- | --- |")
    for name, seconds in times.items():
        median = statistics.median(seconds[1:])
        print(f"| {name} | {rows_NT.size / median:,.0f} | {sizes[name]:,.0f} |")


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
