#!/usr/bin/env bash
# Score a fine-tuned classifier (MODEL) on the test records. Without DATA: those of the built-in data.
#   DATA=/data/mitbih MODEL=runs/cwt_mae/classifier/model.safetensors bash cwt_mae/run_test.sh
# SPLIT=file.json names the training and the test records.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started with sh, which may be dash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
show_help "$ROOT/cwt_mae/test.py" "$@"
MODEL=${MODEL:-$RUNS/cwt_mae/classifier/model.safetensors}
[ -f "$MODEL" ] || env_fail "$MODEL: no such classifier; run cwt_mae/run_finetune.sh first or set MODEL"
if [ -z "${DATA:-}" ]; then
  DATA=$ROOT/data/cwt_mae/builtin/labelled
  SPLIT=$DATA/split.json
fi
NPROC_PER_NODE=1 launch "$ROOT/cwt_mae/test.py" --model "$MODEL" --data "$DATA" ${SPLIT:+--split "$SPLIT"} \
  --out "${OUT:-$RUNS/cwt_mae/classifier-test}" "$@"
