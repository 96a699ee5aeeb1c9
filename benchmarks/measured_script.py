#!/usr/bin/env python
"""Runs a script of this project as its command line does, and writes down its time and memory.

    python benchmarks/measured_script.py /tmp/result.json sae_lens_train.py @presets/demo.args
    python benchmarks/measured_script.py /tmp/result.json --stop_after 72 sae_lens_train.py @presets/demo.args

With --stop_after N the script gets SIGTERM after N training steps, as from a scheduler. The result has `seconds`,
`peak_gib` (allocated by torch on a GPU, else resident) and `step_times`, when each training step ended.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import runpy
import signal
import sys
import time
import weakref
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SYNCHRONIZED = 16  # the device has ended every 16th step when its time is written down; other steps may still run
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--stop_after", type=int, metavar="STEPS")
    parser.add_argument("script", help="a script of this project, followed by its flags")
    flags, of_script = parser.parse_known_args()
    step_times = _record_steps(flags.stop_after)
    started = time.perf_counter()

    def write_result() -> None:
        result = {"seconds": time.perf_counter() - started, "peak_gib": _peak() / 2**30, "step_times": step_times}
        flags.result.write_text(json.dumps(result))

    atexit.register(write_result)
    sys.argv = [flags.script, *of_script]
    runpy.run_path(str(ROOT / flags.script), run_name="__main__")


def _record_steps(stop_after: int | None) -> list[float]:
    """Returns a list that gets the time of each training step. The steps before the run itself, which only measure how
    fast it will be, are forgotten when the run's own begin.
    """
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    step_times: list[float] = []
    latest: weakref.ref[Any] | None = None  # weak, so that an optimizer's moments are freed with it

    def after_step(optimizer: Any, *_: Any) -> None:
        nonlocal latest
        if latest is None or optimizer is not latest():
            latest = weakref.ref(optimizer)
            step_times.clear()
        if len(step_times) % SYNCHRONIZED == SYNCHRONIZED - 1 and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        step_times.append(time.perf_counter())
        if len(step_times) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    register_optimizer_step_post_hook(after_step)
    return step_times


def _peak() -> int:
    import torch
    from train_contenders import peak_resident

    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else peak_resident()


if __name__ == "__main__":
    main()
