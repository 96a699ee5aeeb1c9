#!/usr/bin/env python
"""Makes the pictures of the README from a real run: docs/training.png and docs/report.png.

    python docs/make_pictures.py                                                     # runs the demo, makes both
    python docs/make_pictures.py --sae checkpoints/demo_1a2b3c4d/k3j2h1g0/final_500224    # report.png alone

training.png is the terminal in the middle of the training. report.png is the verdict and the first plots of the
report.html that the evaluation writes, without the tables between them. This needs two programs that the project does
not install: tmux, which is the terminal, and chromium, which draws the pictures.
"""

from __future__ import annotations

import argparse
import io
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
COLUMNS, LINES = 120, 24
WITHOUT_TABLES = "#measured, .definitions { display: none }"
LARGEST_BYTES = 300_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", type=Path, help="directory of an evaluated SAE (default: run --command for one)")
    parser.add_argument("--command", default="./run_saelens_training.sh demo", help="trains and evaluates an SAE")
    parser.add_argument("--percent", type=int, default=60, help="how far it is in training.png (default: 60)")
    parser.add_argument("--chromium", default="chromium", help="the browser's program (default: chromium)")
    flags = parser.parse_args()

    report = flags.sae / "report.html" if flags.sae else None
    if report is None:
        screen = screen_of_run(flags.command, flags.percent)
        with tempfile.TemporaryDirectory() as directory:
            drawing = Path(directory) / "training.svg"
            width, height = draw_terminal(flags.command, screen, drawing)
            take_picture(flags.chromium, drawing, "training.png", width=width, height=height)
        reports = ROOT.glob("checkpoints/*/*/final_*/report.html")
        report = max(reports, key=lambda path: path.stat().st_mtime, default=None)
    if report is None or not report.is_file():
        sys.exit(f"error: {report or 'checkpoints'}: there is no report.html; evaluate the SAE first")
    with tempfile.TemporaryDirectory() as directory:
        page = Path(directory) / "report.html"
        page.write_text(report.read_text().replace("</head>", f"<style>{WITHOUT_TABLES}</style></head>", 1))
        take_picture(flags.chromium, page, "report.png", width=1100, height=868)


def take_picture(chromium: str, page: Path, name: str, *, width: int, height: int) -> None:
    """Writes the top of a page, width x height pixels of it, to docs/{name}, a PNG file."""
    picture = ROOT / "docs" / name
    subprocess.run(
        [
            *(chromium, "--headless", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=15000"),
            *(f"--window-size={width},{height}", f"--screenshot={picture}", page.absolute().as_uri()),
        ],
        check=True,
        capture_output=True,
    )
    size = picture.stat().st_size
    print(f"{picture}: {width} x {height} pixels, {size:,} bytes")
    if size > LARGEST_BYTES:
        sys.exit(f"error: {picture}: more than {LARGEST_BYTES:,} bytes")


def screen_of_run(command: str, percent: int) -> str:
    """Runs a command to its end in a terminal of its own.

    Returns:
        What the terminal showed when the training had come to `percent`, as text with ANSI escape codes.
    """
    server = ["tmux", "-L", "make-pictures", "-f", "/dev/null"]

    def tmux(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*server, *words], check=check, capture_output=True, text=True)

    size = ("-x", str(COLUMNS), "-y", str(LINES))
    tmux("new-session", "-d", *size, "-c", str(ROOT), "-e", "COLORTERM=truecolor", *shlex.split(command))
    chosen = None
    while tmux("has-session", check=False).returncode == 0:
        screen = tmux("capture-pane", "-p", "-e", check=False).stdout
        progress = re.search(r"training (\d+)%", Text.from_ansi(screen).plain)
        if chosen is None and progress and int(progress[1]) >= percent:
            chosen = screen
        time.sleep(0.2)
    if chosen is None:
        sys.exit(f"error: {command}: ended before {percent}% of the training")
    return chosen


def draw_terminal(command: str, screen: str, drawing: Path) -> tuple[int, int]:
    """Draws a screen as a terminal window on a light background, to an SVG file; returns its width and height."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(screen.rstrip()))
    svg = console.export_svg(title=command, theme=DEFAULT_TERMINAL_THEME)
    view_box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert view_box is not None
    width, height = (round(float(side)) for side in view_box.groups())
    drawing.write_text(svg.replace("<svg ", f'<svg width="{width}" height="{height}" ', 1))
    return width, height


if __name__ == "__main__":
    main()
