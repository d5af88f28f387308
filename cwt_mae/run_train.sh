#!/usr/bin/env bash
# Pre-train. DATA=folder trains the published sizes on it; without DATA the built-in data and a small model are used.
#   DATA=/data/ecg OUT=runs/cwt_mae/base bash cwt_mae/run_train.sh --skip-bad
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
source "$ROOT/cwt_mae/small.sh"
sizes=()
if [ -z "${DATA:-}" ]; then
  DATA=$ROOT/data/cwt_mae/builtin
  if [ ! -d "$DATA" ]; then
    echo "no DATA given: making the built-in data in $DATA"
    "$PYTHON" "$ROOT/cwt_mae/make_data.py" --out "$DATA"
  fi
  sizes=("${SMALL[@]}" "${BUILTIN[@]}" --split "$DATA/labelled/split.json" --max-steps 1500 --eval-every 500 --save-every 500 --probe rhythm)
fi
launch "$ROOT/cwt_mae/train.py" --data "$DATA" --out "${OUT:-$ROOT/runs/cwt_mae/base}" "${sizes[@]+"${sizes[@]}"}" "$@"
