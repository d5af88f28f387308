#!/usr/bin/env bash
# Write and score the reports of the test split: CKPT (folder of train.py), LLM, DATA and OUT name the folders. Without
# them: what run_train.sh has made of the built-in phantoms (with SMOKE=1 the smallest, as there). With --volume or
# --volumes it is the reports of scans of your own, which nothing is there to score.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started with sh, which may be dash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
if [ -n "${SMOKE:-}" ]; then export RUNS=$RUNS/smoke; fi   # small bases never lie where full ones are looked for
show_help "$ROOT/dia_pangu/src/test.py" "$@"
OUT=${OUT:-$ROOT/dia_pangu/results}          # where upstream writes them
own= before=
for word in "$@"; do
  case $word in --volume*) own=1 ;; --out=*) OUT=${word#--out=} ;; esac
  if [ "$before" = --out ]; then OUT=$word; fi
  before=$word
done
if [ -z "$own" ]; then set -- --data "${DATA:-$ROOT/data/dia_pangu${SMOKE:+_smoke}}" "$@"; fi
if [ -z "${CKPT:-}" ] && [ -f "$ROOT/dia_pangu/checkpoint_new/pytorch_model.bin" ]; then CKPT=$ROOT/dia_pangu/checkpoint_new; fi
if [ -z "${CKPT:-}" ] && [ ! -e "$RUNS/dia_pangu/base" ]; then
  env_fail "$RUNS/dia_pangu/base: nothing has been trained there; start bash dia_pangu/run_train.sh first, or set CKPT to the folder of a run"
fi
"$PYTHON" "$ROOT/dia_pangu/src/test.py" --ckpt-path "${CKPT:-$RUNS/dia_pangu/base}" \
  --lang-encoder-path "${LLM:-$RUNS/dia_pangu/llm/model}" --out "$OUT" "$@"
if [ -z "$own" ]; then "$PYTHON" "$ROOT/dia_pangu/evaluate/nlg_eval.py" --csv "$OUT/dia-pangu.csv" --out "$OUT/scores.json"; fi
