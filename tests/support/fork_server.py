"""Runs scripts again and again, each time in a new process, without importing SAELens each time.

Reads a line of JSON for each run: the script, its arguments, further variables of its environment, and the files for
its output. Answers with the process's id, and with its exit status when it has ended. A variable that a library reads
as it is imported has to be in the environment of this program.
"""

import json
import os
import runpy
import signal
import sys

from sae_toolkit.terminal.console import importing


def run(script: str, flags: list[str], environment: dict[str, str], stdout: str, stderr: str) -> None:
    """Becomes the script. Never returns."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is switched off where the tests run under nohup
    os.environ.update(environment)
    for descriptor, path in ((1, stdout), (2, stderr)):  # which may be the same file
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.argv = [script, *flags]
    status = 1
    try:
        runpy.run_path(script, run_name="__main__")
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
    with importing("SAELens"):  # nothing has computed when the fork happens, so no thread is lost in it
        import transformers.models.llama.modeling_llama  # noqa: F401

        import sae_toolkit.evaluation.run
        import sae_toolkit.reports.results
        import sae_toolkit.training.run
        import sae_toolkit.training.setup  # noqa: F401
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(**request)
        print(pid, file=answers, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    main()
