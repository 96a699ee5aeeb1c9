"""The bytes and operations that benchmarks/counted_step.py counts are those of the formulas."""

import re
import shutil
import sys

import pytest

from support.processes import run_process

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="the fake CUDA device is compiled with g++, which is not here"
)


def test_a_step_and_a_model_pass_are_counted_by_part():
    done = run_process(sys.executable, "benchmarks/counted_step.py", "topk:32768", "topk:32768:0.1")
    assert done.status == 0, done.stderr[-2000:]
    rows = dict(re.findall(r"^\| (\w.*?) \| (.*) \|$", done.stdout, re.MULTILINE))
    without, dead = (float(cell) for cell in rows["dead features"].split(" | "))
    assert without < 0.02 < 0.1 < dead
    n_weights = 2 * 4096 * 32768
    adam = 1e6 * 8 * 4 * n_weights / 3.0e12 / 4096  # it writes the clipped gradients too
    assert [float(cell) for cell in rows["Adam"].split(" | ")] == pytest.approx(2 * [adam], abs=0.01)
    # Llama-3-8B's layers: queries and output, keys and values, and three matrices of the MLP.
    products = 13 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert float(rows["products"]) == pytest.approx(1e6 * 2 * products / 700e12, abs=0.05)
