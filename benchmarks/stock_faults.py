#!/usr/bin/env python
"""Injects the faults of docs/reliability.md into stock SAELens and stock sparsify, and prints what happened.

    python benchmarks/stock_faults.py                                # every fault, on a CPU, about 30 minutes
    python benchmarks/stock_faults.py --faults signals damage        # some of them
    python benchmarks/stock_faults.py --tools sparsify --repeats 8   # one tool, more kills

Each run is a process of its own, on a Llama of random weights and one file of tokens. SAELens runs by its runner (bad
lines and mistyped values by its command line), sparsify by its Trainer, both unmodified. torch is seeded before each
run, as a user could do from Python; no flag does it (SAELens never reads its `--seed`). The disk that fills up is a
tmpfs that this program mounts, for which it must run as root. dictionary_learning is left out, since it does not start
next to this project's packages.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from stock_tools import LARGE, TOOLS, Run, SAELens, prepare, without_folders

Rows = Iterator[tuple[str, str, str]]  # what was injected, what happened, what was lost


def difference(a: Path, b: Path) -> str:
    """Says in which tensors two files of weights differ, and by how much."""
    one, other = load_file(a), load_file(b)
    gaps = {name: float((one[name] - other[name]).abs().max()) for name in one}
    differing = {name: gap for name, gap in gaps.items() if gap != 0}
    if not differing:
        return "equal bit for bit"
    worst = max(differing, key=differing.__getitem__)
    return f"{len(differing)} of {len(gaps)} tensors differ, `{worst}` by up to {gaps[worst]:.2g}"


def attempt(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:  # of any kind, as a user would see it
        return without_folders(f"{type(error).__name__}: {error}").splitlines()[0][:80]
    return "loads without a word"


def folder(tool: Any, name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{tool.name}-{name}-", dir=Path.cwd()))


def finished(tool: Any, name: str, **settings: Any) -> tuple[Run, Path]:
    out = folder(tool, name)
    return Run(tool, out, **settings).end(), out


def begun(tool: Any, out: Path, n: int = 1, **settings: Any) -> Run:
    """Returns a run that has just written its n-th checkpoint."""
    run = Run(tool, out, **settings)
    run.until(lambda: len(tool.checkpoints(out)) >= n)
    return run


def resumed(tool: Any, checkpoint: Path, **settings: Any) -> tuple[Run, Path]:
    return finished(tool, "resumed", resume=str(checkpoint), **settings)


def tally(outcomes: list[str]) -> str:
    return "; ".join(f"{n} of {len(outcomes)}: {outcome}" for outcome, n in Counter(outcomes).most_common())


def kill(tool: Any, repeats: int) -> Rows:
    whole, again, unseeded = (tool.final(finished(tool, "whole", seeded=seeded)[1]) for seeded in (True, True, False))
    yield "nothing: two runs, torch seeded by the user", difference(whole, again), ""
    yield "nothing: two runs, as the command line starts them", difference(whole, unseeded), ""
    outcomes, position, extra = [], "", []
    for i in range(repeats):
        out = folder(tool, "killed")
        run = begun(tool, out, n=1 + i % 3 if isinstance(tool, SAELens) else 1)
        time.sleep(0.05 + 0.1 * i)
        run.end(signal.SIGKILL)
        kept = shutil.copytree(tool.checkpoints(out)[-1], out / "kept")
        position = tool.position(kept)
        after, end = resumed(tool, kept)
        outcomes.append("equal" if difference(whole, tool.final(end)) == "equal bit for bit" else "not equal")
        extra.append(len(tool.checkpoints(end)))
        last = difference(whole, tool.final(end))
    happened = f"{tally(outcomes)} to the undisturbed run ({last}); resumed run: {after.said()}, saved {extra} times"
    yield f"SIGKILL between checkpoints, resumed ({repeats} times)", happened, f"resume {position}"


def write_kill(tool: Any, repeats: int) -> Rows:
    outcomes = []
    for i in range(repeats):
        out = folder(tool, "write")
        run = Run(tool, out, **LARGE)
        run.until(lambda: tool.saves_begun(out))  # noqa: B023
        start = time.monotonic()
        run.until(lambda: tool.checkpoints(out))  # noqa: B023
        duration, first = time.monotonic() - start, tool.checkpoints(out)[0]
        time.sleep(0.1)  # its last file exists, but may still be written to
        files = (path for path in first.rglob("*") if path.is_file())
        sizes = {path.relative_to(first): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
        n = tool.saves_begun(out)
        run.until(lambda: tool.saves_begun(out) != n)  # noqa: B023
        time.sleep(duration * i / repeats)
        run.end(signal.SIGKILL)
        newest = tool.newest(out)
        left = describe(newest, sizes, in_place=newest == first)
        loads = attempt(lambda: tool.load(newest))  # noqa: B023
        after, _ = resumed(tool, newest, **LARGE)
        outcomes.append(f"{left}: {loads}; resume: {after.said()}")
        shutil.rmtree(out)
    older = f"the checkpoint before is {'kept' if isinstance(tool, SAELens) else 'the one overwritten'}"
    yield f"SIGKILL while the second checkpoint is written ({repeats} times)", tally(outcomes), older


def describe(checkpoint: Path, sizes: dict[Path, tuple[int, int]], in_place: bool) -> str:
    """Says which files of a checkpoint are new, cut short or missing, and which are those of the last checkpoint.

    Args:
        checkpoint: its directory.
        sizes: size and modification time of each file of the last checkpoint, which was whole.
        in_place: whether the tool writes over the last checkpoint.
    """
    states: dict[str, list[str]] = {}
    for name, (size, mtime) in sizes.items():
        path = checkpoint / name
        if not path.exists():
            state = "missing"
        elif in_place and path.stat().st_mtime_ns == mtime:
            state = "old"
        else:
            state = "cut" if path.stat().st_size < size and path.suffix != ".json" else "new"
        states.setdefault(state, []).append(name.name)
    return ", ".join(f"{state} {' '.join(sorted(names))}" for state, names in sorted(states.items()))


def signals(tool: Any, repeats: int) -> Rows:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        out = folder(tool, number.name)
        run = begun(tool, out, saves=1)
        time.sleep(0.3)
        before = [p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()]
        run.end(number)
        after = [p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()]
        saved = "nothing saved" if before == after else "something saved"
        happened = f"{run.said()}; {saved}"
        yield f"{number.name}, 0.3 s after a checkpoint", happened, "all since the last scheduled checkpoint"


@contextmanager
def small_disk(path: Path, mebibytes: int) -> Iterator[None]:
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", path], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


def full(tool: Any, repeats: int) -> Rows:
    # A checkpoint takes 100 MiB. sparsify overwrites the one before, so only its first one can fill the disk.
    sizes = (115, 150) if isinstance(tool, SAELens) else (20, 60)
    for what, mebibytes in zip(("weights", "optimizer state"), sizes, strict=True):
        out = folder(tool, "full")
        with small_disk(out, mebibytes):
            run = Run(tool, out, **LARGE).end()
            newest, whole = tool.newest(out), tool.checkpoints(out)
            files = {p.name: p.stat().st_size >> 20 for p in newest.rglob("*") if p.is_file()}
            happened = f"{run.said()}; left {files} MiB: {attempt(lambda: tool.load(newest))}"  # noqa: B023
            after, _ = resumed(tool, newest, **LARGE)
            happened += f"; resume from it: {after.said()}"
            before = attempt(lambda: tool.load(whole[0])) if whole else "none"  # noqa: B023
        yield f"disk full in the {what} of a checkpoint", happened, f"the run; the checkpoint before: {before}"


def damage(tool: Any, repeats: int) -> Rows:
    outs = [folder(tool, "sound") for _ in range(2)]
    for out, lr in zip(outs, (1e-3, 2e-3), strict=True):
        run = begun(tool, out, lr=lr)
        time.sleep(0.1)
        run.end(signal.SIGKILL)
    one, other = (tool.checkpoints(out)[0] for out in outs)

    def outcome(injected: str, harm: Callable[[Path], Any]) -> tuple[str, str, str]:
        copy = shutil.copytree(one, folder(tool, "damaged") / "checkpoint")
        harm(copy)
        after, _ = resumed(tool, copy)
        gap = difference(one / tool.weights, copy / tool.weights)
        return injected, f"{attempt(lambda: tool.load(copy))}; resume: {after.said()}", f"weights: {gap}"

    def flip(copy: Path) -> None:
        data = bytearray((copy / tool.weights).read_bytes())
        data[len(data) // 2 | 3] ^= 0x40  # an exponent's byte
        (copy / tool.weights).write_bytes(data)

    yield outcome("a byte flipped in the middle of the weights", flip)
    yield outcome("no optimizer state", lambda copy: (copy / tool.state).unlink())
    yield outcome("another run's weights", lambda copy: shutil.copy(other / tool.weights, copy / tool.weights))


def not_finite(tool: Any, repeats: int) -> Rows:
    nan = {"model": "nan_model", "data": "nan_tokens.parquet"}
    for injected, settings in (("`lr` 1e37", {"lr": 1e37}), ("one row of 2,400 with NaN activations", nan)):
        run, out = finished(tool, "not_finite", **settings)
        bad = {name: f"{1 - float(t.isfinite().float().mean()):.0%}" for name, t in load_file(tool.final(out)).items()}
        weights = [load_file(checkpoint / tool.weights).values() for checkpoint in tool.checkpoints(out)]
        sound = sum(all(bool(tensor.isfinite().all()) for tensor in tensors) for tensors in weights)
        happened = f"{run.said()}, {run.seconds:.0f} s; final weights not finite: {bad}"
        yield injected, happened, f"{sound} of {len(weights)} checkpoints are finite"


def two_writers(tool: Any, repeats: int) -> Rows:
    alone = [tool.final(finished(tool, "alone", lr=lr)[1]) for lr in (1e-3, 2e-3)]
    out = folder(tool, "shared")
    for more in ([], ["--wandb_id", "same"]) if isinstance(tool, SAELens) else ([],):
        shutil.rmtree(out)
        runs = [Run(tool, out, lr=lr, more=more) for lr in (1e-3, 2e-3)]
        statuses = ", ".join(run.end().said() for run in runs)
        whose = [i + 1 for i in range(2) if difference(alone[i], tool.final(out)) == "equal bit for bit"]
        happened = f"{statuses}; {len(tool.checkpoints(out))} checkpoints; the final weights are those of run {whose}"
        yield f"two runs, one output directory {' '.join(more)}", happened, "the other run's final weights"


def wandb(tool: Any, repeats: int) -> Rows:
    env = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    run = Run(tool, folder(tool, "wandb"), wandb=True, env=env).end(limit=180)
    yield "wandb host refuses", f"{run.said()}, after {run.seconds:.0f} s", "the run, before its first step"


def bad_line(tool: Any, repeats: int) -> Rows:
    for data in ("text", "bad_text"):
        out = folder(tool, data)
        more = ["--is_dataset_tokenized", "false"]
        run = Run(tool, out, command_line=isinstance(tool, SAELens), data=data, more=more).end()
        n = len(tool.checkpoints(out))
        injected = "nothing: two files of text" if data == "text" else "a line of .jsonl cut short, in the second file"
        yield injected, run.said(), f"{n} checkpoints were saved"


def mistyped(tool: Any, repeats: int) -> Rows:
    cases: list[tuple[str, dict[str, Any]]] = [("layer 99 of 4", {"layer": "99"}), ("k 1,000 of 256", {"k": 1000})]
    if isinstance(tool, SAELens):
        cases += [("a flag that does not exist", {"more": ["--learning_rate", "1"]}), ("`--lr fast`", {"lr": "fast"})]
    for injected, settings in cases:
        out = folder(tool, "mistyped")
        run = Run(tool, out, command_line=isinstance(tool, SAELens), data="text", **settings).end()
        loaded = "after" if "Loading weights" in run.log.read_text() else "before"
        yield injected, f"{run.said()}, {run.seconds:.0f} s, {loaded} the model was loaded", ""


FAULTS = (kill, write_kill, signals, full, damage, not_finite, two_writers, wandb, bad_line, mistyped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [fault.__name__ for fault in FAULTS]
    parser.add_argument("--faults", nargs="+", choices=names, default=names)
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--repeats", type=int, default=6, help="kills of each kind (default: 6)")
    flags = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("sae-lens", "eai-sparsify", "torch"))
    print(f"{datetime.now(UTC):%Y-%m-%d}, {versions}, {os.cpu_count()} cores\n", flush=True)
    print("| fault | tool | injected | what happened | what was lost |\n| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory(prefix="stock_faults-") as work_dir:
        os.chdir(work_dir)
        prepare()
        for fault in FAULTS:
            for tool in TOOLS.values():
                if fault.__name__ in flags.faults and tool.name in flags.tools:
                    for row in fault(tool, flags.repeats):
                        cells = (cell.replace("|", "/") for cell in (fault.__name__, tool.name, *row))
                        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
