#!/usr/bin/env bash
# Built-in study on dia_pangu's report model: which layers matter, what is lost without them, what healing brings back. Called by
# run_all.sh; by hand: bash pruning/run_builtin.sh. SMOKE=1 runs the same at the smallest sizes; DATA_ROOT adds real reports.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
export TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
dia=$ROOT/dia_pangu
data=$ROOT/data/dia_pangu
run=$RUNS/pruning
from=$RUNS/dia_pangu
volumes=(--train 1200 --val 60 --test 120) patch=500 contrast=250 words=700 joint=350 real=200 log=100
study=(--ratio 0.25 0.33 0.5 --test-samples 60 --train-samples 320 --heal-steps 30 --heal-batch 8)
study_real=(--ratio 0.5 --test-samples 40 --train-samples 160 --heal-steps 15 --heal-batch 8 --random-sets 3)
if [ -n "${SMOKE:-}" ]; then
  data=$ROOT/data/dia_pangu_smoke
  volumes=(--train 48 --val 12 --test 16) patch=6 contrast=4 words=8 joint=4 real=6 log=4
  study=(--ratio 0.5 --test-samples 10 --train-samples 24 --calibration 4 --heal-steps 2 --heal-batch 4 --random-sets 2 --max-new-tokens 16)
  study_real=("${study[@]}")
fi
step() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }
layers() { "$PYTHON" -c "import json, sys; print(json.load(open(sys.argv[1]))['num_hidden_layers'])" "$1/config.json" 2>/dev/null || echo 0; }

model=$from/ft llm=$from/llm/model
if [ "$(layers "$llm")" -ge 8 ] && [ -f "$model/pytorch_model.bin" ] && [ -d "$data/volumes" ]; then
  step "dia_pangu's own model has $(layers "$llm") layers"
else
  # Depth must matter: dia_pangu's built-in language model is shallower than 8 layers, so this study trains its own behind the
  # same vision part.
  if [ ! -f "$data/CTRG_finding_labels.csv" ] || [ ! -f "$data/annotation_en.json" ]; then
    step "phantoms"
    "$PYTHON" "$dia/make_data.py" --out "$data" "${volumes[@]}"
  fi
  common=(--data "$data" --cache "$data/cache" --size tiny --overwrite --logging-steps "$log")
  vision=$from/contrast
  if [ ! -f "$vision/vision.safetensors" ]; then
    step "vision part: patch labels, then prototypes and memories"
    "$PYTHON" "$dia/pretrain_vit.py" "${common[@]}" --max-steps "$patch" --out "$run/patches"
    "$PYTHON" "$dia/pretrain_vit.py" "${common[@]}" --max-steps "$contrast" --learning-rate 1e-3 --contrast 6 --start "$run/patches" --out "$run/contrast"
    vision=$run/contrast
  fi
  step "language model of 8 layers: reports alone"
  "$PYTHON" "$dia/warm_llm.py" --data "$data" --make 8 --width 96 --max-steps "$words" --per-device-train-batch-size 8 \
    --out "$run/llm" --overwrite --logging-steps "$log"
  step "language model and Perceiver together, on volumes"
  "$PYTHON" "$dia/train.py" --stage pre "${common[@]}" --lang-encoder-path "$run/llm/model" --start "$vision/vision.safetensors" --limit 1600 \
    --train embedding_layer.perceiver embedding_layer.fc figure_token lang_model. --max-steps "$joint" --learning-rate 1.5e-3 \
    --lr-scheduler-type cosine --adam-beta2 0.98 --flip 0.02 --per-device-train-batch-size 8 --gradient-accumulation-steps 1 --out "$run/base"
  model=$run/base llm=$run/llm/model
fi

step "study: scan, choose, prune, heal, test"
"$PYTHON" "$ROOT/pruning/study.py" --model "$model" --lang-model-path "$llm" --data "$data" --cache "$data/cache" --out "$run/study" --overwrite "${study[@]}" "$@"

if [ -n "${DATA_ROOT:-}" ] && [ -f "$DATA_ROOT/ct/ct_reports_train.json" ]; then
  step "real reports, text alone"
  "$PYTHON" "$dia/warm_llm.py" --reports "$DATA_ROOT/ct/ct_reports_train.json" --eval-reports "$DATA_ROOT/ct/ct_reports_val.json" --make 8 --width 96 \
    --max-length 256 --max-steps "$real" --per-device-train-batch-size 8 --out "$run/llm_real" --overwrite --logging-steps "$log"
  for split in train val; do
    "$PYTHON" -c "import json, sys
for case in json.load(open(sys.argv[1]))['cases']: print(json.dumps({'text': case['report']}, ensure_ascii=False))" \
      "$DATA_ROOT/ct/ct_reports_$split.json" > "$run/real_$split.jsonl"
  done
  "$PYTHON" "$ROOT/pruning/study.py" --model "$run/llm_real/model" --texts "$run/real_train.jsonl" --test-texts "$run/real_val.jsonl" \
    --out "$run/real_reports" --overwrite "${study_real[@]}"
fi
step "done"
