"""Part d of gpu.py: the whole job from its command line, with the flags of presets/llama3-8b.args.

A training measures held-out text on its way and is stopped with a checkpoint. It is resumed to its end, and the
finished SAE is evaluated. Only the model, which has random weights, the text and the number of tokens are not the
preset's.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_device import Bench, Table, shown
from gpu_model import save_model
from repository_text import ROOT, write_documents

from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.training.needs import memory_plan
from sae_toolkit.training.setup import prepare_run

# The times of every 16th step are exact, and the buffer is filled every 16 steps. Held-out text is measured after those
# that count.
_STEPS, _EVALUATED_AFTER, _STOPPED_AFTER, _UNTIMED = 96, 64, 72, 16
_STOPPED = 128 + 15  # exit status after SIGTERM


@dataclass(frozen=True)
class _Done:
    status: int
    stdout: str
    stderr: str
    seconds: float
    peak_gib: float
    step_times: list[float]

    def line(self, pattern: str) -> str:
        """Returns the first line of what the script showed that has a pattern; none is an error."""
        return next(line for line in self.stderr.splitlines() if re.search(pattern, line))


def run_scripts(bench: Bench) -> None:
    """Prints a row for the training until it is stopped, for the rest of it and for the evaluation."""
    save_model(bench)
    bench.free()
    text = bench.work_dir / "text.jsonl"
    if not text.exists():
        write_documents(text, 200 if bench.size["context"] < 1000 else 3000)
    flags = training_flags(bench, text)
    plan = memory_plan(prepare_run(parse_training_flags(flags)))
    table = Table("stage", "seconds", "tokens/s", "peak, GiB", "planned, GiB", "off by")

    def show(stage: str, done: _Done, planned: int, rate: float | None = None) -> None:
        planned_gib = planned / 2**30
        off = planned_gib / done.peak_gib - 1
        cells = shown(rate, ",.0f"), shown(done.peak_gib), shown(planned_gib), shown(off, "+.0%")
        table.row(stage, f"{done.seconds:.1f}", *cells)
        bench.found[f"plan of {stage}, off"] = off

    stopped = _run(bench, "--stop_after", _STOPPED_AFTER, "sae_lens_train.py", *flags, expected=_STOPPED)
    times = stopped.step_times
    n_timed = _EVALUATED_AFTER - _UNTIMED
    rate = n_timed * bench.size["batch"] / (times[_EVALUATED_AFTER - 1] - times[_UNTIMED - 1])
    bench.found["tokens/s of the job"] = rate
    show("training, stopped", stopped, plan.peak, rate)
    run_directory = re.search(r"--resume (\S+)", stopped.line("to go on:"))[1]  # type: ignore[index]
    resumed = _run(bench, "sae_lens_train.py", "--resume", run_directory)
    show("resumed to its end", resumed, plan.peak)
    final = resumed.stdout.strip().splitlines()[-1]
    evaluation = ("--sae_path", final, "--device", bench.device, "--no_diagnosis")
    evaluated = _run(bench, "evaluate_sae_real_activations.py", *evaluation)
    show("evaluation", evaluated, plan.evaluation_peak)
    print()
    for done, pattern in ((stopped, "held out after"), (stopped, "time    about"), (resumed, "resuming after")):
        print(f"- {done.line(pattern).strip()}", flush=True)


def training_flags(bench: Bench, text: Path) -> list[str]:
    """Returns the flags of presets/llama3-8b.args for the job's model, text and number of tokens."""
    size = bench.size
    lines = (ROOT / "presets/llama3-8b.args").read_text().splitlines()
    values: dict[str, Any] = dict(line[2:].split(maxsplit=1) for line in lines if line.startswith("--"))
    del values["dataset_config"]
    values |= {
        **{"model_name": bench.model_dir, "dataset_path": text, "held_out_fraction": 0.1, "layer": size["layer"]},
        **{"context_size": size["context"], "k": size["k"], "expansion_factor": bench.widths[0] // size["d_in"]},
        **{"train_batch_size_tokens": size["batch"], "training_tokens": _STEPS * size["batch"]},
        **{"eval_every": _EVALUATED_AFTER * size["batch"], "lr_warm_up_steps": 8, "lr_decay_steps": 16},
        **{"n_checkpoints": 0, "checkpoint_path": bench.work_dir / "runs", "wandb_mode": "disabled"},
        "device": bench.device,
    }
    return [str(part) for name, value in values.items() for part in (f"--{name}", value)]


def _run(bench: Bench, *command: object, expected: int = 0) -> _Done:
    """Runs a script of the project in a process of its own.

    Raises:
        RuntimeError: it ended with another exit status than the expected one. The message has the end of its output.
    """
    result = bench.work_dir / "result.json"
    result.unlink(missing_ok=True)
    words = [sys.executable, str(Path(__file__).with_name("measured_script.py")), str(result), *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != expected:
        raise RuntimeError(f"exit status {done.returncode}: {' '.join(words)}\n{done.stderr[-3000:]}")
    return _Done(done.returncode, done.stdout, done.stderr, **json.loads(result.read_text()))
