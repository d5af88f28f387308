#!/usr/bin/env bash
# Train one stage: bash dia_pangu/run_train.sh --stage pre|ft ...; DATA, OUT and LLM name the folders (of the data in
# the CTRG format, the run, and the language model). Without DATA it trains on built-in phantoms with small bases, which
# studies/dia_pangu/bases.py makes first (some minutes; SMOKE=1: the smallest sizes). Upstream's recipes:
#   --stage pre --epochs 50 --lr 5e-5        --stage ft --epochs 3 --lr 1e-5 --weight-decay 0.01 --lr-scheduler-type cosine
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started with sh, which may be dash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
if [ -n "${SMOKE:-}" ]; then export RUNS=$RUNS/smoke; fi   # small bases never lie where full ones are looked for
show_help "$ROOT/dia_pangu/src/train.py" "$@"
if [ -z "${DATA:-}" ]; then
  DATA=$ROOT/data/dia_pangu${SMOKE:+_smoke}
  echo "DATA is not set: training on the built-in phantoms in $DATA"
  if [ ! -f "$RUNS/dia_pangu/llm/metrics.json" ] || [ ! -f "$DATA/annotation_en.json" ]; then
    case " $* " in
      *" --resume auto "*) ;;
      *" --resume "*) env_fail "--resume: the small bases are not whole, so no training has begun; start the same command without --resume" ;;
    esac
    SKIP_DONE=1 "$PYTHON" "$ROOT/studies/dia_pangu/bases.py" || {
      status=$?
      echo "the small bases are not whole; the same command goes on with what is missing" >&2
      exit $status
    }
  fi
  LLM=${LLM:-$RUNS/dia_pangu/llm/model}
  set -- --size tiny --cache "$DATA/cache" --start "$RUNS/dia_pangu/contrast" --lr 1e-3 --batch-size 8 --accum 1 --epochs 1 "$@"
else
  # What a run of the real sizes needs; options that are given win. Without an --out of its own the weights go where
  # upstream's do, and stage pre starts from the Dia-LLaMA file that lies in checkpoint/, as upstream's does.
  OUT=${OUT:-$ROOT/dia_pangu/checkpoint_new}
  start=$(find "$ROOT/dia_pangu/checkpoint" -maxdepth 1 -name '*.bin' 2>/dev/null | head -n 1 || true)
  case " $* " in *" --start"* | *" --stage ft "* | *" --stage=ft "*) start= ;; esac
  set -- --precision bf16 --gradient-checkpointing --workers 4 --cache "$(dirname "$OUT")/cache" ${start:+--start "$start"} "$@"
fi
launch "$ROOT/dia_pangu/src/train.py" --data "$DATA" --lang-encoder-path "${LLM:?set LLM to the folder of the language model}" \
  --out "${OUT:-$RUNS/dia_pangu/base}" "$@"
