#!/usr/bin/env bash
# Set up the environment if needed, then run the tests: bash run_tests.sh [--fast] [pytest arguments]
# --fast leaves out the tests that are marked slow: several processes, launchers, faults, broken inputs.
# GOLDEN_DIR and DATA_ROOT name the reference tensors and the real data; by default they are looked for beside this folder.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started with sh, which may be dash
set -euo pipefail
ENV_EXTRA=requirements-dev.txt source "$(dirname "${BASH_SOURCE[0]}")/common/env.sh"
here=$PWD
cd "$ROOT"
paths=()
for argument in "$@"; do
  if [ "$argument" = --fast ]; then paths+=(-m "not slow"); continue; fi
  # a test path given from another folder still means that file
  if [ ! -e "$argument" ] && [ -e "$here/${argument%%::*}" ]; then argument=$here/$argument; fi
  paths+=("$argument")
done
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}              # one core each: pytest-xdist fills the others
exec "$PYTHON" -m pytest -n "${PYTEST_WORKERS:-auto}" --dist worksteal ${paths[@]+"${paths[@]}"}
