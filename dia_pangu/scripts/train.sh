#!/usr/bin/env bash
# Train one stage: bash dia_pangu/scripts/train.sh --stage pre|ft ...; DATA, OUT and LLM name the folders. Without DATA it makes
# the built-in phantoms, a small vision part and a small language model first (about 4 minutes on one core). Upstream's recipes:
# pre: --num-train-epochs 50 --learning-rate 5e-5; ft: --num-train-epochs 3 --learning-rate 1e-5 --weight-decay 0.01 --lr-scheduler-type cosine.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
show_help "$ROOT/dia_pangu/src/train.py" "$@"
here="$ROOT/dia_pangu"
if [ -z "${DATA:-}" ]; then
  DATA=$ROOT/data/dia_pangu LLM=${LLM:-$RUNS/dia_pangu/llm/model} vision=$RUNS/dia_pangu/vision
  small=(--data "$DATA" --overwrite --logging-steps 100)
  printf 'DATA is not set: training on the built-in phantoms in %s\n' "$DATA"
  [ -f "$DATA/annotation_en.json" ] || "$PYTHON" "$here/make_data.py" --out "$DATA"
  [ -f "$LLM/config.json" ] || "$PYTHON" "$here/warm_llm.py" "${small[@]}" --make 4 --out "$RUNS/dia_pangu/llm"
  if [ ! -f "$vision/vision.safetensors" ]; then
    "$PYTHON" "$here/pretrain_vit.py" "${small[@]}" --cache "$DATA/cache" --max-steps 600 --out "$vision-patches"
    "$PYTHON" "$here/pretrain_vit.py" "${small[@]}" --cache "$DATA/cache" --max-steps 200 --learning-rate 1e-3 --contrast 2 \
      --start "$vision-patches" --out "$vision"
  fi
  set -- --size tiny --cache "$DATA/cache" --start "$vision" --learning-rate 1e-3 --per-device-train-batch-size 8 \
    --gradient-accumulation-steps 1 --num-train-epochs 1 "$@"
fi
launch "$here/src/train.py" --data "$DATA" --lang-encoder-path "${LLM:?set LLM to the folder of the language model}" \
  --out "${OUT:-$RUNS/dia_pangu/base}" "$@"
