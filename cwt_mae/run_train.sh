#!/usr/bin/env bash
# Pre-train. DATA=folder trains the published sizes on it; without DATA a small model is trained on the built-in data.
#   DATA=/data/ecg OUT=runs/cwt_mae/base bash cwt_mae/run_train.sh --skip-bad
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started with sh, which may be dash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
show_help "$ROOT/cwt_mae/train.py" "$@"
small=()
if [ -z "${DATA:-}" ]; then
  DATA=$ROOT/data/cwt_mae/builtin
  if [ ! -d "$DATA" ]; then
    echo "no DATA given: making the built-in data in $DATA"
    "$PYTHON" "$ROOT/cwt_mae/make_data.py" --out "$DATA"
  fi
  small=(--config "$ROOT/cwt_mae/config_small.yaml" --model-fs 50 --windows 6400 --batch-size 64 --lr 2e-3 --max-steps 1500
         --eval-every 500 --save-every 500 --split "$DATA/labelled/split.json" --probe rhythm)
fi
launch "$ROOT/cwt_mae/train.py" --data "$DATA" --out "${OUT:-$RUNS/cwt_mae/base}" "${small[@]+"${small[@]}"}" "$@"
