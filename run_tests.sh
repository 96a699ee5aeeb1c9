#!/usr/bin/env bash
# Sets up as the other scripts do, and runs the tests. Arguments go to pytest.
#
#   ./run_tests.sh            all that need no other environment
#   ./run_tests.sh --parity   the comparisons with SAEBench and dictionary_learning, in environments of their own
#   ./run_tests.sh --scale    many processes, machines and trials: about half an hour
#   ./run_tests.sh --diagnosis   SAEs made sick on purpose, and the advice followed: about half an hour
#   ./run_tests.sh --faults   kills, full disks, broken networks, damaged files: about half an hour
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=setup_environment.sh
source ./setup_environment.sh

set_up_environment requirements.txt requirements/embedded.txt requirements/sweep.txt requirements/dev.txt
case "${1:-}" in
"") # two at a time, each on one core: most of their time goes into starting Python
    export OMP_NUM_THREADS=1
    set -- -n 2 --dist loadfile
    ;;
--faults) # most of their time goes into waiting
    export OMP_NUM_THREADS=1
    set -- -n 3 --dist loadfile -m "not parity" tests/faults tests/training/test_resume.py "${@:2}"
    ;;
--scale) set -- -m "scale" "${@:2}" ;;
--diagnosis) set -- -m "diagnosis" "${@:2}" ;;
--parity) set -- -m parity "${@:2}" ;;
esac
exec "$PYTHON" -m pytest "$@"
