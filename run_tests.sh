#!/usr/bin/env bash
# Sets up as the other scripts do, and runs the tests. Arguments go to pytest.
#
#   ./run_tests.sh            all that need no other environment
#   ./run_tests.sh --parity   the comparisons with SAEBench and dictionary_learning, in environments of their own
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=setup_environment.sh
source ./setup_environment.sh

set_up_environment requirements.txt requirements-embedded.txt requirements-dev.txt
if [[ "${1:-}" == "--parity" ]]; then
    shift
    set -- -m parity "$@"
fi
exec "$PYTHON" -m pytest "$@"
