#!/usr/bin/env bash
# The built-in run: scenes -> tiny base (pre-trained, then frozen) -> heads -> scores with controls.
# Seeds 0 1 2 side by side where three cores or more are to be had, one core each; seed 0 alone where the machine is shared
# (OMP_NUM_THREADS below 3, as run_all.sh sets it). About 8 minutes of processor time a seed.
#   SEEDS="0 1 2" bash flmm/run_builtin.sh  these seeds, however many cores there are
#   BASE=qwen bash flmm/run_builtin.sh      the Qwen2.5-VL class instead of the LLaVA class
#   SMOKE=1   a minute, numbers meaningless;   DATA_ROOT=...   also photographs (folder grounding/)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
BASE=${BASE:-llava}
P=$ROOT/flmm DATA=$ROOT/data/flmm OUT=$RUNS/flmm
CONFIG="$P/configs/tiny/scenes.yaml" SAM="sam.path=$OUT/sam/sam_tiny.safetensors"
if [ "$CORES" -ge 3 ]; then SEEDS=${SEEDS:-0 1 2}; else SEEDS=${SEEDS:-0}; fi
# scenes of generator seed 1: those of seed 0 were looked at while the recipe was made
SCENES="--seed 1 --train 500 --val 60 --test 200 --overlap 100" BASE_STEPS=1200 SAM_STEPS=300 COARSE=480 HEAD_STEPS=640
if [ "$BASE" = qwen ]; then BASE_STEPS=400; fi   # twice the time a step
if [ -n "${SMOKE:-}" ]; then SEEDS=0 DATA=$DATA-smoke SCENES="--train 24 --val 6 --test 8 --overlap 4" BASE_STEPS=12 SAM_STEPS=6 COARSE=2 HEAD_STEPS=4; fi
export NPROC_PER_NODE=1 OMP_NUM_THREADS=1   # the tiny models gain nothing from more

one_seed() {
  local seed=$1 base=$OUT/base-$BASE-$1/base control
  launch "$P/pretrain_base.py" --base "$BASE" --out "$OUT/base-$BASE-$seed" --steps $BASE_STEPS --seed "$seed" --overwrite
  launch "$P/scripts/score_words.py" --config "$CONFIG" --set base.family="$BASE" base.path="$base" --data "$DATA" --out "$OUT/words-$BASE-$seed.json"
  for control in "" "-random"; do   # the same head, data and steps on the pre-trained and on a random base
    local random=(); if [ -n "$control" ]; then random=(--random-base "$((seed + 100))"); fi
    local cache=$OUT/cache-$BASE-$seed$control; rm -rf "$cache"
    launch "$P/train.py" --config "$CONFIG" --set base.family="$BASE" "$SAM" optim.coarse_first=$COARSE --base-path "$base" ${random[@]+"${random[@]}"} \
      --data "$DATA" --cache-attention "$cache" --out "$OUT/head-$BASE-$seed$control" --seed "$seed" --batch-size 8 --max-steps $HEAD_STEPS --overwrite
    rm -rf "$cache"
    launch "$P/test.py" --config "$CONFIG" --set base.family="$BASE" "$SAM" --base-path "$base" ${random[@]+"${random[@]}"} \
      --data "$DATA" --head "$OUT/head-$BASE-$seed$control/head.safetensors" --controls --batch-size 8 \
      --out "$OUT/test-$BASE-$seed$control" --overwrite
  done
  launch "$P/test.py" --config "$CONFIG" --set base.family="$BASE" "$SAM" --base-path "$base" --data "$DATA" --split overlap --controls \
    --head "$OUT/head-$BASE-$seed/head.safetensors" --batch-size 8 --out "$OUT/test-$BASE-$seed-overlap" --overwrite
}

launch "$P/make_data.py" --out "$DATA" $SCENES
launch "$P/pretrain_sam.py" --out "$OUT/sam" --steps $SAM_STEPS --overwrite
if [ "$CORES" -ge 3 ]; then
  jobs=() failed=
  for seed in $SEEDS; do one_seed "$seed" & jobs+=($!); done
  for job in "${jobs[@]}"; do wait "$job" || failed=1; done
  [ -z "$failed" ]
else
  for seed in $SEEDS; do one_seed "$seed"; done
fi
seed=${SEEDS%% *}   # the first one serves for what needs no repetition
first=(--set base.family="$BASE" base.path="$OUT/base-$BASE-$seed/base" "$SAM") head=$OUT/head-$BASE-$seed/head.safetensors
launch "$P/scripts/check_base_untouched.py" --config "$CONFIG" "${first[@]}" --data "$DATA" --head "$head" --out "$OUT/untouched-$BASE.json"
launch "$P/scripts/train_keyword_selector.py" --config "$CONFIG" "${first[@]}" --data "$DATA" --out "$OUT/selector-$BASE.safetensors"
launch "$P/report.py" --runs "$RUNS" --base "$BASE" --seeds $SEEDS

if [ -d "${DATA_ROOT:-/nowhere}/grounding" ]; then
  PHOTOS=$DATA_ROOT/grounding CONFIG="$P/configs/tiny/photos.yaml" STEPS=150 FIT_STEPS=250 train="" held="" eight="" limit=()
  for file in "$PHOTOS"/*/annotations.json; do   # folders named train* are learned from, the others scored
    name=$(basename "$(dirname "$file")")
    case $name in train*) train+="{type: phrases, folder: $name}, " ;; *) held+="{type: phrases, folder: $name}, " ;; esac
    eight=${eight:-"[{type: phrases, folder: $name, limit: 8, captions: 1}]"}
  done
  if [ -n "${SMOKE:-}" ]; then STEPS=3 FIT_STEPS=3 limit=(--limit 6); fi
  if [ -n "$train" ]; then
    launch "$P/train.py" --config "$CONFIG" "${first[@]}" "data.train=[$train]" --data "$PHOTOS" --out "$OUT/head-photos" --max-steps $STEPS --overwrite
  elif [ ! -f "$OUT/head-photos/head.safetensors" ]; then
    env_fail "$PHOTOS: no folder train* to learn from, and no head of an earlier run in $OUT/head-photos; train on photographs first"
  fi
  launch "$P/test.py" --config "$CONFIG" "${first[@]}" "data.train=[${train:-$held}]" "data.test=[${held:-$train}]" --data "$PHOTOS" \
    --head "$OUT/head-photos/head.safetensors" --controls ${limit[@]+"${limit[@]}"} --out "$OUT/test-photos" --overwrite
  first+=(unet.upsample_input=64 "data.train=$eight" "data.test=$eight")
  launch "$P/train.py" --config "$CONFIG" "${first[@]}" --data "$PHOTOS" --out "$OUT/head-photos-overfit" \
    --max-steps $FIT_STEPS --cache-attention "$OUT/cache" --targets original --overwrite
  rm -rf "$OUT/cache"
  launch "$P/test.py" --config "$CONFIG" "${first[@]}" --data "$PHOTOS" --head "$OUT/head-photos-overfit/head.safetensors" --controls \
    --out "$OUT/test-photos-overfit" --overwrite
  launch "$P/report.py" --runs "$RUNS" --photos
fi
