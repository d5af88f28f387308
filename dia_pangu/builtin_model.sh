#!/usr/bin/env bash
# Old name of studies/dia_pangu/builtin_model.py, as long as pruning/run_builtin.sh calls it.
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
exec "$PYTHON" "$ROOT/studies/dia_pangu/builtin_model.py"
