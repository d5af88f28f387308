#!/usr/bin/env bash
# Join encoder and language model and train on questions. Without data or models at the given places, the small built-in ones are made first.
#   TASK_DIR (or DATA) SIGNAL_ENCODER_PATH LLM_MODEL_PATH OUTPUT_DIR (or OUT)   NPROC_PER_NODE=8 for several GPUs; arguments go to train.py
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
HERE=$ROOT/em_mllm
show_help "$HERE/train.py" "$@"
TASK_DIR=${TASK_DIR:-${DATA:-}}
SIGNAL_ENCODER_PATH=${SIGNAL_ENCODER_PATH:-} LLM_MODEL_PATH=${LLM_MODEL_PATH:-} OUTPUT_DIR=${OUTPUT_DIR:-${OUT:-$RUNS/em_mllm/base}}
name= files=()
for value in "$@"; do                                  # a path given as a flag counts like its variable
  case $value in
    --*=*) name=${value%%=*} value=${value#*=} ;;
    --*) name=$value; continue ;;
  esac
  case $name in
    --task-dir) TASK_DIR=$value ;;
    --task-files) files+=("$value") ;;
    --signal-encoder-path) SIGNAL_ENCODER_PATH=$value ;;
    --llm-model-path) LLM_MODEL_PATH=$value ;;
  esac
done
if [ -n "$TASK_DIR" ]; then files=("$TASK_DIR"); set -- --task-dir "$TASK_DIR" "$@"; fi
if [ ${#files[@]} -eq 0 ]; then
  files=("$ROOT/data/em_mllm/small/train")
  if [ ! -f "${files[0]}/modulation.json" ]; then
    echo "no TASK_DIR given: making the small built-in data in $ROOT/data/em_mllm/small"
    "$PYTHON" "$HERE/make_data.py" --out "$ROOT/data/em_mllm/small" --train 200 --val 20 --test 20
  fi
  set -- --task-dir "${files[0]}" --batch-size 16 --epochs 2 --lr 2e-3 --signal-tokens 8 --optimizer muon --questions-per-signal 2 --freeze-llm "$@"
fi
if [ -z "$LLM_MODEL_PATH" ]; then
  if [ -f "$HERE/9G4B/config.json" ]; then LLM_MODEL_PATH=$HERE/9G4B; else
    LLM_MODEL_PATH=$ROOT/data/em_mllm/llm_small
    if [ ! -f "$LLM_MODEL_PATH/config.json" ]; then
      echo "no LLM_MODEL_PATH given and em_mllm/9G4B is empty: making a tiny language model in $LLM_MODEL_PATH"
      "$PYTHON" "$HERE/make_llm.py" --out "$LLM_MODEL_PATH" --steps 800
    fi
  fi
fi
if [ -z "$SIGNAL_ENCODER_PATH" ]; then
  if [ -f "$HERE/em_foundation/weight/model.safetensors" ]; then SIGNAL_ENCODER_PATH=$HERE/em_foundation/weight; else
    SIGNAL_ENCODER_PATH=$RUNS/em_mllm/pretrain_small/encoder
    if [ ! -f "$SIGNAL_ENCODER_PATH/config.json" ]; then
      echo "no SIGNAL_ENCODER_PATH given and em_mllm/em_foundation/weight is empty: pre-training a tiny encoder"
      signals=(); for file in "${files[@]}"; do case $file in *.json) ;; *) signals+=("$file") ;; esac; done
      NPROC_PER_NODE=1 launch "$HERE/pretrain.py" --data "${signals[@]}" --out "$RUNS/em_mllm/pretrain_small" --preset tiny --max-steps 200 \
        --optimizer muon --lr 2e-3 --mask-ratio 0.5 --spectrum-weight 0.5 --overwrite
    fi
  fi
fi
launch "$HERE/train.py" --signal-encoder-path "$SIGNAL_ENCODER_PATH" --llm-model-path "$LLM_MODEL_PATH" --output-dir "$OUTPUT_DIR" "$@"
