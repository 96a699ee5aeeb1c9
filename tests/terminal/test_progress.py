"""The live view shows all its facts, whatever the width of the terminal, and the time left can be relied on."""

import io
import re

import pytest
from rich.console import Console

from sae_toolkit.terminal import progress as progress_module
from sae_toolkit.terminal.progress import Progress


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_shows_speed_and_memory(width):
    progress = Progress("training", 500_736, done=299_008, device="cpu")
    progress.readings = {"loss": "53", "L0": "64.0", "explained variance": "0.833", "dead": "0.5%"}
    output = io.StringIO()
    size = {"width": width, "height": 20}  # both, or rich takes another size where TERM is dumb
    console = Console(file=output, **size, force_terminal=True, color_system=None, soft_wrap=True)
    console.print(progress._view())
    lines = output.getvalue().splitlines()
    shown = " ".join(" ".join(lines).split())
    assert "299,008 of 500,736 tokens" in shown
    assert "tokens/s" in shown
    assert "GiB" in shown
    assert all(len(line) <= width for line in lines[1:])


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def seconds_left(progress):
    found = re.search(r"seconds_left=(\d+)", progress.line())
    return int(found[1]) if found else None


@pytest.mark.parametrize(("filling", "steps", "of_step"), [(30, 50, 0.1), (60, 26, 0.2), (1, 100, 0.05)])
def test_the_time_left_counts_the_filling_of_buffers_between_the_steps(clock, filling, steps, of_step):
    """A slow language model fills a buffer for a minute, which the steps of a few seconds use up."""
    cycles, of_cycle = 20, filling + steps * of_step
    with Progress("training", cycles * steps * 128) as progress:
        for cycle in range(cycles):
            clock[0] += filling
            for step in range(steps):
                clock[0] += of_step
                progress.advance(128)
                left = (cycles - cycle) * of_cycle - filling - (step + 1) * of_step
                shown = seconds_left(progress)
                if shown is None:
                    assert cycle < 3
                elif left:
                    assert 0.5 * left - of_cycle < shown < 1.6 * left + of_cycle
                    assert cycle < 6 or abs(shown - left) < 0.2 * left + of_cycle
    assert seconds_left(progress) == 0


def test_the_time_left_of_even_work_is_said_at_once_and_follows_its_speed(clock):
    with Progress("activations", 1000) as progress:
        for _ in range(10):
            clock[0] += 1
            progress.advance(1)
        assert seconds_left(progress) == 990
        for _ in range(60):
            clock[0] += 0.5
            progress.advance(1)
        assert seconds_left(progress) == pytest.approx(930 / 2, rel=0.02)
