#!/usr/bin/env bash
# Fine-tune a pre-trained model (MODEL) to TASK. Without DATA: the built-in records and their rhythms.
#   DATA=/data/mitbih TASK=beat MODEL=runs/cwt_mae/base/model.safetensors bash cwt_mae/run_finetune.sh --max-steps 3000
# SPLIT=file.json names the training and the test records. The classifier goes to OUT; run_test.sh scores it.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started with sh, which may be dash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
show_help "$ROOT/cwt_mae/finetune.py" "$@"
MODEL=${MODEL:-$RUNS/cwt_mae/base/model.safetensors}
[ -f "$MODEL" ] || env_fail "$MODEL: no such model; run cwt_mae/run_train.sh first or set MODEL"
small=()
if [ -z "${DATA:-}" ]; then
  DATA=$ROOT/data/cwt_mae/builtin/labelled
  TASK=rhythm SPLIT=$DATA/split.json
  small=(--lr 1e-3 --max-steps 300 --eval-every 100 --folds 3)
fi
launch "$ROOT/cwt_mae/finetune.py" --pretrained "$MODEL" --data "$DATA" --task "${TASK:-beat}" ${SPLIT:+--split "$SPLIT"} \
  --out "${OUT:-$RUNS/cwt_mae/classifier}" "${small[@]+"${small[@]}"}" "$@"
