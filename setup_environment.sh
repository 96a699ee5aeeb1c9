# shellcheck shell=bash
# The other shell scripts source this file. It finds or makes a Python environment that satisfies the requirement files.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# missing_requirements PYTHON FILE...: prints what the environment of that interpreter lacks of the requirement files, in
# one line. It fails if the interpreter does not run.
missing_requirements() {
    "$1" - "${@:2}" 2>/dev/null <<'PYTHON'
import sys
if sys.version_info < (3, 11):
    sys.exit(print("Python 3.11 or newer"))
from importlib.metadata import PackageNotFoundError, version
try:
    from packaging.requirements import Requirement
except ImportError:
    try:
        from pip._vendor.packaging.requirements import Requirement
    except ImportError:
        sys.exit(print("packaging"))
missing = []
for path in sys.argv[1:]:
    for line in open(path):
        if line.strip() and not line.startswith("#"):
            wanted = Requirement(line.strip())
            if wanted.marker and not wanted.marker.evaluate():
                continue
            try:
                found = version(wanted.name)
            except PackageNotFoundError:
                missing.append(str(wanted))
            else:
                if not wanted.specifier.contains(found, prereleases=True):
                    missing.append(f"{wanted} ({found} is there)")
print(", ".join(missing))
PYTHON
}

# has_requirements PYTHON FILE...: succeeds if the environment of that interpreter satisfies the requirement files.
has_requirements() {
    local missing
    missing=$(missing_requirements "$@") && [[ -z "$missing" ]]
}

# install_torch PIP...: installs the pinned torch from TORCH_INDEX_URL, and nothing else. What torch asks for comes later,
# with the requirement files, from where pip gets all packages.
install_torch() {
    local pin shown said there
    pin=$(grep '^torch==' "$root/constraints.txt")
    shown=${TORCH_INDEX_URL/\/\/*@/\/\/} # without a password
    # The variables replace what pip is configured with: other indexes and directories, which may hold a torch too ("."
    # holds none), and constraints, with which pip would not say which versions there are.
    if said=$(PIP_EXTRA_INDEX_URL=$TORCH_INDEX_URL PIP_FIND_LINKS=. PIP_CONSTRAINT=/dev/null \
        "$@" --no-deps --index-url "$TORCH_INDEX_URL" "$pin" 2>&1); then
        return
    fi
    there=$(sed -n 's/.*(from versions: \(.*\)).*/\1/p' <<<"$said" | head -1)
    echo -n "error: TORCH_INDEX_URL $shown: " >&2
    if grep -q "Retrying" <<<"$said"; then
        echo "cannot be reached; check the address, or unset it for pip's own index" >&2
    elif [[ -z "$there" ]]; then
        echo "$pin cannot be installed from there: $(grep . <<<"$said" | tail -1)" >&2
    else
        echo "holds no $pin for $("$PYTHON" --version) on this machine, but these versions of torch: $there;" \
            "name an index that holds it (pytorch.org, Get Started, lists them)" >&2
    fi
    exit 2
}

# set_up_environment FILE...: sets PYTHON to an interpreter whose environment satisfies the requirement files.
# If PYTHON is set already, it uses that one alone. Otherwise it uses the active venv or conda environment if that
# satisfies them, and otherwise .venv: it makes .venv if there is none, and installs the versions of constraints.txt.
# If .venv already satisfies them, it installs nothing.
set_up_environment() {
    local files=("$@") active venv="$root/.venv" file missing
    if [[ -n "${PYTHON:-}" ]]; then
        if ! missing=$(missing_requirements "$PYTHON" "${files[@]}"); then
            echo "error: PYTHON $PYTHON: does not run as Python; name another, or unset it for an environment made here" >&2
            exit 2
        fi
        if [[ -n "$missing" ]]; then
            echo "error: PYTHON $PYTHON: lacks $missing; install it there, or unset PYTHON for an environment made here" >&2
            exit 2
        fi
        PYTHON=$(command -v "$PYTHON")
        return
    fi
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
    # pip would compile on one core. It is done at the end, on all of them.
    local pip=("$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile) constraints="$root/constraints.txt"
    if [[ -n "${TORCH_INDEX_URL:-}" ]]; then
        install_torch "${pip[@]}"
        constraints="$venv/constraints.txt" # without the version of triton, which each build of torch chooses for itself
        grep -v '^triton==' "$root/constraints.txt" >"$constraints"
    fi
    pip+=(--constraint "$constraints")
    local whole=() alone=() # with what their packages need, and without
    for file in "${files[@]}"; do
        if [[ "$file" == *embedded* || "$file" == *explanations* ]]; then
            alone+=(--requirement "$file")
        else
            whole+=(--requirement "$file")
        fi
    done
    "${pip[@]}" "${whole[@]}"
    [[ ${#alone[@]} == 0 ]] || "${pip[@]}" --no-deps "${alone[@]}"
    # Some packages bring files for other versions of Python, which do not compile, or are warned of. What is seldom
    # imported, more than a third of all files, is compiled when it is.
    local seldom='/site-packages/(.*/)?(tests?|transformers/models|openai/types|ray/(rllib|dashboard|serve|data))/'
    "$PYTHON" -m compileall -q -j 0 -x "$seldom" "$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" &>/dev/null || true
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
