"""Trains one SAE of a comparison in its own process, with the code of its library: SAELens or sparsify."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from sae_toolkit.errors import RunFailed
from sae_toolkit.many_runs.comparison.contenders import Entry
from sae_toolkit.many_runs.comparison.shared_activations import Shared
from sae_toolkit.many_runs.directories import finished_sae, read_metrics
from sae_toolkit.many_runs.processes import failure_reason, script_command, start_process
from sae_toolkit.terminal.progress import Progress

_SECONDS_BETWEEN_LOOKS = 0.5


def run_training(
    entry: Entry,
    command: Sequence[str | Path],
    *,
    n_tokens: int,
    n_done: Callable[[], int],
    environment: Mapping[str, str],
    feed: Callable[[IO[bytes]], None] | None = None,
) -> tuple[float, int]:
    """Runs a training as a process to its end, and shows its progress.

    Args:
        entry: the SAE that is trained. The output of the process goes to training.log in its directory.
        command: the program and its arguments.
        n_tokens: the number of tokens that it trains on.
        n_done: returns the number of tokens that it has trained on so far.
        environment: variables to add to this process's environment.
        feed: writes the standard input of the process, on a thread of its own.

    Returns:
        The seconds that the process ran, its start included, and the peak of its resident memory in bytes.

    Raises:
        RunFailed: the process failed.
    """
    started = time.monotonic()
    peak = 0
    log = entry.directory / "training.log"
    with log.open("w") as out, Progress(entry.name, n_tokens) as progress:
        stdin = subprocess.PIPE if feed else subprocess.DEVNULL
        process = start_process(command, output=out, log=out, stdin=stdin, **environment)
        if feed:
            threading.Thread(target=feed, args=(process.stdin,), daemon=True).start()
        while process.poll() is None:
            peak = max(peak, _peak_resident(process.pid))
            progress.advance(n_done() - progress.done)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    if process.returncode != 0:
        raise RunFailed(f"{failure_reason(log).removeprefix('error: ')} ({log})")
    return time.monotonic() - started, peak


def _peak_resident(pid: int) -> int:
    """Returns the peak of a process's resident memory in bytes, on Linux; 0 elsewhere.

    The peak that wait4 returns may be the parent's, since it counts the time before the process started its program.
    """
    with suppress(OSError, StopIteration):
        status = Path(f"/proc/{pid}/status").read_text()
        return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    return 0


class Batches:
    """The batches of a training of sae_lens_train.py, for the standard input of another library's worker.

    Args:
        shared: what the SAEs of the comparison share.
        seed: the seed of the training.
        passes: the number of batches of each pass. Every pass begins at the first step.
    """

    def __init__(self, shared: Shared, seed: int, passes: Sequence[int]) -> None:
        self._passes = [(shared.training(seed).stream, n) for n in passes]
        self.n_tokens = 0  # of the last pass, so far

    def write(self, stdin: IO[bytes]) -> None:
        """Writes all of them in float32 [batch, d_in]."""
        with suppress(BrokenPipeError), stdin:
            for i, (stream, n) in enumerate(self._passes, start=1):
                for _ in range(n):
                    acts_ND = next(stream)
                    stdin.write(acts_ND.float().cpu().contiguous().numpy().data)
                    if i == len(self._passes):
                        self.n_tokens += len(acts_ND)


def train_saelens(entry: Entry, shared: Shared) -> dict[str, Any]:
    """Trains with sae_lens_train.py, which continues an earlier attempt if there is one.

    Returns:
        `sae`, its directory; `seconds` and `peak_bytes` of the process; `lr`, the learning rate.
    """
    kind = entry.contender.architecture
    words = [*shared.words, "--architecture", "matryoshka_batchtopk" if kind == "matryoshka" else kind]
    words += ["--output_name", "sae", "--resume"]
    words += ["--checkpoint_path", str(entry.directory), "--seed", str(entry.seed)]
    words += ["--held_out_seed", str(shared.run.metadata()["held_out_seed"])]
    words += ["--target_l0" if kind in ("standard", "gated", "jumprelu") else "--k", str(entry.l0)]
    words += shared.run.sae.width_words
    words += ["--train_batch_size_tokens", str(shared.run.cfg.train_batch_size_tokens)]
    if entry.lr is not None:
        words += ["--lr", str(entry.lr)]

    def n_done() -> int:
        metrics = read_metrics(entry.directory)
        return metrics[-1]["details/n_training_samples"] if metrics else 0

    seconds, peak = run_training(
        entry,
        [*script_command("sae_lens_train.py"), *words],
        n_tokens=shared.n_steps * shared.run.cfg.train_batch_size_tokens,
        n_done=n_done,
        environment=shared.environment | {"WANDB_RUN_GROUP": shared.directory.name},
    )
    sae = finished_sae(entry.directory)
    if sae is None:
        raise RunFailed("left no SAE")
    if shared.run.cfg.device != "cpu":
        gibibytes = (metrics["details/memory_gib"] for metrics in read_metrics(entry.directory))
        peak = int(2**30 * max(gibibytes, default=0.0))
    return {"sae": str(sae), "seconds": seconds, "peak_bytes": peak, "lr": saelens_settings(sae)["lr"]}


def saelens_settings(sae: Path) -> dict[str, Any]:
    """Returns SAELens's configuration of the training that left a finished SAE, with all values that it chose."""
    return json.loads((sae / "runner_cfg.json").read_text())


def train_sparsify(entry: Entry, shared: Shared) -> dict[str, Any]:
    """Trains with sparsify's Trainer, on this project's batches. Returns what `train_saelens` does."""
    if find_spec("sparsify") is None:
        raise RunFailed("not installed: python -m pip install -c constraints.txt -r requirements/comparison.txt")
    cfg = shared.run.cfg
    layer = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", cfg.hook_name)
    hookpoint = f"layers.{layer[1]}" if layer else cfg.hook_name
    job = {
        "batch": cfg.train_batch_size_tokens,
        "d_in": cfg.sae.d_in,
        "steps": shared.n_steps,
        "hookpoint": hookpoint,
        "device": cfg.device,
        "sae": {"num_latents": cfg.sae.d_sae, "k": entry.l0},
        "training": {"init_seeds": [entry.seed], "lr": entry.lr},
        "directory": str(entry.directory),
    }
    job_file = entry.directory / "job.json"
    job_file.write_text(json.dumps(job, indent=1))
    batches = Batches(shared, entry.seed, [shared.n_steps])
    seconds, peak = run_training(
        entry,
        [sys.executable, Path(__file__).with_name("sparsify_worker.py"), job_file],
        n_tokens=shared.n_steps * cfg.train_batch_size_tokens,
        n_done=lambda: batches.n_tokens,
        environment=shared.environment,
        feed=batches.write,
    )
    trained = json.loads((entry.directory / "trained.json").read_text())
    return {
        "sae": str(entry.directory / "sae" / hookpoint),
        "seconds": seconds,
        "peak_bytes": trained["peak_bytes"] or peak,
        "lr": trained["lr"],
    }
