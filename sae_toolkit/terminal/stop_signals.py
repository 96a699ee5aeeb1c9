"""Handles Ctrl-C and the signals that schedulers send, so that a run can save its work before it stops."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# A process gets SIGHUP when its ssh session drops. Schedulers send one of the others before the time of a job is up:
# Slurm and submitit SIGUSR1 or SIGUSR2, as they are told, and limits on CPU time SIGXCPU.
TERMINATIONS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class Stopped(BaseException):
    """Raised when a signal ends the work.

    Like `KeyboardInterrupt` it is not an `Exception`, so that code which handles errors does not catch it.

    Args:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 128 + number


class StopSignals:
    """Raises `Stopped` when a signal arrives. While signals are deferred, it stores the signal's number instead."""

    def __init__(self) -> None:
        self.received = 0  # number of the first signal that arrived
        self._deferred = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Context manager inside which a signal raises nothing. The work checks `received` where it can stop.

        Only a Ctrl-C that comes after an earlier signal still raises `Stopped`.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        again = self.received != 0
        self.received = self.received or number
        if not self._deferred or (again and number == signal.SIGINT):
            raise Stopped(self.received)


@contextmanager
def hear_stop_signals() -> Iterator[StopSignals]:
    """Context manager that handles SIGINT and `TERMINATIONS`.

    If the process ignores SIGHUP, as it does under `nohup`, SIGHUP stays ignored.
    """
    signals = StopSignals()
    previous = {
        number: signal.signal(number, signals._on_signal)
        for number in (signal.SIGINT, *TERMINATIONS)
        if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN)
    }
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
