#!/usr/bin/env bash
# Join a signal encoder and a language model and train them on questions; arguments go to train.py.
#   TASK_DIR (or DATA)     folder in which every x.h5 has its x.json
#   SIGNAL_ENCODER_PATH    encoder folder (default: em_mllm/em_foundation/weight)
#   LLM_MODEL_PATH         language model's folder (default: em_mllm/9G4B)
#   OUTPUT_DIR (or OUT)    run folder (default: RUNS/em_mllm/base)        NPROC_PER_NODE=8 for several GPUs
# Nothing at hand: `python studies/em_mllm/first.py` makes small data and tiny models and trains them.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started with sh, which may be dash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
show_help "$ROOT/em_mllm/train.py" "$@"
TASK_DIR=${TASK_DIR:-${DATA:-}}
case " ${TASK_DIR:+--task-dir} ${*//_/-}" in   # flags may be written with underscores
  *" --task-"*) ;;
  *) env_fail "no data: give TASK_DIR=folder or --task-files; for a first try with built-in data: python studies/em_mllm/first.py" ;;
esac
case " ${*//_/-}" in
  *" --trained-dir"*) ;;   # which brings both
  *) SIGNAL_ENCODER_PATH=${SIGNAL_ENCODER_PATH:-$ROOT/em_mllm/em_foundation/weight} LLM_MODEL_PATH=${LLM_MODEL_PATH:-$ROOT/em_mllm/9G4B} ;;
esac
launch "$ROOT/em_mllm/train.py" ${TASK_DIR:+--task-dir "$TASK_DIR"} --output-dir "${OUTPUT_DIR:-${OUT:-$RUNS/em_mllm/base}}" \
  ${SIGNAL_ENCODER_PATH:+--signal-encoder-path "$SIGNAL_ENCODER_PATH"} ${LLM_MODEL_PATH:+--llm-model-path "$LLM_MODEL_PATH"} "$@"
