#!/usr/bin/env bash
# Built-in study: data and model (builtin_model.sh), test, controls and baselines. Called by run_all.sh; by hand:
# bash dia_pangu/run_builtin.sh. SMOKE=1 runs the same at the smallest sizes; DATA_ROOT adds the real data. Another training seed:
# SEED=1 RUNS=runs/seed-1 bash dia_pangu/run_builtin.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
export TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
here=$ROOT/dia_pangu
data=$ROOT/data/dia_pangu${SMOKE:+_smoke}
run=$RUNS/dia_pangu
model=(--ckpt-path "$run/ft-hidden" --lang-encoder-path "$run/llm/model")
shown=6
if [ -n "${SMOKE:-}" ]; then
  shown=2
fi
step() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

bash "$here/builtin_model.sh"

step "test set, once, and the same model under controls"
test=("${model[@]}" --data "$data" --cache "$data/cache" --batch-size 50 --max-new-tokens 120)
for control in none blank swap swap-visual; do
  "$PYTHON" "$here/test.py" "${test[@]}" --control "$control" --evidence "$shown" --out "$run/test-$control"
done
for control in none swap-visual; do
  "$PYTHON" "$here/test.py" "${test[@]}" --control "$control" --hide-places --evidence 0 --out "$run/test-$control-hidden"
done
"$PYTHON" "$here/evaluate/nlg_eval.py" --csv "$run/test-none/dia-pangu.csv" --out "$run/test-none/scores.json"

step "baselines and comparison"
"$PYTHON" "$here/evaluate/baselines.py" --data "$data" --cache "$data/cache" --size tiny --out "$run/baselines"
"$PYTHON" "$here/evaluate/compare.py" --data "$data" --model "$run/test-none" --baselines "$run/baselines" --out "$run" --control \
  "blank volume=$run/test-blank" "other patient=$run/test-swap" "other patient's image tokens=$run/test-swap-visual" \
  "no place in the prompt=$run/test-none-hidden" "no place in the prompt, other patient's image tokens=$run/test-swap-visual-hidden"

if [ -d "${DATA_ROOT:-/nowhere}/ct" ]; then
  step "real data"
  "$PYTHON" "$here/evaluate/real_data.py" --data-root "$DATA_ROOT" "${model[@]}" --out "$run" ${SMOKE:+--smoke}
fi
step "done"
