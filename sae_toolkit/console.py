"""How a script speaks: progress and log lines on standard error, one line for a mistake, exit status 2."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from sae_toolkit.errors import UserError
from sae_toolkit.redaction import holds_secret, redact


class Parser(argparse.ArgumentParser):
    """Reports mistakes in one line; flag files may hold comments and several flags a line."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return shlex.split(arg_line, comments=True)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # which `parse_args` calls
        flags, others = super().parse_known_args(args, namespace)
        for name, value in vars(flags).items():
            if value == "" or (isinstance(value, list) and "" in value):
                self.error(f"argument --{name}: is empty; give a value or leave it out")
            if holds_secret(str(value)):
                self.error(
                    f"argument --{name}: holds a token or password, which would end up on record; set HF_TOKEN or"
                    " WANDB_API_KEY, or log in by `hf auth login` or `wandb login`"
                )
        return flags, others

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


class _Record(logging.LogRecord):
    """A log line of any library, without the tokens in it."""

    def getMessage(self) -> str:
        return redact(super().getMessage())


class _AboveProgressBars(logging.Handler):
    """Writes log lines to standard error without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # a terminal that is gone costs no run
            tqdm.write(self.format(record), file=sys.stderr)


class _RunLog(logging.Handler):
    """Keeps log lines until there is a file for them, and then writes them there; a full disk costs lines, no run."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.lines: list[str] = []
        self.path: Path | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))
        self.write()

    def write(self) -> None:
        if self.path is not None:
            with suppress(OSError):
                with self.path.open("a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in self.lines)
                self.lines.clear()


_run_log = _RunLog()


def open_run_log(path: Path) -> None:
    """What was logged since the start, and what will be, goes into this file too."""
    _run_log.path = path
    _run_log.write()


def set_up_logging(verbose: bool = False, speaks: bool = True) -> None:
    """Log lines of this project go to standard error; libraries speak when something is wrong.

    Args:
        verbose: whether details do too.
        speaks: False for a process beside which another one says the same.
    """
    logging.setLogRecordFactory(_Record)
    logger = logging.getLogger("sae_toolkit")
    terminal = _AboveProgressBars()
    terminal.setLevel(logging.DEBUG if verbose else logging.INFO)
    _run_log.lines, _run_log.path = [], None
    logger.handlers = [terminal, _run_log] if speaks else [logging.NullHandler()]
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    if not verbose:
        warnings.filterwarnings("ignore")
        for library in ("transformers", "datasets", "huggingface_hub"):
            logging.getLogger(library).setLevel(logging.ERROR)


def run_script(main: Callable[[], int | None]) -> None:
    """Runs a script's main function and ends the process with its exit status; that of a `UserError` in a line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # torch.load stays with tensors, in every library
    try:
        status = main() or 0
    except UserError as error:
        with suppress(OSError):
            print(redact(f"error: {error}"), file=sys.stderr)
        _log_to_file_alone(f"error: {error}")
        _tell_torchrun(error)
        status = error.exit_status
    except KeyboardInterrupt:
        status = 130
    except Exception as error:  # a bug
        _tell_torchrun(error)
        with suppress(OSError):
            print(redact(traceback.format_exc()), file=sys.stderr, end="")
        _log_to_file_alone(traceback.format_exc())
        status = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads any more; Python itself would try again at its end, and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


def _tell_torchrun(error: Exception) -> None:
    """Leaves an error where torchrun looks for it, if torchrun started this process."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _log_to_file_alone(message: str) -> None:
    _run_log.handle(logging.LogRecord("sae_toolkit", logging.ERROR, __file__, 0, redact(message), None, None))
