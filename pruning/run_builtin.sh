#!/usr/bin/env bash
# Built-in study on dia_pangu's report model: which layers matter, what is lost without them, what healing brings back. Called by
# run_all.sh after dia_pangu, whose model it uses; by hand: bash pruning/run_builtin.sh makes that model first if it is not there.
# SMOKE=1 runs the same at the smallest sizes; DATA_ROOT adds real reports.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
export TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
dia=$ROOT/dia_pangu
data=$ROOT/data/dia_pangu${SMOKE:+_smoke}
run=$RUNS/pruning
model=$RUNS/dia_pangu/ft llm=$RUNS/dia_pangu/llm/model
real=200 log=100
study=(--ratio 0.25 0.33 0.5 --test-samples 100 --train-samples 320 --heal-steps 30 --heal-batch 8 --heal-lr 1e-3)
study_real=(--ratio 0.5 --test-samples 40 --train-samples 160 --heal-steps 15 --heal-batch 8 --random-sets 3)
if [ -n "${SMOKE:-}" ]; then
  real=6 log=4
  study=(--ratio 0.5 --test-samples 10 --train-samples 24 --calibration 4 --heal-steps 2 --heal-batch 4 --random-sets 2 --max-new-tokens 16)
  study_real=("${study[@]}")
fi
step() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

if ! grep -qsF "\"$data\"" "$model/config.json" || [ ! -f "$model/pytorch_model.bin" ] || [ ! -f "$data/annotation_en.json" ]; then
  step "dia_pangu's model on $data is not there: making it"
  bash "$dia/builtin_model.sh"
fi

step "study: scan, choose, prune, heal, test"
"$PYTHON" "$ROOT/pruning/study.py" --model "$model" --lang-model-path "$llm" --data "$data" --cache "$data/cache" --out "$run/study" --overwrite "${study[@]}" "$@"

if [ -n "${DATA_ROOT:-}" ] && [ -f "$DATA_ROOT/ct/ct_reports_train.json" ] && [ -f "$DATA_ROOT/ct/ct_reports_val.json" ]; then
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
