#!/usr/bin/env bash
# What run_all.sh calls: built-in data, pre-training, probe, fine-tuning, controls, scores; with DATA_ROOT the study on real ECG.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
source "$ROOT/cwt_mae/small.sh"
export NPROC_PER_NODE=1
P=$ROOT/cwt_mae OUT=$RUNS/cwt_mae
steps() { if [ -n "${SMOKE:-}" ]; then echo "$1"; else echo "$2"; fi; }       # steps <with SMOKE> <without>
py() { "$PYTHON" "$P/$1" "${@:2}"; }

D=$ROOT/data/cwt_mae/builtin B=$OUT/builtin
py make_data.py --out "$D" --subjects "$(steps 9 30)" --seconds "$(steps 120 300)"
LABELLED=(--data "$D/labelled" --split "$D/labelled/split.json" --overwrite)
py train.py --data "$D" --split "$D/labelled/split.json" "${SMALL[@]}" "${BUILTIN[@]}" --max-steps "$(steps 30 1500)" --windows "$(steps 640 6400)" \
   --eval-every 500 --save-every 500 --probe rhythm --out "$B/base" --overwrite
py probe.py --model "$B/base/model.safetensors" --task rhythm "${LABELLED[@]}" --random-seeds "$(steps 1 3)" --out "$B/probe"
TUNE=("${LABELLED[@]}" --pretrained "$B/base/model.safetensors" --task rhythm --lr 1e-3 --layer-decay 0.75 --sampling-power 0.5 --augment 1
      --max-steps "$(steps 10 300)" --eval-every 100 --folds "$(steps 3 4)")
py finetune.py "${TUNE[@]}" --out "$B/tuned"
py finetune.py "${TUNE[@]}" --random-init --out "$B/random"
for name in tuned random; do py test.py --model "$B/$name/model.safetensors" "${LABELLED[@]}" --out "$B/$name-test"; done
for kind in forest cnn; do
  py baselines.py --kind $kind --task rhythm "${LABELLED[@]}" --model-fs 50 --signal-len 500 --max-steps "$(steps 10 300)" --out "$B/$kind"
done
py visualize.py --model "$B/base/model.safetensors" --data "$D/labelled/s002.npz" --out "$B/figures/s002.png"
py study.py builtin --out "$B"

if [ -d "${DATA_ROOT:-/nowhere}/ecg/mitbih" ]; then
  M=$DATA_ROOT/ecg/mitbih seeds=$(steps "0" "0 1 2")
  study() { py study.py "$@" --pretrain-steps "$(steps 30 1500)" --finetune-steps "$(steps 20 800)"; }
  if [ "${OMP_NUM_THREADS:-1}" -ge 3 ]; then              # small models gain more from one core each
    waiting=()
    for seed in $seeds; do OMP_NUM_THREADS=1 study beat --data "$M" --out "$OUT/mitbih" --seed "$seed" & waiting+=($!); done
    for job in "${waiting[@]}"; do wait "$job"; done
  else
    for seed in $seeds; do study beat --data "$M" --out "$OUT/mitbih" --seed "$seed"; done
  fi
  study score --data "$M" --out "$OUT/mitbih" --seeds $seeds
fi
for file in "${DATA_ROOT:-/nowhere}"/ecg/*.npz; do            # UCR sets
  [ -f "$file" ] || continue
  py study.py series --data "$file" --out "$OUT/$(basename "$file" .npz)" --seeds $(steps "0" "0 1 2 3 4") \
     --pretrain-steps "$(steps 20 300)" --finetune-steps "$(steps 20 200)"
done
