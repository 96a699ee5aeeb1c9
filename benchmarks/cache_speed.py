#!/usr/bin/env python
"""Times reading activations from this project's cache and from SAELens's own, on the same contexts.

    python benchmarks/train_speed.py --repeats 1 --contenders this --work_dir /tmp/job   # leaves model and tokens
    python benchmarks/cache_speed.py --work_dir /tmp/job

Both caches are filled first, from the same model and rows of tokens. Then each in turn is read whole, 8 contexts at
once. The operating system holds both files in memory, so that the reading code alone is timed.
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
from datasets import Dataset, load_dataset
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
    batches = [torch.from_numpy(part.astype(np.int64)) for part in np.split(rows_NT, flags.rows // ROWS_AT_ONCE)]

    with tempfile.TemporaryDirectory() as directory:
        folders = {"this project": Path(directory, "ours"), "SAELens": Path(directory, "theirs")}
        ours = fill_ours(folders["this project"], model_dir, rows_NT, batches)
        theirs = fill_theirs(folders["SAELens"], model_dir, dataset, rows_NT)
        times = time_passes(ours, theirs, batches, flags.repeats)
        assert theirs.cached_activation_dataset is not None
        n_tokens = {"this project": rows_NT.size, "SAELens": len(theirs.cached_activation_dataset) * rows_NT.shape[1]}
        sizes = {name: _size(folders[name]) / n_tokens[name] for name in folders}

    print(f"{datetime.now(UTC):%Y-%m-%d}, {flags.rows} contexts of {rows_NT.shape[1]}, medians of {flags.repeats}\n")
    print("| cache | tokens/s | bytes a token |\n| --- | --- | --- |")
    for name, seconds in times.items():
        print(f"| {name} | {rows_NT.size / statistics.median(seconds):,.0f} | {sizes[name]:,.0f} |")


def fill_ours(directory: Path, model_dir: str, rows_NT: np.ndarray, batches: list[torch.Tensor]) -> CachedActivations:
    """Fills this project's cache with the activations of the rows."""
    source = find_model(model_dir)
    model = load_language_model(source, HOOK, "cpu", torch.float32)
    model.keep_only_up_to_hook()
    cache = ActivationCache(directory, {}, rows_NT, source.config.hidden_size)
    ours = CachedActivations(cache, lambda: model, "cpu")
    for batch in batches:
        ours.activations(batch)
    return ours


def fill_theirs(directory: Path, model_dir: str, dataset: Dataset, rows_NT: np.ndarray) -> ActivationsStore:
    """Fills SAELens's cache with the activations of the rows, and returns a store that reads it."""
    d_in = find_model(model_dir).config.hidden_size
    cfg = CacheActivationsRunnerConfig(
        dataset_path="tokens",
        model_name=model_dir,
        model_class_name="AutoModelForCausalLM",
        model_batch_size=ROWS_AT_ONCE,
        hook_name=HOOK,
        d_in=d_in,
        training_tokens=rows_NT.size,
        context_size=rows_NT.shape[1],
        new_cached_activations_path=str(directory),
        shuffle=False,
        device="cpu",
        buffer_size_gb=0.1,
    )
    CacheActivationsRunner(cfg, override_dataset=dataset).run()
    return ActivationsStore(
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
        cached_activations_path=str(directory),
    )


def time_passes(
    ours: CachedActivations, theirs: ActivationsStore, batches: list[torch.Tensor], repeats: int
) -> dict[str, list[float]]:
    """Returns the seconds of each pass over either cache, without the first pass. Checks that both hold the same."""
    times: dict[str, list[float]] = {"this project": [], "SAELens": []}
    for _ in range(repeats + 1):
        start = time.perf_counter()
        mine = [ours.activations(batch) for batch in batches]
        times["this project"].append(time.perf_counter() - start)
        start = time.perf_counter()
        other = [theirs.get_filtered_llm_batch() for _ in batches]
        times["SAELens"].append(time.perf_counter() - start)
    # SAELens fills whole buffers, so its last contexts may differ. Most must be the same.
    norms = [torch.cat([part.float().norm(dim=-1).flatten() for part in acts]) for acts in (mine, other)]
    torch.testing.assert_close(norms[0].median(), norms[1].median(), rtol=1e-2, atol=0)
    return {name: seconds[1:] for name, seconds in times.items()}


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
