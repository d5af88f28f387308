#!/usr/bin/env bash
# Does the ranking of the layers transfer? Trains dia_pangu's built-in language model once more from another seed (SEED, default 1; data
# and vision part stay), repeats the study on it, and scores there the layers that the first study chose. After run_builtin.sh:
#   bash pruning/run_second_base.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
show_help "$ROOT/pruning/study.py" "$@"
export TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
dia=$ROOT/dia_pangu data=$ROOT/data/dia_pangu seed=${SEED:-1}
first=$RUNS/pruning/study vision=$RUNS/dia_pangu/contrast base=$RUNS/pruning/base-$seed
for file in "$first/layer_sensitivity.all.csv" "$vision/places.json" "$data/annotation_en.json"; do
  [ -f "$file" ] || { echo "error: $file is not there; run pruning/run_builtin.sh first, without SMOKE" >&2; exit 2; }
done
train=(--overwrite --logging-steps 100 --seed "$seed" --data "$data" --places "$vision/places.json" --per-device-train-batch-size 8
  --gradient-accumulation-steps 1)
ours=(--size tiny --cache "$data/cache" --lang-encoder-path "$base/llm/model" --learning-rate 1e-3)

# as dia_pangu/builtin_model.sh, with another seed
"$PYTHON" "$dia/warm_llm.py" "${train[@]}" --make 8 --width 96 --key-weight 4 --max-steps 1100 --out "$base/llm"
"$PYTHON" "$dia/train.py" --stage pre "${train[@]}" "${ours[@]}" --start "$vision" --max-steps 20 --out "$base/pre"
"$PYTHON" "$dia/train.py" --stage ft "${train[@]}" "${ours[@]}" --start "$base/pre" --max-steps 60 --lr-scheduler-type cosine --flip 0.02 \
  --key-weight 4 --freeze vision_encoder prototype sample_memory proj. temp --lora-r 8 --lora-alpha 16 --lora-dropout 0 \
  --lora-targets q_proj k_proj v_proj o_proj gate_proj up_proj down_proj --out "$base/ft"

"$PYTHON" "$ROOT/pruning/study.py" --model "$base/ft" --lang-model-path "$base/llm/model" --data "$data" --cache "$data/cache" \
  --also "$first" --out "$RUNS/pruning/study-$seed" --overwrite --ratio 0.25 0.33 0.5 --test-samples 100 --heal-steps 30 --heal-batch 8 \
  --heal-lr 1e-3 "$@"
