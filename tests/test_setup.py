"""setup_environment.sh takes torch from TORCH_INDEX_URL and the rest from the machine's index, or PYTHON as it is.

Real pip, real environments and real indexes on loopback. The packages are all but empty, so that a test takes seconds.
"""

import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from functools import partial
from pathlib import Path

import pytest

from support.processes import ROOT, Outcome

PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
CUDA_TORCH = f"{PINS['torch']}+cu130"
# As a CUDA build does. The versions of the last two are those that this build names, in no list of this project.
ASKED_FOR = (
    "filelock",
    "typing_extensions>=4.10.0",
    "sympy>=1.13.3",
    "networkx>=2.5.1",
    "Jinja2",
    "fsspec>=0.8.5",
    "nvidia-cublas==13.1.0.3",
    "triton==3.7.0",
)


def write_wheel(directory: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> None:
    """Writes a package of one empty module where an index has it: {directory}/{name}/{wheel}."""
    project, stem = directory / name.lower().replace("_", "-"), f"{name.replace('-', '_')}-{version}"
    project.mkdir(parents=True, exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(project / f"{stem}-py3-none-any.whl", "w") as wheel:
        files = {
            "METADATA": metadata + "".join(f"Requires-Dist: {each}\n" for each in requires),
            "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "RECORD": "".join(f"{stem}.dist-info/{file},,\n" for file in ("METADATA", "WHEEL", "RECORD"))
            + f"{name}.py,,\n",
        }
        wheel.writestr(f"{name}.py", "")
        for file, content in files.items():
            wheel.writestr(f"{stem}.dist-info/{file}", content)


class _Index(http.server.SimpleHTTPRequestHandler):
    """Serves a directory: its listings are the pages of a package index (PEP 503)."""

    def log_message(self, *_: object) -> None:
        pass

    def send_head(self):
        self.server.asked.append(self.path)
        return super().send_head()


class Machine:
    """A clone without an environment, on a machine with a package index of its own."""

    def __init__(self, directory: Path) -> None:
        self.clone, self.indexes, self.wheelhouse = directory / "clone", directory / "indexes", directory / "wheelhouse"
        for each in (self.clone, self.indexes / "cuda", self.indexes / "machine", self.wheelhouse):
            each.mkdir(parents=True)
        for name in ("setup_environment.sh", "constraints.txt"):
            shutil.copy(ROOT / name, self.clone)
        (self.clone / "requirements.txt").write_text("# What the scripts import.\ntorch>=2.11\n")
        (self.clone / "constraints-of-machine.txt").write_text("torch<3\n")
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Index, directory=str(self.indexes)))
        self.server.asked = []
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        for each in ASKED_FOR:
            name, _, version = re.fullmatch(r"([\w-]+)(==|>=)?(\S+)?", each).groups()
            write_wheel(self.indexes / "machine", name, PINS.get(name) or version)

    def set_up(self, **environment: str) -> Outcome:
        """Sets up the environment, and prints the interpreter that was chosen."""
        left_out = re.compile("PIP_.*|PYTHON.*|VIRTUAL_ENV|CONDA_PREFIX|TORCH_INDEX_URL")
        of_machine = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.clone),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": f"{self.url}/machine/",
            "PIP_FIND_LINKS": str(self.wheelhouse),
            "PIP_CONSTRAINT": str(self.clone / "constraints-of-machine.txt"),
        }
        done = subprocess.run(
            [
                *("bash", "-c"),
                'set -euo pipefail; source ./setup_environment.sh; set_up_environment requirements.txt; echo "$PYTHON"',
            ],
            cwd=self.clone,
            env={k: v for k, v in os.environ.items() if not left_out.fullmatch(k)} | of_machine | environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def installed(self) -> dict[str, str]:
        """The versions of the packages in the clone's environment, by name."""
        found = self.clone.glob(".venv/lib/python*/site-packages/*.dist-info")
        return dict(path.name.removesuffix(".dist-info").split("-", 1) for path in found)


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    machine.server.shutdown()
    machine.server.server_close()


def test_torch_comes_from_its_index_and_the_rest_from_the_machines(machine):
    write_wheel(machine.indexes / "cuda", "torch", CUDA_TORCH, ASKED_FOR)
    for name in ("filelock", "fsspec", "sympy"):  # the index of torch has other versions of these too
        write_wheel(machine.indexes / "cuda", name, "9999.1")
    # Builds that pip would prefer, if it looked where it usually does.
    write_wheel(machine.indexes / "machine", "torch", f"{PINS['torch']}+zzz")
    write_wheel(machine.wheelhouse, "torch", f"{PINS['torch']}+zzz")
    for wheel in machine.wheelhouse.glob("torch/*.whl"):
        wheel.rename(machine.wheelhouse / wheel.name)

    done = machine.set_up(TORCH_INDEX_URL=f"{machine.url}/cuda")

    assert done.status == 0, done.stderr
    assert done.stdout.strip() == str(machine.clone / ".venv/bin/python")
    installed = machine.installed()
    assert installed["torch"] == CUDA_TORCH
    assert list(machine.clone.glob(".venv/lib/python*/site-packages/__pycache__/torch.*.pyc"))  # compiled
    for name in ("filelock", "fsspec", "sympy", "networkx"):
        assert installed[name] == PINS[name]
    assert (installed["nvidia_cublas"], installed["triton"]) == ("13.1.0.3", "3.7.0")
    assert {path.split("/")[2] for path in machine.server.asked if path.startswith("/cuda/")} == {"torch"}


@pytest.mark.parametrize("version", ["2.11.0+cu126", None], ids=["another version", "no torch"])
def test_an_index_without_the_pinned_torch_is_told(machine, version):
    if version:
        write_wheel(machine.indexes / "cuda", "torch", version)
    write_wheel(machine.indexes / "machine", "torch", PINS["torch"])
    done = machine.set_up(TORCH_INDEX_URL=machine.url.replace("//", "//me:secret@") + "/cuda")
    (error,) = done.error_lines
    assert done.status == 2
    assert error.startswith(f"error: TORCH_INDEX_URL {machine.url}/cuda: holds no torch=={PINS['torch']} for Python 3.")
    assert f"these versions of torch: {str(version).lower()};" in error
    assert done.stderr.splitlines()[-1] == error


def test_an_index_that_cannot_be_reached_is_told(machine):
    done = machine.set_up(TORCH_INDEX_URL="http://127.0.0.1:9/cuda", PIP_RETRIES="1")
    (error,) = done.error_lines
    assert error.startswith("error: TORCH_INDEX_URL http://127.0.0.1:9/cuda: cannot be reached; ")


def test_no_package_is_pinned_whose_version_the_build_of_torch_decides():
    assert not [name for name in PINS if re.match("nvidia|cuda|triton", name)]


def test_an_interpreter_that_is_named_is_used_or_refused(machine):
    (machine.clone / "requirements.txt").write_text("pytest\n")
    done = machine.set_up(PYTHON=sys.executable)
    assert (done.status, done.stdout.strip()) == (0, sys.executable), done.stderr

    (machine.clone / "requirements.txt").write_text("pytest\npytest>=9999\nsurely-not-there>=2,<3\n")
    done = machine.set_up(PYTHON=sys.executable)
    assert done.status == 2
    assert done.stderr.startswith(f"error: PYTHON {sys.executable}: lacks pytest>=9999 (")
    assert "), surely-not-there<3,>=2; install it there" in done.stderr
    assert not (machine.clone / ".venv").exists()

    done = machine.set_up(PYTHON="/nowhere/python")
    assert done.stderr.startswith("error: PYTHON /nowhere/python: does not run as Python")
    assert len(done.stderr.splitlines()) == 1


def test_packages_outside_any_environment_count_for_a_named_interpreter(machine, tmp_path):
    """As on a GPU machine without a network, whose packages are on PYTHONPATH."""
    (machine.clone / "requirements.txt").write_text("laid-there>=2\n")
    metadata = tmp_path / "site/laid_there-2.1.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: laid-there\nVersion: 2.1\n")
    done = machine.set_up(PYTHON=sys.executable, PYTHONPATH=str(tmp_path / "site"))
    assert (done.status, done.stdout.strip()) == (0, sys.executable), done.stderr
