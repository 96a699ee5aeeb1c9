#!/usr/bin/env bash
# Sets up as the other scripts do, and runs the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
# shellcheck source=setup_environment.sh
source ./setup_environment.sh

set_up_environment requirements.txt requirements-embedded.txt requirements-dev.txt
exec "$PYTHON" -m pytest "$@"
