#!/usr/bin/env bash
# Test one pruned checkpoint: reports, scores, perplexity, latency. Any argument of test.py may follow.
#   MODEL=pruned/pytorch_model_pruned_drop4_7_merged_clean_v0112_en_cpu.bin MAP=pruned/prune_layer_map_drop4_7_v0112_en_cpu.json \
#   LLM=runs/dia_pangu/llm/model DATA=data/dia_pangu OUT=results bash pruning/run_test.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
for name in MODEL LLM; do
  [ -n "${!name:-}" ] || { echo "error: $name is not set; MODEL is the pruned checkpoint, LLM the folder of its language model" >&2; exit 2; }
done
"$PYTHON" "$ROOT/pruning/test.py" --pruned_model_path "$MODEL" ${MAP:+--prune_map_path "$MAP"} --lang-model-path "$LLM" \
  --data "${DATA:-$ROOT/data/dia_pangu}" --out_dir "${OUT:-$RUNS/pruning/test}" "$@"
