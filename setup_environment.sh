# shellcheck shell=bash
# The other shell scripts source this file. It finds or makes a Python environment that satisfies the requirement files.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# has_requirements PYTHON FILE...: succeeds if the environment of that interpreter satisfies the requirement files.
has_requirements() {
    "$1" - "${@:2}" 2>/dev/null <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version
try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
assert sys.version_info >= (3, 11)
for path in sys.argv[1:]:
    for line in open(path):
        if line.strip() and not line.startswith("#"):
            wanted = Requirement(line.strip())
            try:
                found = version(wanted.name)
            except PackageNotFoundError:
                sys.exit(1)
            if not wanted.specifier.contains(found, prereleases=True):
                sys.exit(1)
PYTHON
}

# set_up_environment FILE...: sets PYTHON to an interpreter whose environment satisfies the requirement files.
# It uses the active venv or conda environment if that satisfies them. Otherwise it uses .venv: it makes .venv if there
# is none, and installs the versions of constraints.txt. If .venv already satisfies them, it installs nothing.
set_up_environment() {
    local files=("$@") active venv="$root/.venv" file
    for active in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
        if [[ -n "$active" ]] && has_requirements "$active/bin/python" "${files[@]}"; then
            PYTHON="$active/bin/python"
            return
        fi
    done
    PYTHON="$venv/bin/python"
    if has_requirements "$PYTHON" "${files[@]}"; then
        return
    fi
    local base=$PYTHON
    if [[ ! -x "$PYTHON" ]]; then
        for base in python3 python3.13 python3.12 python3.11 ""; do
            if [[ -z "$base" ]]; then
                echo "error: Python 3.11 or newer is needed; install it, and put it on the PATH as python3 or python3.11 to python3.13" >&2
                exit 2
            fi
            if "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                break
            fi
        done
    fi
    echo "Setting up $venv on $("$base" --version); the first time this takes some minutes" >&2
    [[ -x "$PYTHON" ]] || "$base" -m venv "$venv"
    local pip=("$PYTHON" -m pip install --quiet --disable-pip-version-check --constraint "$root/constraints.txt")
    if [[ -n "${TORCH_INDEX_URL:-}" ]]; then
        "${pip[@]}" --index-url "$TORCH_INDEX_URL" torch
    fi
    for file in "${files[@]}"; do
        if [[ "$file" == *embedded* ]]; then
            "${pip[@]}" --no-deps --requirement "$file"
        else
            "${pip[@]}" --requirement "$file"
        fi
    done
    has_requirements "$PYTHON" "${files[@]}" || { echo "error: $venv is incomplete; delete it and try again" >&2; exit 2; }
}

# cuda_devices: prints the names of the CUDA devices that torch sees, one per line. If the machine has an NVIDIA GPU
# that torch does not see, the script stops with an error: otherwise it would run on the CPU without a warning.
cuda_devices() {
    local driver names
    names=$("$PYTHON" -c 'import torch
for i in range(torch.cuda.device_count()): print(torch.cuda.get_device_name(i))')
    if [[ -z "$names" && -z "${CUDA_VISIBLE_DEVICES+set}" ]] && driver=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null) && [[ -n "$driver" ]]; then
        {
            echo "error: nvidia-smi sees a GPU ($(head -1 <<<"$driver"), $(nvidia-smi | grep -o 'CUDA Version: [0-9.]*'))," \
                "torch does not ($("$PYTHON" -c 'import torch; print(torch.__version__, "built for CUDA", torch.version.cuda)'))."
            echo "Install a torch built for this driver: delete $root/.venv, set TORCH_INDEX_URL to the wheel index for your"
            echo "CUDA version (pytorch.org, Get Started, shows it), and run this again. To run on the CPU: CUDA_VISIBLE_DEVICES= $0"
        } >&2
        exit 2
    fi
    echo -n "$names"
}
