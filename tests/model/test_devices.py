"""What the CPU multiplies faster decides the dtype; the memory of freed tensors stays with the process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sae_toolkit.model.devices import choose_lm_dtype, cpu_is_faster_in_bfloat16
from support.processes import run_process

TENSOR = 64 * 2**20  # bytes of the tensors that COUNTS_FAULTS makes
PAGES = 10 * TENSOR // 4096

COUNTS_FAULTS = """
import resource, psutil, torch
from sae_toolkit.model.devices import freed_memory

def faults():
    for _ in range(3):
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

resident = lambda: psutil.Process().memory_info().rss
chosen_nothing = faults()
with freed_memory("cpu", is_kept=True):
    kept, holds = faults(), resident()
    with freed_memory("cpu", is_kept=False):
        within = holds - resident()
    again, holds = faults(), resident()
print(chosen_nothing, kept, again, within, holds - resident())
"""


def test_the_language_model_is_bfloat16_only_where_the_hardware_is_faster_in_it():
    words = Path("/proc/cpuinfo").read_text().split()
    is_faster = "amx_bf16" in words or ("avx512_bf16" in words and "GenuineIntel" not in words)
    assert choose_lm_dtype("auto", "cpu") == (torch.bfloat16 if is_faster else torch.float32)
    assert choose_lm_dtype("bfloat16", "cpu") == torch.bfloat16


@pytest.mark.parametrize(
    ("cpu_name", "capabilities", "is_faster"),
    [
        ("Intel Xeon", {"amx_bf16", "avx512_bf16"}, True),
        ("Intel Xeon", {"avx512_bf16", "avx512_fp16"}, False),
        ("AMD EPYC", {"avx512_bf16"}, True),
        ("AMD EPYC", {"avx2"}, False),
    ],
)
def test_avx512_bf16_alone_counts_on_processors_of_amd_only(cpu_name, capabilities, is_faster):
    assert cpu_is_faster_in_bfloat16({"cpu_name": cpu_name, **dict.fromkeys(capabilities, True)}) == is_faster


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limits are those of glibc")
def test_the_memory_of_a_freed_tensor_stays_only_where_that_is_chosen():
    done = run_process(sys.executable, "-c", COUNTS_FAULTS)
    chosen_nothing, kept, again, returned_within, returned = map(int, done.stdout.split())
    assert chosen_nothing > PAGES / 2
    assert max(kept, again) < PAGES / 4
    assert min(returned_within, returned) > 0.9 * TENSOR
