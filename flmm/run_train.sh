#!/usr/bin/env bash
# Train heads: DATA=<root of coco, png, refcoco...> CONFIG=<yaml> bash flmm/run_train.sh [options of train.py]
# Without DATA: the built-in scenes, a tiny base and a small head.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
show_help "$ROOT/flmm/train.py" "$@"
P=$ROOT/flmm OUT=${OUT:-$RUNS/flmm/train}
if [ -n "${DATA:-}" ]; then
  launch "$P/train.py" --config "${CONFIG:-$P/configs/deepseek_vl/frozen_deepseek_vl_1_3b_chat_unet_sam_l_refcoco_png.yaml}" \
    --data "$DATA" --out "$OUT" "$@"
  exit
fi
DATA=$ROOT/data/flmm BASE=$RUNS/flmm/base-train
echo "DATA is not set: making the built-in scenes and a tiny base, then training a small head"
[ -e "$DATA/png/built-in.json" ] || launch "$P/make_data.py" --out "$DATA"
[ -e "$BASE/base" ] || NPROC_PER_NODE=1 launch "$P/pretrain_base.py" --out "$BASE" --overwrite
launch "$P/train.py" --config "$P/configs/tiny/scenes.yaml" --base-path "$BASE/base" --data "$DATA" --out "$OUT" "$@"
