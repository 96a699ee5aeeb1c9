#!/usr/bin/env python
"""How long does making a synthetic model take, and are its features those that SAELens makes?

    python benchmarks/make_synthetic.py                               # `small`, 2 minutes
    python benchmarks/make_synthetic.py synth-sae-bench-16k --runs 1  # hours, nearly all of them SAELens's

It prints the median processor time of each, and by how much a coordinate of a feature differs at most.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from sae_lens.synthetic import SyntheticModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sae_toolkit.synthetic.directory import MADE_HERE, make_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="small", choices=list(MADE_HERE))
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    cfg = MADE_HERE[args.model]
    seconds, features = {}, {}
    for by, make in (("SAELens", SyntheticModel), ("sae_toolkit", make_model)):
        taken = []
        for _ in range(args.runs):
            started = time.process_time()
            features[by] = make(cfg).feature_dict.feature_vectors
            taken.append(time.process_time() - started)
        seconds[by] = statistics.median(taken)
        print(f"{by}: {seconds[by]:.2f} s of processor time, median of {args.runs}")
    difference = (features["SAELens"] - features["sae_toolkit"]).abs().max().item()
    print(f"ratio {seconds['SAELens'] / seconds['sae_toolkit']:.0f}; coordinates differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()
