"""The report as a page: its data, and what a browser makes of it."""

import json
import re
import shutil
import subprocess

import pytest

from support.processes import HANGS

D, F = 32, 300  # width and features of the SAE of the pages


def embedded_data(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def browse(url, profile, *flags):
    """Returns the document after 15 seconds of Chromium's virtual time, and the lines of its console."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=15000"]
    done = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=HANGS, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
