#!/usr/bin/env bash
# What run_all.sh calls: the built-in data with every control; with DATA_ROOT the study on real ECG too (study.py).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
OUT=$RUNS/cwt_mae
study() { "$PYTHON" "$ROOT/cwt_mae/study.py" "$@" ${SMOKE:+--smoke}; }

OMP_NUM_THREADS=1 study builtin --out "$OUT/builtin" --pretrain-steps 1500 --finetune-steps 300   # small models gain more from one core

M=${DATA_ROOT:-/nowhere}/ecg/mitbih
if [ -d "$M" ]; then
  if [ -n "${SMOKE:-}" ]; then seeds=0; else seeds="0 1 2"; fi
  if [ "${OMP_NUM_THREADS:-1}" -ge 3 ]; then              # small models gain more from one core each
    jobs=()
    for seed in $seeds; do OMP_NUM_THREADS=1 study beat --data "$M" --out "$OUT/mitbih" --seed "$seed" & jobs+=($!); done
    for job in "${jobs[@]}"; do wait "$job"; done
  else
    for seed in $seeds; do study beat --data "$M" --out "$OUT/mitbih" --seed "$seed"; done
  fi
  study score --data "$M" --out "$OUT/mitbih" --seeds $seeds
fi
for file in "${DATA_ROOT:-/nowhere}"/ecg/*.npz; do          # UCR sets
  [ -f "$file" ] || continue
  study series --data "$file" --out "$OUT/$(basename "$file" .npz)" --seeds 0 1 2 3 4 --pretrain-steps 300 --finetune-steps 200
done
