#!/usr/bin/env bash
# Test one pruned checkpoint: reports, scores, perplexity, latency. Any argument of test.py may follow.
#   MODEL=pruned/pytorch_model_pruned_drop4_7_merged_clean_v0112_en_cpu.bin MAP=pruned/prune_layer_map_drop4_7_v0112_en_cpu.json \
#   LLM=runs/dia_pangu/llm/model DATA=data/dia_pangu OUT=results bash pruning/run_test.sh
# Without MODEL: the smallest checkpoint that the built-in study has pruned.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
show_help "$ROOT/pruning/test.py" "$@"
if [ -z "${MODEL:-}" ]; then
  MODEL=$(ls -Sr "$RUNS"/pruning/study/pruned/pytorch_model_pruned_*_merged_* 2>/dev/null | head -n 1 || true)
  [ -n "$MODEL" ] || { echo "error: nothing is pruned yet; run pruning/run_train.sh first, or set MODEL, MAP and LLM" >&2; exit 2; }
  tag=${MODEL##*/pytorch_model_pruned_} tag=${tag%%_merged_*}
  LLM=$RUNS/pruning/study/pruned/hf_$tag MAP=$RUNS/pruning/study/pruned/prune_layer_map_${tag}_v0112_en_cpu.json
fi
[ -n "${LLM:-}" ] || { echo "error: MODEL is set but LLM is not; LLM takes the folder of its language model" >&2; exit 2; }
"$PYTHON" "$ROOT/pruning/test.py" --pruned_model_path "$MODEL" ${MAP:+--prune_map_path "$MAP"} --lang-model-path "$LLM" \
  --data "${DATA:-$ROOT/data/dia_pangu}" --out_dir "${OUT:-$RUNS/pruning/test}" "$@"
