"""The live view shows all its facts, whatever the width of the terminal."""

import io

import pytest
from rich.console import Console

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
