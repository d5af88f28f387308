#!/usr/bin/env bash
# Pre-train. DATA=folder trains the published sizes on it; without DATA the built-in data and a small model are used.
#   DATA=/data/ecg OUT=runs/cwt_mae/base bash cwt_mae/run_train.sh --skip-bad
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
show_help "$ROOT/cwt_mae/train.py" "$@"
sizes=()
if [ -z "${DATA:-}" ]; then
  DATA=$ROOT/data/cwt_mae/builtin
  if [ ! -d "$DATA" ]; then
    echo "no DATA given: making the built-in data in $DATA"
    "$PYTHON" "$ROOT/cwt_mae/make_data.py" --out "$DATA"
  fi
  # thin patches over the whole height of the image, log-spaced scales, the plain signal beside it: README.md
  sizes=(--cwt-scales 16 --lowest-scale 0.7 --scale-step 1.25 --log-scales --patch-size-freq 16 --embed-dim 64 --depth 3 --num-heads 4
         --decoder-embed-dim 48 --decoder-depth 1 --decoder-num-heads 4 --no-patch-norm --raw-patches --batch-size 64 --lr 2e-3
         --model-fs 50 --signal-len 500 --patch-size-time 10 --windows 6400 --max-steps 1500 --eval-every 500 --save-every 500
         --split "$DATA/labelled/split.json" --probe rhythm)
fi
launch "$ROOT/cwt_mae/train.py" --data "$DATA" --out "${OUT:-$ROOT/runs/cwt_mae/base}" "${sizes[@]+"${sizes[@]}"}" "$@"
