"""Runs sae_lens_train.py again and again, each time in a new process, without importing SAELens each time.

Reads a line of JSON for each run: its arguments and the file for its output. Answers with the process's id, and
with its exit status when it has ended.
"""

import json
import os
import runpy
import signal
import sys

import transformers.models.llama.modeling_llama  # noqa: F401

# What a run imports; nothing has computed when the fork happens, so no thread is lost in it.
import sae_toolkit.training.run
import sae_toolkit.training.setup  # noqa: F401
from sae_toolkit import ROOT

SCRIPT = ROOT / "sae_lens_train.py"


def run(flags: list[str], output: str) -> None:
    """Becomes the script. Never returns."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is switched off where the tests run under nohup
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = [str(SCRIPT), *flags]
    status = 1
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(request["flags"], request["output"])
        print(pid, file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    main()
