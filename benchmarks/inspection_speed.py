#!/usr/bin/env python
"""Times the pass of inspect_sae_features.py against the model and the encoder alone, which keep nothing of features.

    python benchmarks/inspection_speed.py --sae_path checkpoints/demo_1a2b3c4d/k3j2h1g0/final_500224
    python benchmarks/inspection_speed.py --random 131072 --tokens 20000  # random weights in 576 dimensions

The two take turns on the same rows, in one process. The first rows, where every example is new, are run before the
clock starts. Prints medians, ratios and memory as Markdown.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata

from sae_toolkit.files.embedded import EMBEDDED_MODEL, EMBEDDED_TEXT
from sae_toolkit.inspection.prepare import prepare_inspection
from sae_toolkit.inspection.run import InspectedSAE, add_batch
from sae_toolkit.inspection.statistics import FeatureStatistics
from sae_toolkit.model.devices import choose_lm_dtype
from sae_toolkit.model.loading import load_language_model
from sae_toolkit.settings.inspection import parse_inspection_flags


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--sae_path", help="as in inspect_sae_features.py")
    which.add_argument("--random", type=int, metavar="FEATURES", help="a TopK SAE of random weights, with k 64")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="how often the rows are divided and run (default: 5)")
    return parser.parse_args()


def random_sae(n_features: int) -> str:
    """Saves an SAE of random weights for the embedded model, and returns its directory."""
    metadata = SAEMetadata(
        model_name=EMBEDDED_MODEL,
        hook_name="blocks.12.hook_resid_post",
        dataset_path=EMBEDDED_TEXT,
        dataset_split="train",
        context_size=256,
        prepend_bos=True,
        held_out_fraction=0.2,
        held_out_seed=42,
        seqpos_slice=(1, None),
    )
    torch.manual_seed(0)
    directory = tempfile.mkdtemp(prefix="random-sae-")
    TopKSAE(TopKSAEConfig(d_in=576, d_sae=n_features, k=64, metadata=metadata)).save_model(directory)
    return directory


@torch.no_grad()
def main() -> None:
    flags = parse_flags()
    path = flags.sae_path or random_sae(flags.random)
    settings = parse_inspection_flags("", ["--sae_path", path, "--tokens", str(flags.tokens)])
    (group,) = prepare_inspection(settings)
    model = load_language_model(
        group.model, group.hook_name, group.device, choose_lm_dtype(settings.saes.lm_dtype, group.device)
    )
    evaluated = group.saes[0]
    evaluated.sae.to(group.device)
    kept = settings.features
    sizes = {"n_strongest": kept.examples, "n_drawn": kept.drawn_examples}
    statistics_of = FeatureStatistics(evaluated.sae.cfg.d_sae, **sizes, seed=42, device=group.device)
    inspected = InspectedSAE(evaluated, group, statistics_of, Path())

    def run(rows: np.ndarray, first: int, *, keeps: bool) -> float:
        started = time.perf_counter()
        for start in range(0, len(rows), flags.batch_size):
            batch = rows[start : start + flags.batch_size].astype(np.int64)
            acts = model.activations(torch.from_numpy(batch))
            if keeps:
                add_batch(inspected, first + start, batch, acts, None)
            else:
                evaluated.sae.encode(acts.to(evaluated.sae.device, torch.float32))
        return time.perf_counter() - started

    parts = np.array_split(group.rows_NT, flags.repeats + 1)
    run(parts[0], 0, keeps=True)
    first, alone, whole = len(parts[0]), [], []
    for part in parts[1:]:
        alone.append(run(part, first, keeps=False) / part.size)
        whole.append(run(part, first, keeps=True) / part.size)
        first += len(part)
    takes = FeatureStatistics.memory(evaluated.sae.cfg.d_sae, kept.examples, kept.drawn_examples) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{evaluated.sae.cfg.d_sae:,} features, {group.rows_NT.size:,} tokens, {flags.repeats} repeats;")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__},", end=" ")
    print(f"{datetime.now(UTC):%Y-%m-%d}\n\n| | tokens a second, median | slowest to fastest |\n| --- | ---: | ---: |")
    for name, seconds in (("model and encoder alone", alone), ("inspect_sae_features.py", whole)):
        median, slowest, fastest = (1 / f(seconds) for f in (statistics.median, max, min))
        print(f"| {name} | {median:,.0f} | {slowest:,.0f} to {fastest:,.0f} |")
    ratios = sorted(a / b for a, b in zip(alone, whole, strict=True))
    print(f"\n{statistics.median(ratios):.0%} of the speed ({ratios[0]:.0%} to {ratios[-1]:.0%}).", end=" ")
    print(f"Statistics and examples take {takes:.2f} GiB; the process had {peak:.2f} GiB at most.")


if __name__ == "__main__":
    main()
