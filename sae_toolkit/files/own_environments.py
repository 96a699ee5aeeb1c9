"""Virtual environments for libraries whose requirements conflict with this project's. Each is made once."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from sae_toolkit import ROOT
from sae_toolkit.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnEnvironment:
    """The virtual environment `.venv-NAME`, with the packages that `requirements/NAME.txt` lists.

    Args:
        name: NAME in the two paths above.
        library: the library that the environment is for.
        flag: the flag that needs it, for messages.
        imports: a module of the library, imported to test the finished environment.
        python_versions: versions of Python for which the packages have wheels.
        because: why the environment needs one of these versions, for messages.
        takes: the size of the environment and the time to make it, for messages.
        root: the directory that holds the environment and `requirements`.
    """

    name: str
    library: str
    flag: str
    imports: str
    python_versions: tuple[tuple[int, int], ...]
    because: str
    takes: str
    root: Path = ROOT

    @property
    def venv(self) -> Path:
        return self.root / f".venv-{self.name}"

    @property
    def requirements(self) -> Path:
        return self.root / "requirements" / f"{self.name}.txt"

    def python(self) -> Path:
        """Returns the path of the environment's Python.

        If the environment is missing, is incomplete or has other versions, it is made first. torch comes from the
        wheel index `TORCH_INDEX_URL` if that is set. Everything else, with what torch asks for, comes from pip's
        default index.

        Raises:
            UserError: none of `python_versions` is installed, or pip cannot install a package.
        """
        python = self.venv / "bin" / "python"
        stamp = self.venv / self.requirements.name  # written last, so a complete environment has it
        with self.requirements.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            wanted = lock.read()
            if python.is_file() and stamp.is_file() and stamp.read_text() == wanted:
                return python
            pins = [line for line in wanted.splitlines() if line and not line.startswith("#")]
            rest = [pin for pin in pins if not pin.startswith("torch==")]
            log.info("making the environment of %s, once, in %s (%s)", self.library, self.venv, self.takes)
            self._run(self._base_python(), "-m", "venv", "--clear", self.venv)
            (self.venv / ".gitignore").write_text("*\n")
            pip = (python, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check")
            log.info("installing %d packages", len(rest))
            self._run(*pip, "--no-deps", *rest)
            (torch_pin,) = set(pins) - set(rest)
            log.info("installing %s", torch_pin)
            if index := os.environ.get("TORCH_INDEX_URL"):
                self._run(*pip, "--no-deps", torch_pin, "--index-url", index)
            self._run(*pip, torch_pin)
            self._run(python, "-c", f"import {self.imports}")
            stamp.write_text(wanted)
        return python

    def _base_python(self) -> str:
        if sys.version_info[:2] in self.python_versions:
            return sys.executable
        names = [f"python{major}.{minor}" for major, minor in self.python_versions]
        found = next((path for name in names if (path := shutil.which(name))), None)
        if found is None:
            raise UserError(
                f"{self.flag}: {self.because}, and the PATH has no {' or '.join(names)}; install one of them"
            )
        return found

    def _run(self, *command: str | Path) -> None:
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            error = next((line for line in lines if line.startswith("ERROR:")), lines[-1] if lines else "")
            raise UserError(f"{self.flag}: cannot make {self.venv}: {error.removeprefix('ERROR: ')}; try again")
