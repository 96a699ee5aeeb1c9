"""Runs sae_lens_train.py with the given flags. Each measurement on held-out text runs out of memory.

python train_without_memory.py FLAGS
"""

import runpy
import sys

import sae_toolkit.training.held_out
from sae_toolkit import ROOT
from support import failing_allocations

sae_toolkit.training.held_out.measure_saes = failing_allocations.on_a_gpu
sys.argv[0] = str(ROOT / "sae_lens_train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
