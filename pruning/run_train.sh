#!/usr/bin/env bash
# The whole study on a report model: scan, choose, prune at several ratios, heal, test, draw. Any argument of study.py may follow.
#   MODEL=runs/dia_pangu/ft LLM=runs/dia_pangu/llm/model DATA=data/dia_pangu OUT=runs/pruning/mine bash pruning/run_train.sh --ratio 0.25 0.5
# Without MODEL, the built-in data and model are made first (run_builtin.sh). To heal one pruned checkpoint: python pruning/train.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
show_help "$ROOT/pruning/study.py" "$@"
if [ -z "${MODEL:-}" ]; then
  echo "no MODEL given: making the built-in data and model, then the study"
  exec bash "$ROOT/pruning/run_builtin.sh" "$@"
fi
[ -n "${LLM:-}" ] || { echo "error: MODEL is set but LLM is not; LLM takes the folder of its language model" >&2; exit 2; }
"$PYTHON" "$ROOT/pruning/study.py" --model "$MODEL" --lang-model-path "$LLM" --data "${DATA:-$ROOT/data/dia_pangu}" \
  --out "${OUT:-$RUNS/pruning/study}" "$@"
