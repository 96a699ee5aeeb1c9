"""Flag parsing, log lines on standard error, the run's log file, and the exit status of a script."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from rich.console import Console

from sae_toolkit.errors import UserError, is_disk_full, one_line
from sae_toolkit.terminal.redaction import holds_secret, redact
from sae_toolkit.terminal.stop_signals import Stopped


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises a one-line `UserError` for a mistake and refuses empty values and secrets.

    Files of flags (`@FILE`) may hold comments and several flags on a line.
    """

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return shlex.split(arg_line, comments=True)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # `parse_args` calls it
        flags, others = super().parse_known_args(args, namespace)
        for name, value in vars(flags).items():
            if value == "" or (isinstance(value, list) and "" in value):
                self.error(f"argument --{name}: is empty; give a value or leave it out")
            if holds_secret(str(value)):
                self.error(
                    f"argument --{name}: holds a token or password, which would be saved with the run; set HF_TOKEN,"
                    " WANDB_API_KEY or OPENAI_API_KEY, or log in with `hf auth login` or `wandb login`"
                )
        return flags, others

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


class _Record(logging.LogRecord):
    """A log record of any library, with secrets removed from its message."""

    def getMessage(self) -> str:
        return redact(super().getMessage())


class _StandardError:
    """Writes to the current `sys.stderr` and ignores errors, so a run outlives the terminal that started it."""

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
    """Writes log lines to standard error, above the live view if one is shown.

    `last_warnings` holds the two newest warnings. A live view repeats them, because they may have scrolled away.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last_warnings: deque[str] = deque(maxlen=2)
        self.begin(logging.INFO, shows_progress=False)

    def begin(self, level: int, *, shows_progress: bool) -> None:
        """Brings the handler into the state that it has at the start of a script."""
        self.setLevel(level)
        self.console = Console(
            file=cast("IO[str]", _StandardError()), soft_wrap=True, highlight=False, markup=False, emoji=False
        )
        self.shows_progress = shows_progress
        self.last_warnings.clear()
        self._progress: object | None = None

    def claim_progress(self, progress: object) -> bool:
        """Makes `progress` the one that is shown. Returns False if another one is shown already."""
        if self._progress is not None:
            return False
        self._progress = progress
        return True

    def release_progress(self, progress: object) -> None:
        if self._progress is progress:
            self._progress = None

    @property
    def is_live(self) -> bool:
        """Whether a live view can be shown: progress is wanted, and the terminal can move its cursor up."""
        return self.shows_progress and self.console.is_terminal and not self.console.is_dumb_terminal

    def emit(self, record: logging.LogRecord) -> None:
        line, is_warning = self.format(record), record.levelno >= logging.WARNING
        if is_warning:
            self.last_warnings.append(line)
        self.console.print(line, style="yellow" if is_warning else None)


class _LogFile(logging.FileHandler):
    """Appends log lines to a file. A full disk loses lines and does not stop the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


_run_log = MemoryHandler(capacity=1)  # keeps records until `open_run_log` gives it a file
terminal = Terminal()


def open_run_log(path: Path) -> None:
    """Makes the log go to a file too: the lines since the start of the script, and all later ones."""
    with suppress(OSError):
        file = _LogFile(path, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        _run_log.setTarget(file)
        _run_log.flush()


def set_up_logging(verbose: bool = False, quiet: bool = False, speaks: bool = True) -> None:
    """Sends this project's log lines to standard error, and hides the warnings of other libraries.

    Args:
        verbose: show debug lines and the warnings of other libraries too.
        quiet: show only warnings, and no progress. The run's log file still gets every line.
        speaks: whether this rank shows anything; False if another rank shows the same.
    """
    logging.setLogRecordFactory(_Record)
    logger = logging.getLogger("sae_toolkit")
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    terminal.begin(level, shows_progress=speaks and not quiet)
    _run_log.setTarget(None)
    _run_log.buffer.clear()
    logger.handlers = [terminal, _run_log] if speaks else [logging.NullHandler()]
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    if not terminal.is_live:
        os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of libraries would fill a file with carriage returns
    if not verbose:
        warnings.filterwarnings("ignore")
        for library in ("transformers", "huggingface_hub"):
            logging.getLogger(library).setLevel(logging.ERROR)
        logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it logs the errors that it raises


@contextmanager
def importing(libraries: str) -> Iterator[None]:
    """Shows that libraries are being imported, which takes seconds, if the terminal can take the line back.

    Python does not look for garbage meanwhile, and later not in what was imported: this took a third of a start.
    """
    if "torch" in sys.modules:  # a process that runs a script once more
        yield
        return
    gc.disable()
    try:
        with terminal.console.status(f"importing {libraries}") if terminal.is_live else nullcontext():
            yield
    finally:
        gc.freeze()
        gc.enable()


def run_script(main: Callable[[], int | None]) -> None:
    """Runs a script's main function and exits the process with the status that it returns.

    A `UserError` is printed in one line and sets the status, and so is a full disk. Any other exception is a bug: its
    traceback is printed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # so torch.load accepts tensors only, in every library
    _use_expandable_segments()
    try:
        status = main() or 0
    except (Exception, KeyboardInterrupt, Stopped) as error:
        status = _report(error)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # the reader is gone; Python would flush again at exit, and exit with status 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


def _report(error: BaseException | None) -> int:
    """Prints the exception that ended a script, and returns the status to exit with."""
    if isinstance(error, Stopped):  # the signal came while the script was ending, perhaps by an error
        return _report(error.__context__) or error.exit_status
    if isinstance(error, KeyboardInterrupt):
        with suppress(OSError):
            print("stopped (Ctrl-C)", file=sys.stderr)
        return 130
    if not isinstance(error, Exception):
        return 0
    _tell_torchrun(error)
    if isinstance(error, UserError):
        said, status = f"error: {error}", error.exit_status
    elif is_disk_full(error):
        what = f"error: a file cannot be written: {one_line(error)}; "
        said, status = f"{what}free some space, or name a directory on another disk, and run it again", 2
    else:  # a bug
        said, status = "".join(traceback.format_exception(error)).rstrip(), 1
    with suppress(OSError):
        print(redact(said), file=sys.stderr)
    _log_to_file_alone(said)
    return status


def _use_expandable_segments() -> None:
    """Lets torch grow blocks of CUDA memory, so that less is lost to gaps, unless the user configured its allocator.

    torch reads the variable when it is imported. Processes that this one starts inherit it.
    """
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys():  # older names, which torch reads
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _tell_torchrun(error: Exception) -> None:
    """Writes an error to the file where torchrun looks for it, if torchrun started this process."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _log_to_file_alone(message: str) -> None:
    _run_log.handle(logging.LogRecord("sae_toolkit", logging.ERROR, __file__, 0, redact(message), None, None))
