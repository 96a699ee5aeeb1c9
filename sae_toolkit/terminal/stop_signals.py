"""Ctrl-C, a termination and a dropped connection, heard at a moment when nothing is lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SIGHUP is what a process gets when its ssh session drops.
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal ended the work. Not an `Exception`, as KeyboardInterrupt is none: nobody takes it for an error.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 128 + number


class StopSignals:
    """The signals that came. Raises `Stopped` when one comes, or waits to be asked while they are deferred."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._deferred = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals do not interrupt what is done inside; it looks at `received` where it can stop.

        A second Ctrl-C interrupts all the same.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @property
    def received(self) -> int:
        """The number of the signal that came; 0 if none did."""
        return self._received or 0

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        again = self._received is not None
        self._received = self._received or number
        if not self._deferred or (again and number == signal.SIGINT):
            raise Stopped(self._received)


@contextmanager
def hear_stop_signals() -> Iterator[StopSignals]:
    """Hears SIGINT, SIGTERM and SIGHUP; a SIGHUP that `nohup` has switched off stays off."""
    signals = StopSignals()
    previous = {
        number: signal.signal(number, signals._on_signal)
        for number in _STOPPING
        if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN)
    }
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
