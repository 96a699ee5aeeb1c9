"""How a script speaks: progress and log lines on standard error, one line for a mistake, exit status 2."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

from tqdm import tqdm

from sae_toolkit.errors import UserError


class Parser(argparse.ArgumentParser):
    """Reports mistakes in one line; flag files may hold comments and several flags a line."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        return shlex.split(arg_line, comments=True)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        flags = super().parse_args(args, namespace)
        for name, value in vars(flags).items():
            if value == "" or (isinstance(value, list) and "" in value):
                self.error(f"argument --{name}: is empty; give a value or leave it out")
        return flags

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


class _AboveProgressBars(logging.Handler):
    """Writes log lines to standard error without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def set_up_logging(verbose: bool = False) -> None:
    """Log lines of this project go to standard error; libraries speak when something is wrong."""
    logger = logging.getLogger("sae_toolkit")
    logger.handlers = [_AboveProgressBars()]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        warnings.filterwarnings("ignore")
        for library in ("transformers", "datasets", "huggingface_hub"):
            logging.getLogger(library).setLevel(logging.ERROR)


def run_script(main: Callable[[], int | None]) -> None:
    """Runs a script's main function and ends the process with its exit status; 2 for a `UserError`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        status = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
