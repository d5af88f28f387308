#!/usr/bin/env bash
# Fine-tune a pre-trained model (MODEL) and score the test records. Without DATA: the built-in data and their rhythms.
#   DATA=/data/mitbih TASK=beat MODEL=runs/cwt_mae/base/model.safetensors bash cwt_mae/run_test.sh --max-steps 3000
# SPLIT=file.json names the training and test records. A classifier that exists already is scored with cwt_mae/test.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
show_help "$ROOT/cwt_mae/finetune.py" "$@"
MODEL=${MODEL:-$ROOT/runs/cwt_mae/base/model.safetensors} OUT=${OUT:-$ROOT/runs/cwt_mae/classifier}
if [ ! -f "$MODEL" ]; then
  echo "error: $MODEL: no such model; run cwt_mae/run_train.sh first or set MODEL" >&2
  exit 2
fi
if [ -z "${DATA:-}" ]; then
  DATA=$ROOT/data/cwt_mae/builtin/labelled TASK=rhythm SPLIT=$ROOT/data/cwt_mae/builtin/labelled/split.json
fi
split=(${SPLIT:+--split "$SPLIT"})
launch "$ROOT/cwt_mae/finetune.py" --pretrained "$MODEL" --data "$DATA" --task "${TASK:-beat}" "${split[@]+"${split[@]}"}" --lr 1e-3 --out "$OUT" --overwrite "$@"
NPROC_PER_NODE=1 launch "$ROOT/cwt_mae/test.py" --model "$OUT/model.safetensors" --data "$DATA" "${split[@]+"${split[@]}"}" --out "$OUT-test" --overwrite
