"""Tries every causal language model class of Transformers, two at a time, each in a process of its own.

    python tests/models/all_classes.py OUT.json TEXT [CONFIG_CLASS ...]

It imports everything once and forks for each class. A class that takes too long or too much memory, or that crashes,
is recorded as such.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # and not in the process of other tests
    os.environ["HF_HUB_OFFLINE"] = "1"  # TransformerLens would ask the Hub for a processor of images

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

_AT_ONCE, _SECONDS, _BYTES = 2, 300, 10 * 2**30


def classes() -> dict[str, str]:
    """Returns the configuration classes of Transformers' two mappings, and the class of model that each builds."""
    found: dict[str, str] = {}
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        for config in mapping:
            if not config.__module__.startswith("transformers."):  # code of a model, which another test has run
                continue
            model = mapping[config]
            found.setdefault(config.__name__, (model[0] if isinstance(model, tuple) else model).__name__)
    return dict(sorted(found.items()))


def try_all(wanted: dict[str, str], text_file: Path) -> list[dict]:
    """Returns what was found for each class, in the order of `wanted`."""
    from models.trial import small_tokenizer, try_class, warm_up

    tokenizer = small_tokenizer(text_file)
    import sae_toolkit.training.loop
    import sae_toolkit.training.preflight
    import sae_toolkit.training.record.start
    import sae_toolkit.training.setup  # noqa: F401

    warm_up(tokenizer)
    gc.collect()
    gc.freeze()  # what is imported is not collected again and again in each process
    results: dict[str, dict] = {}
    running: dict[int, tuple[str, float]] = {}
    waiting = list(wanted)
    with tempfile.TemporaryDirectory() as directory:
        while waiting or running:
            while waiting and len(running) < _AT_ONCE:
                name = waiting.pop(0)
                pid = os.fork()
                if pid == 0:
                    _in_child(partial(try_class, name, wanted[name], tokenizer, text_file), directory, name)
                running[pid] = name, time.monotonic()
            for pid, (name, start) in list(running.items()):
                ended, status, used = os.wait4(pid, os.WNOHANG)
                if not ended and time.monotonic() - start < _SECONDS:
                    continue
                if not ended:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                del running[pid]
                results[name] = _result(Path(directory, f"{name}.json"), name, wanted[name], ended, status)
                print(json.dumps(results[name] | {"seconds": round(used.ru_utime + used.ru_stime)}), flush=True)
            time.sleep(0.1)
    return [results[name] for name in wanted]


def _result(path: Path, name: str, model: str, ended: int, status: int) -> dict:
    if path.exists():
        return json.loads(path.read_text())
    why = f"crash: status {os.waitstatus_to_exitcode(status)}" if ended else f"took more than {_SECONDS} seconds"
    return {"config": name, "family": "", "model": model, "not_tried": why, "rows": []}


def _in_child(work, directory: str, name: str) -> None:
    """Writes the result of `work` into a file. Never returns."""
    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    log = os.open(Path(directory, f"{name}.log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    try:
        result = work().to_dict()
        whole = Path(directory, f"{name}.part")
        whole.write_text(json.dumps(result))
        whole.rename(Path(directory, f"{name}.json"))
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
        Path(directory, f"{name}.json").write_text(
            json.dumps(
                {
                    "config": name,
                    "family": "",
                    "model": "",
                    "not_tried": "crash: " + " | ".join(traceback.format_exc().splitlines()[-6:]),
                    "rows": [],
                }
            )
        )
    finally:
        os._exit(status)


if __name__ == "__main__":
    out, text, *names = sys.argv[1:]
    every = classes()
    found = try_all({name: every[name] for name in names} if names else every, Path(text))
    Path(out).write_text(json.dumps(found, indent=1))
