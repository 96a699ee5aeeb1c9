"""One SAE of a comparison, trained by its library's own code in a process of its own."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from sae_lens.util import dtype_to_str

from sae_toolkit import ROOT
from sae_toolkit.many_runs.comparison.contenders import ARCHITECTURES, Entry
from sae_toolkit.many_runs.comparison.shared_activations import Shared
from sae_toolkit.many_runs.processes import finished_sae, last_line_of, readings_of, script, start_process
from sae_toolkit.model.loading import load_tokenizer
from sae_toolkit.settings.command_line import parse_training_flags
from sae_toolkit.terminal.progress import Progress
from sae_toolkit.text.rows import special_tokens

_SECONDS_BETWEEN_LOOKS = 0.5


class TrainingFailed(Exception):
    """A training that came to nothing; says why."""


class Work:
    """A training as a process of its own, with its progress.

    Args:
        entry: what is trained.
        command: of the process.
        total: tokens.
    """

    def __init__(self, entry: Entry, command: Sequence[str | Path], total: int) -> None:
        self.entry = entry
        self.command = command
        self.total = total
        self.log = entry.directory / "training.log"

    def run(self, done: Callable[[], int], **environment: str) -> tuple[float, int]:
        """Runs it to its end.

        Args:
            done: says how many tokens it has trained on.

        Returns:
            Seconds from its start to its end, and the most bytes of memory that it held.

        Raises:
            TrainingFailed: it ended badly.
        """
        return self._run(done, lambda process: None, None, environment)

    def run_fed(self, shared: Shared, job: dict[str, Any]) -> tuple[float, int]:
        """Likewise, with batches of activations in its standard input: first those for the norm, then all."""
        n_done = 0
        norm_batches, all_batches = (shared.of_seed(self.entry.seed).stream for _ in range(2))

        def feed(process: subprocess.Popen[bytes]) -> None:
            nonlocal n_done
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin:
                for stream, n in ((norm_batches, job["norm_batches"]), (all_batches, job["steps"])):
                    for _ in range(n):
                        acts_ND = next(stream)
                        process.stdin.write(acts_ND.float().cpu().contiguous().numpy().data)
                        n_done += len(acts_ND) if stream is all_batches else 0

        def start(process: subprocess.Popen[bytes]) -> None:
            threading.Thread(target=feed, args=(process,), daemon=True).start()

        return self._run(lambda: n_done, start, subprocess.PIPE, {})

    def _run(
        self,
        done: Callable[[], int],
        start: Callable[[subprocess.Popen[bytes]], None],
        stdin: int | None,
        environment: dict[str, str],
    ) -> tuple[float, int]:
        started = time.monotonic()
        peak = 0
        with self.log.open("w") as out, Progress(self.entry.name, self.total) as progress:
            process = start_process(self.command, output=out, log=out, stdin=stdin or subprocess.DEVNULL, **environment)
            start(process)
            while process.poll() is None:
                peak = max(peak, _peak_resident(process.pid))
                progress.advance(done() - progress.done)
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        if process.returncode != 0:
            raise TrainingFailed(f"{last_line_of(self.log).removeprefix('error: ')} ({self.log})")
        return time.monotonic() - started, peak


def _peak_resident(pid: int) -> int:
    """In bytes, of this program alone, from Linux; 0 elsewhere. What wait4 says counts what its parent held, too."""
    with suppress(OSError, StopIteration):
        status = Path(f"/proc/{pid}/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    return 0


def train_saelens(entry: Entry, shared: Shared) -> dict[str, Any]:
    """Trains by sae_lens_train.py, going on where an earlier attempt ended.

    Returns:
        `sae`, its directory; `seconds` and `peak_bytes` of the process; `lr`, None for the library's own.
    """
    architecture = ARCHITECTURES["saelens"][entry.contender.architecture]
    words = [*shared.words, "--architecture", architecture, "--output_name", "sae", "--resume"]
    words += ["--checkpoint_path", str(entry.directory), "--seed", str(entry.seed)]
    words += ["--held_out_seed", str(shared.run.metadata()["held_out_seed"])]
    searched = architecture in ("standard", "gated", "jumprelu")
    words += ["--target_l0" if searched else "--k", str(entry.l0)]
    if entry.contender.lr is not None:
        words += ["--lr", str(entry.contender.lr)]
    batch = shared.run.cfg.train_batch_size_tokens

    def done() -> int:
        readings = readings_of(entry.directory)
        return readings[-1]["details/n_training_samples"] if readings else 0

    work = Work(entry, [*script("sae_lens_train.py"), *words], shared.n_steps * batch)
    seconds, peak = work.run(done, WANDB_RUN_GROUP=shared.directory.name)
    sae = finished_sae(entry.directory)
    if sae is None:
        raise TrainingFailed("left no SAE")
    readings = readings_of(entry.directory)
    if shared.run.cfg.device != "cpu":
        peak = int(2**30 * max((reading["details/memory_gib"] for reading in readings), default=0.0))
    return {"sae": str(sae), "seconds": seconds, "peak_bytes": peak, "lr": parse_training_flags(words).optimization.lr}


def train_sparsify(entry: Entry, shared: Shared) -> dict[str, Any]:
    """Trains by sparsify's Trainer on the live model; returns what `train_saelens` does."""
    if find_spec("sparsify") is None:
        raise TrainingFailed("not installed: python -m pip install -c constraints.txt -r requirements/comparison.txt")
    run = shared.run
    layer = run.cfg.hook_name.removeprefix("blocks.").removesuffix(".hook_resid_post")
    if not layer.isdigit():
        raise TrainingFailed(f"trains on outputs of modules, and not at {run.cfg.hook_name}")
    cfg = run.cfg
    rows = -(-cfg.train_batch_size_tokens // cfg.context_size)  # of a batch, which it counts in contexts
    order = np.random.default_rng((entry.seed, 0)).permutation(len(run.rows_NT))
    wanted = min(shared.n_steps * rows, len(order))
    np.save(entry.directory / "rows.npy", run.rows_NT[order[:wanted]])
    training: dict[str, Any] = {
        "batch_size": rows,
        "init_seeds": [entry.seed],
        "exclude_tokens": list(special_tokens(shared.settings.text.exclude_special_tokens, load_tokenizer(run.model))),
    }
    if entry.contender.lr is not None:
        training["lr"] = entry.contender.lr
    hookpoint = f"layers.{layer}"
    job = {
        "model_name": run.model.name,
        "model_kwargs": run.model.model_kwargs,
        "trust_remote_code": run.model.trust_remote_code,
        "lm_dtype": dtype_to_str(run.lm_dtype),
        "device": cfg.device,
        "hook_name": cfg.hook_name,
        "hookpoint": hookpoint,
        "rows": str(entry.directory / "rows.npy"),
        "sae": {"num_latents": cfg.sae.d_sae, "k": entry.l0},
        "training": training,
        "directory": str(entry.directory),
    }
    (entry.directory / "job.json").write_text(json.dumps(job, indent=1))
    command = [
        *script("")[:1],
        "-m",
        "sae_toolkit.many_runs.comparison.sparsify_worker",
        str(entry.directory / "job.json"),
    ]

    def done() -> int:
        with suppress(OSError, ValueError):
            return int((entry.directory / "steps").read_text()) * rows * cfg.context_size
        return 0

    seconds, peak = Work(entry, command, wanted * cfg.context_size).run(done, PYTHONPATH=str(ROOT))
    (entry.directory / "rows.npy").unlink()
    on_gpu = json.loads((entry.directory / "trained.json").read_text())["peak_bytes"]
    sae = entry.directory / "sae" / hookpoint
    return {"sae": str(sae), "seconds": seconds, "peak_bytes": on_gpu or peak, "lr": entry.contender.lr}
