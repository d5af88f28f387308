#!/usr/bin/env bash
# Measures the five systems at their real sizes on one GPU, in at most nine minutes, without a network and without
# setting up an environment: PYTHON is used as it is.
#
#   PYTHON=python3 bash bench/gpu.sh [--out FOLDER] [--budget SECONDS] [--steps dia em ...]
#   bash bench/gpu.sh --dry-run          tiny shapes on the CPU: the same code, numbers without meaning
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started with sh, which may be dash
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  if [ -x "$ROOT/.venv/bin/python" ]; then PYTHON=$ROOT/.venv/bin/python; else PYTHON=python3; fi
fi
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
exec "$PYTHON" "$ROOT/bench/gpu.py" "$@"
