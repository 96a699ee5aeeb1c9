"""Shows the progress of long work: on a terminal as a live view, elsewhere as a log line every 10 seconds."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

import psutil
import torch
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sae_toolkit.terminal.console import terminal

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_OF_RATE = 15.0  # the speed is the average over these last seconds,
_WAITS_OF_RATE = 20  # or over as many times the longest wait: work comes in bursts where a buffer is filled in between
_WAITS_UNTIL_SURE = 3  # as many times the longest wait must have passed before the time left is shown


class Progress:
    """Context manager that shows the progress of a piece of work.

    On a terminal it shows a few lines that disappear at the end: a bar, readings, speed, memory, the time left and
    the last warnings. Elsewhere, and in a run's log file, it logs a line at the first readings, every 10 seconds and
    at the end: `training: 24.7% tokens=123904 loss=61.2 l0=64.0 tokens_per_second=7020 seconds_left=54`.
    Inside another `Progress` it shows nothing.

    Args:
        doing: what the work is, in one word, such as `training`.
        total: the size of the work, in `unit`.
        done: the part that was done earlier, in `unit`.
        unit: name of the unit, in the plural.
        device: the device whose memory is shown: for a CUDA device what torch has allocated on it, for `cpu` the
            resident memory of this process. None shows no memory.
        speaks: whether this rank shows anything; False if another rank shows the same.
    """

    def __init__(
        self,
        doing: str,
        total: int,
        *,
        done: int = 0,
        unit: str = "tokens",
        device: str | None = None,
        speaks: bool = True,
    ) -> None:
        self.doing = doing
        self.total = total
        self.done = done
        self.unit = unit
        self.readings: Mapping[str, str] = {}
        self._device = device
        self._speaks = speaks
        self._started = time.monotonic()
        self._points = deque([(self._started, done)])
        self._longest_wait = 0.0  # between two calls of `advance`
        self._line_at = -_SECONDS_BETWEEN_LINES

    def __enter__(self) -> Progress:
        self._speaks &= terminal.claim_progress(self)
        self._live = None
        if self._speaks and terminal.is_live:
            self._live = Live(get_renderable=self._view, console=terminal.console, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if self._live:
            self._live.stop()
        terminal.release_progress(self)
        if kind is None and self._speaks and self._line_at >= 0:  # short work logs no line at all
            self._log_line()

    @property
    def per_second(self) -> float:
        """The speed over the last 15 seconds or 20 longest waits, in `unit` per second; 0 before it is known."""
        (then, before), (now, done) = self._points[0], self._points[-1]
        return (done - before) / (now - then) if now > then else 0.0

    def advance(self, n: int, readings: Mapping[str, str] | None = None) -> None:
        """Adds `n` to the work done.

        Args:
            n: how much was done since the last call, in `unit`.
            readings: values to show by name; they replace the earlier ones. None keeps the earlier ones.
        """
        now = time.monotonic()
        self.done += n
        self._longest_wait = max(self._longest_wait, now - self._points[-1][0])
        self._points.append((now, self.done))
        seconds = max(_SECONDS_OF_RATE, _WAITS_OF_RATE * self._longest_wait)
        while len(self._points) > 2 and now - self._points[1][0] > seconds:
            self._points.popleft()
        if readings is not None:
            self.readings = readings
        waited_for = max(self._line_at + _SECONDS_BETWEEN_LINES, 0 if readings else self._started + 1)
        if self._speaks and now >= waited_for:
            self._log_line()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager for other work in between. The time that it takes is left out of the speed."""
        started = time.monotonic()
        yield
        waited = time.monotonic() - started
        self._points = deque((then + waited, done) for then, done in self._points)

    def _log_line(self) -> None:
        self._line_at = time.monotonic()
        log.log(logging.DEBUG if self._live else logging.INFO, "%s", self.line())

    def line(self) -> str:
        """Returns the log line: the share that is done, and `name=value` pairs."""
        values = {self.unit: str(self.done), **self.readings, f"{self.unit}_per_second": f"{self.per_second:.0f}"}
        if self._device is not None:
            values["memory_gib"] = f"{self.memory_gib:.2f}"
        if (left := self._seconds_left()) is not None:
            values["seconds_left"] = f"{left:.0f}"
        pairs = (f"{name.replace(' ', '_')}={value.replace(' ', '')}" for name, value in values.items())
        return f"{self.doing}: {self._share:.1%} {' '.join(pairs)}"

    @property
    def _share(self) -> float:
        return min(self.done / self.total, 1.0) if self.total else 1.0

    def _seconds_left(self) -> float | None:
        """Returns the time left; None while it cannot be told, such as at the first step after a buffer was filled."""
        if self.done >= self.total:
            return 0.0
        seconds = self._points[-1][0] - self._points[0][0]
        is_sure = seconds >= _WAITS_UNTIL_SURE * self._longest_wait
        return (self.total - self.done) / self.per_second if self.per_second and is_sure else None

    @property
    def memory_gib(self) -> float:
        """Memory in use now, in GiB: allocated by torch on the GPU, or resident in this process."""
        if self._device is not None and torch.device(self._device).type == "cuda":
            return torch.cuda.memory_allocated(self._device) / 2**30
        if self._device is not None and torch.device(self._device).type == "mps":
            return torch.mps.current_allocated_memory() / 2**30
        return psutil.Process().memory_info().rss / 2**30

    def _view(self) -> RenderableType:
        left = self._seconds_left()
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        bar.add_row(
            Text(f"{self.doing} {self._share:.0%}", "bold"),
            ProgressBar(total=max(self.total, 1), completed=min(self.done, self.total)),
            Text(f"{duration(left)} left" if left is not None else ""),
        )
        facts = [f"{name} {value}" for name, value in self.readings.items()]
        facts += [f"{self.done:,} of {self.total:,} {self.unit}", f"{self.per_second:,.0f} {self.unit}/s"]
        facts += [f"{self.memory_gib:.2f} GiB"] if self._device is not None else []
        warnings = [Text(f"! {line}", "yellow", no_wrap=True, overflow="ellipsis") for line in terminal.last_warnings]
        return Group(bar, Text("   ".join(facts), no_wrap=False, overflow="fold"), *warnings)


def duration(seconds: float) -> str:
    """Returns a time in words: `54 s`, `12 min 30 s`, `3 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"
