#!/usr/bin/env bash
# What run_all.sh calls: the built-in data with every control; with DATA_ROOT the study on real ECG too (study.py).
# Small models gain more from one core each: with 3 cores or more to itself (OMP_NUM_THREADS, else all of the machine's) the seeds of
# MIT-BIH, SEEDS (default "0 1 2"), run side by side and the rest beside them; where this project shares the machine, seed 0 alone.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
OUT=$RUNS/cwt_mae
M=${DATA_ROOT:-/nowhere}/ecg/mitbih
export OMP_NUM_THREADS=1
study() { "$PYTHON" "$ROOT/cwt_mae/study.py" "$@" ${SMOKE:+--smoke}; }
aside() {                                                  # beside the rest where there are cores
  if [ "$CORES" -lt 3 ]; then study "$@"; return; fi
  "$PYTHON" "$ROOT/cwt_mae/study.py" "$@" ${SMOKE:+--smoke} & pids+=($!)
}
finish() { for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid"; done; pids=(); }
pids=()
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT            # when one part fails, the others stop too

if [ "$CORES" -ge 3 ] && [ -z "${SMOKE:-}" ]; then seeds=${SEEDS:-0 1 2}; else seeds=0; fi
if [ -d "$M" ]; then
  for seed in $seeds; do aside beat --data "$M" --out "$OUT/mitbih" --seed "$seed"; done
  study forest --data "$M" --out "$OUT/mitbih"
fi
study builtin --out "$OUT/builtin" --pretrain-steps 1500 --finetune-steps 300
finish
for file in "${DATA_ROOT:-/nowhere}"/ecg/*.npz; do          # UCR sets
  [ -f "$file" ] || continue
  aside series --data "$file" --out "$OUT/$(basename "$file" .npz)" --seeds 0 1 2 3 4 --pretrain-steps 300 --finetune-steps 200
done
if [ -d "$M" ]; then study score --data "$M" --out "$OUT/mitbih" --seeds $seeds; fi
finish
