#!/usr/bin/env bash
# The built-in run: scenes -> tiny base (pre-trained, then frozen) -> heads -> scores with controls.
#   SEEDS=0 bash flmm/run_builtin.sh        one seed instead of three
#   BASE=qwen bash flmm/run_builtin.sh      the Qwen2.5-VL class instead of the LLaVA class
#   SMOKE=1   a minute, numbers meaningless;   DATA_ROOT=...   also photographs (folder grounding/)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
BASE=${BASE:-llava}
P=$ROOT/flmm DATA=$ROOT/data/flmm OUT=$RUNS/flmm
CONFIG="$P/configs/tiny/scenes.yaml" SAM="sam.path=$OUT/sam/sam_tiny.safetensors"
SEEDS=${SEEDS:-0 1 2} SCENES="--train 500 --val 60 --test 200 --overlap 100"
BASE_STEPS=800 SAM_STEPS=200 COARSE=320 HEAD_STEPS=380
if [ -n "${SMOKE:-}" ]; then SEEDS=0 SCENES="--train 24 --val 6 --test 8 --overlap 4" BASE_STEPS=12 SAM_STEPS=6 COARSE=2 HEAD_STEPS=4; fi
export NPROC_PER_NODE=1   # the tiny models gain nothing from more

launch "$P/make_data.py" --out "$DATA" $SCENES
launch "$P/pretrain_sam.py" --out "$OUT/sam" --steps $SAM_STEPS --overwrite
for seed in $SEEDS; do
  launch "$P/pretrain_base.py" --base "$BASE" --out "$OUT/base-$BASE-$seed" --steps $BASE_STEPS --seed "$seed" --overwrite
  for control in "" "-random"; do   # the same head, data and steps on the pre-trained and on a random base
    random=(); if [ -n "$control" ]; then random=(--random-base "$((seed + 100))"); fi
    rm -rf "$OUT/cache"
    launch "$P/train.py" --config "$CONFIG" --set base.family="$BASE" "$SAM" optim.coarse_first=$COARSE \
      --base-path "$OUT/base-$BASE-$seed/base" "${random[@]}" --data "$DATA" --cache-attention "$OUT/cache" --out "$OUT/head-$BASE-$seed$control" --seed "$seed" \
      --batch-size 8 --max-steps $HEAD_STEPS --overwrite
    launch "$P/test.py" --config "$CONFIG" --set base.family="$BASE" "$SAM" --base-path "$OUT/base-$BASE-$seed/base" "${random[@]}" \
      --data "$DATA" --head "$OUT/head-$BASE-$seed$control/head.safetensors" --controls --batch-size 8 \
      --out "$OUT/test-$BASE-$seed$control" --overwrite
  done
done
rm -rf "$OUT/cache"
first=(--set base.family="$BASE" base.path="$OUT/base-$BASE-0/base" "$SAM")
launch "$P/test.py" --config "$CONFIG" "${first[@]}" --data "$DATA" --head "$OUT/head-$BASE-0/head.safetensors" --controls \
  --split overlap --batch-size 8 --out "$OUT/test-$BASE-overlap" --overwrite
launch "$P/scripts/check_base_untouched.py" --config "$CONFIG" "${first[@]}" --data "$DATA" \
  --head "$OUT/head-$BASE-0/head.safetensors" --out "$OUT/untouched-$BASE.json"
launch "$P/scripts/train_keyword_selector.py" --config "$CONFIG" "${first[@]}" --data "$DATA" --out "$OUT/selector.safetensors"
launch "$P/report.py" --runs "$RUNS" --base "$BASE" --seeds $SEEDS

if [ -d "${DATA_ROOT:-/nowhere}/grounding" ]; then
  PHOTOS=$DATA_ROOT/grounding EIGHT='[{type: phrases, folder: train_instances, limit: 8, captions: 1}]'
  CONFIG="$P/configs/tiny/photos.yaml" STEPS=150 FIT_STEPS=250
  limit=()
  if [ -n "${SMOKE:-}" ]; then STEPS=3 FIT_STEPS=3 limit=(--limit 6); fi
  first=(--set base.family="$BASE" base.path="$OUT/base-$BASE-0/base" "$SAM")
  launch "$P/train.py" --config "$CONFIG" "${first[@]}" --data "$PHOTOS" --out "$OUT/head-photos" --max-steps $STEPS --overwrite
  launch "$P/test.py" --config "$CONFIG" "${first[@]}" --data "$PHOTOS" --head "$OUT/head-photos/head.safetensors" --controls "${limit[@]}" \
    --out "$OUT/test-photos" --overwrite
  launch "$P/train.py" --config "$CONFIG" "${first[@]}" unet.upsample_input=64 "data.train=$EIGHT" --data "$PHOTOS" --out "$OUT/head-photos-overfit" \
    --max-steps $FIT_STEPS --cache-attention "$OUT/cache" --targets original --overwrite
  rm -rf "$OUT/cache"
  launch "$P/test.py" --config "$CONFIG" "${first[@]}" unet.upsample_input=64 "data.train=$EIGHT" "data.test=$EIGHT" --data "$PHOTOS" \
    --head "$OUT/head-photos-overfit/head.safetensors" --controls --out "$OUT/test-photos-overfit" --overwrite
  launch "$P/report.py" --runs "$RUNS" --photos
fi
