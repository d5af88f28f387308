#!/usr/bin/env bash
# Built-in study: phantoms, patch pre-training, report warm-up, both stages, test, controls and baselines. Called by run_all.sh;
# by hand: bash dia_pangu/run_builtin.sh. SMOKE=1 runs the same at the smallest sizes; DATA_ROOT adds the real data.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
export TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
here=$ROOT/dia_pangu
data=$ROOT/data/dia_pangu
run=$RUNS/dia_pangu
volumes=(--train 2000 --val 200 --test 300) patch=1100 contrast=400 words=700 pre=60 ft=200 shown=6 log=100
if [ -n "${SMOKE:-}" ]; then
  data=$ROOT/data/dia_pangu_smoke
  volumes=(--train 48 --val 12 --test 16) patch=8 contrast=4 words=12 pre=2 ft=4 shown=2 log=4
fi
common=(--data "$data" --cache "$data/cache" --size tiny --overwrite --logging-steps "$log")
llm=(--lang-encoder-path "$run/llm/model")
step() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

step "phantoms"
rm -rf "$data"
"$PYTHON" "$here/make_data.py" --out "$data" "${volumes[@]}"

step "vision part: patch labels, then prototypes and memories"
"$PYTHON" "$here/pretrain_vit.py" "${common[@]}" --max-steps "$patch" --out "$run/patches"
"$PYTHON" "$here/pretrain_vit.py" "${common[@]}" --max-steps "$contrast" --learning-rate 1e-3 --contrast 6 --start "$run/patches" \
  --out "$run/contrast"

step "language model: reports alone"
"$PYTHON" "$here/warm_llm.py" --data "$data" --make 4 --max-steps "$words" --out "$run/llm" --overwrite --logging-steps "$log"

step "stage pre: Perceiver; stage ft: LoRA and the embedding layer, the ViT stays as it is"
"$PYTHON" "$here/train.py" --stage pre "${common[@]}" "${llm[@]}" --start "$run/contrast" --max-steps "$pre" --learning-rate 1e-3 \
  --per-device-train-batch-size 16 --gradient-accumulation-steps 1 --out "$run/pre"
"$PYTHON" "$here/train.py" --stage ft "${common[@]}" "${llm[@]}" --start "$run/pre" --max-steps "$ft" --learning-rate 1e-3 \
  --per-device-train-batch-size 16 --gradient-accumulation-steps 1 --lr-scheduler-type cosine --freeze vision_encoder --flip 0.02 \
  --lora-r 8 --lora-alpha 16 --lora-dropout 0 --lora-targets q_proj k_proj v_proj o_proj gate_proj up_proj down_proj --out "$run/ft"

step "test set, once, and the same model under controls"
for control in none blank swap swap-visual; do
  "$PYTHON" "$here/test.py" --ckpt-path "$run/ft" "${llm[@]}" --data "$data" --cache "$data/cache" --batch-size 50 --max-new-tokens 120 \
    --control "$control" --evidence "$shown" --out "$run/test-$control"
done
"$PYTHON" "$here/evaluate/nlg_eval.py" --csv "$run/test-none/dia-pangu.csv" --out "$run/test-none/scores.json"

step "baselines and comparison"
"$PYTHON" "$here/evaluate/baselines.py" --data "$data" --cache "$data/cache" --size tiny --out "$run/baselines"
"$PYTHON" "$here/evaluate/compare.py" --data "$data" --model "$run/test-none" --baselines "$run/baselines" --out "$run" --control \
  "blank volume=$run/test-blank" "other patient=$run/test-swap" "other patient's image tokens=$run/test-swap-visual"

if [ -d "${DATA_ROOT:-/nowhere}/ct" ]; then
  step "real data"
  "$PYTHON" "$here/evaluate/real_data.py" --data-root "$DATA_ROOT" --ckpt-path "$run/ft" "${llm[@]}" --out "$run" ${SMOKE:+--smoke}
fi
step "done"
