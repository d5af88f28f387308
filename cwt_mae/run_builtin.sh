#!/usr/bin/env bash
# What run_all.sh calls: the built-in data with every control; with DATA_ROOT the study on real ECG too (study.py).
# MIT-BIH takes SEEDS (default "0 1 2") where this project has 3 cores or more to itself (OMP_NUM_THREADS), and seed 0 where it
# shares the machine. Small models gain more from one core each: with 3 cores the parts run side by side.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
OUT=$RUNS/cwt_mae
cores=${OMP_NUM_THREADS:-$(nproc)}
export OMP_NUM_THREADS=1
study() { "$PYTHON" "$ROOT/cwt_mae/study.py" "$@" ${SMOKE:+--smoke}; }

M=${DATA_ROOT:-/nowhere}/ecg/mitbih
if [ "$cores" -ge 3 ] && [ -z "${SMOKE:-}" ]; then seeds=${SEEDS:-0 1 2}; else seeds=0; fi
jobs=()
if [ -d "$M" ]; then
  for seed in $seeds; do
    study beat --data "$M" --out "$OUT/mitbih" --seed "$seed" & jobs+=($!)
    if [ "$cores" -lt 3 ]; then wait "${jobs[-1]}"; fi
  done
fi

study builtin --out "$OUT/builtin" --pretrain-steps 1500 --finetune-steps 300
for file in "${DATA_ROOT:-/nowhere}"/ecg/*.npz; do          # UCR sets
  [ -f "$file" ] || continue
  study series --data "$file" --out "$OUT/$(basename "$file" .npz)" --seeds 0 1 2 3 4 --pretrain-steps 300 --finetune-steps 200
done

for job in ${jobs[@]+"${jobs[@]}"}; do wait "$job"; done
if [ -d "$M" ]; then study score --data "$M" --out "$OUT/mitbih" --seeds $seeds; fi
