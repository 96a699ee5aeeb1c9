"""How a script speaks: progress and log lines on standard error, one line for a mistake, exit status 2."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from rich.console import Console

from sae_toolkit.errors import UserError
from sae_toolkit.terminal.redaction import holds_secret, redact


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


def add_talk_flags(parser: Any) -> None:
    """Adds `--verbose` and `--quiet`, which `set_up_logging` takes, to a parser or a group of one."""
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("--verbose", action="store_true", help="say more")
    how_much.add_argument("--quiet", action="store_true", help="say nothing but warnings, errors and results")


class _Record(logging.LogRecord):
    """A log line of any library, without the tokens in it."""

    def getMessage(self) -> str:
        return redact(super().getMessage())


class _StandardError:
    """sys.stderr, whichever it is by now; a terminal that is gone costs no run."""

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


class Terminal(logging.Handler):
    """Writes log lines to standard error, above what is shown live there.

    `last_warnings` are the newest, which a live view repeats when they have scrolled away.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last_warnings: deque[str] = deque(maxlen=2)
        self.begin(logging.INFO, shows_progress=False)

    def begin(self, level: int, *, shows_progress: bool) -> None:
        """Starts anew, as for a script of its own."""
        self.setLevel(level)
        self.console = Console(
            file=cast("IO[str]", _StandardError()), soft_wrap=True, highlight=False, markup=False, emoji=False
        )
        self.shows_progress = shows_progress
        self.last_warnings.clear()
        self._progress: object | None = None

    def claim_progress(self, progress: object) -> bool:
        """Makes a piece of work the one whose progress is said; False where another one is."""
        if self._progress is not None:
            return False
        self._progress = progress
        return True

    def release_progress(self, progress: object) -> None:
        if self._progress is progress:
            self._progress = None

    @property
    def is_live(self) -> bool:
        """Whether a live view can be shown: somebody watches, on a terminal that can go up again."""
        return self.shows_progress and self.console.is_terminal and not self.console.is_dumb_terminal

    def emit(self, record: logging.LogRecord) -> None:
        line, is_warning = self.format(record), record.levelno >= logging.WARNING
        if is_warning:
            self.last_warnings.append(line)
        self.console.print(line, style="yellow" if is_warning else None)


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
terminal = Terminal()


def open_run_log(path: Path) -> None:
    """What was logged since the start, and what will be, goes into this file too."""
    _run_log.path = path
    _run_log.write()


def set_up_logging(verbose: bool = False, quiet: bool = False, speaks: bool = True) -> None:
    """Log lines of this project go to standard error; libraries speak when something is wrong.

    Args:
        verbose: whether details do too.
        quiet: whether warnings alone do, and no progress is shown. Takes nothing from a run's log.
        speaks: False for a process beside which another one says the same.
    """
    logging.setLogRecordFactory(_Record)
    logger = logging.getLogger("sae_toolkit")
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    terminal.begin(level, shows_progress=speaks and not quiet)
    _run_log.lines, _run_log.path = [], None
    logger.handlers = [terminal, _run_log] if speaks else [logging.NullHandler()]
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    if not terminal.is_live:
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries, which fill a file with carriage returns
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
