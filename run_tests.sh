#!/usr/bin/env bash
# Sets up the environment and runs the tests. Other arguments go to pytest.
#
#   ./run_tests.sh              all tests except those below
#   ./run_tests.sh --gpu        the CUDA device against the CPU: minutes, and no network once the packages are there
#   ./run_tests.sh --cuda-shapes
#                               more kinds and sizes of SAEs on the CUDA path, on fake tensors: minutes
#   ./run_tests.sh --parity     agreement with SAELens, SAEBench, sae-probes and dictionary_learning
#   ./run_tests.sh --models     every class of language model and every hook; writes docs/models.md: ten minutes
#   ./run_tests.sh --scale      many ranks, machines and trials: about half an hour
#   ./run_tests.sh --diagnosis  SAEs that are unhealthy on purpose, and the advice for them: about half an hour
#   ./run_tests.sh --faults     kills, full disks, broken networks, damaged files: about half an hour
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=setup_environment.sh
source ./setup_environment.sh

if [[ "${1:-}" == --gpu ]]; then
    set_up_environment requirements.txt requirements/gpu.txt
else
    set_up_environment requirements.txt requirements/embedded.txt requirements/sweep.txt requirements/explanations.txt requirements/dev.txt
fi
echo "$("$PYTHON" --version), $PYTHON"
case "${1:-}" in
"") # three at a time, each on one core, since each often waits
    export OMP_NUM_THREADS=1
    set -- -n 3 --dist loadfile --no-loadscope-reorder --durations 20 # in the order of tests/conftest.py
    ;;
--gpu) set -- tests/gpu --device cuda "${@:2}" ;;
--faults) # three at a time: waiting takes most of the time
    export OMP_NUM_THREADS=1
    set -- -n 3 --dist loadfile -m "not parity" tests/faults tests/training/test_resume.py tests/inspection "${@:2}"
    ;;
--scale) set -- -m "scale" "${@:2}" ;;
--diagnosis) set -- -m "diagnosis" "${@:2}" ;;
--cuda-shapes) set -- -m "cuda_shapes" "${@:2}" ;;
--models) set -- -m "models" tests/models "${@:2}" ;;
--parity) set -- -m parity "${@:2}" ;;
esac
exec "$PYTHON" -m pytest "$@"
