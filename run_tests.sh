#!/usr/bin/env bash
# Set up the environment if needed, then run the tests: bash run_tests.sh [--fast] [test file ...] [pytest arguments]
# --fast leaves out the tests that are marked slow: several processes, launchers, faults, broken inputs.
# A file is one such as tests/test_run.py, as seen from where you stand or from the repository. PYTEST_WORKERS is the
# number of processes (default: as many as cores). Options of pytest: python -m pytest --help
# GOLDEN_DIR and DATA_ROOT name the reference tensors and the real data; by default they are looked for beside this folder.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started with sh, which may be dash
set -euo pipefail
case " $* " in *" -h "* | *" --help "*) sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}"; exit ;; esac
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
exec "$PYTHON" -m pytest -n "${PYTEST_WORKERS:-auto}" --dist worksteal ${paths[@]+"${paths[@]}"}
