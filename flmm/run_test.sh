#!/usr/bin/env bash
# Score a head: DATA=<root> CONFIG=<yaml> HEAD=<file> SPLIT=refcoco_val bash flmm/run_test.sh [options of test.py]
# Without DATA: the head of run_train.sh on the held-out built-in scenes, with controls.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
P=$ROOT/flmm OUT=${OUT:-$RUNS/flmm/test}
if [ -n "${DATA:-}" ]; then
  launch "$P/test.py" --config "${CONFIG:-$P/configs/deepseek_vl/frozen_deepseek_vl_1_3b_chat_unet_sam_l_refcoco_png.yaml}" \
    --data "$DATA" --head "${HEAD:-$RUNS/flmm/train/head.safetensors}" --split "${SPLIT:-refcoco_val}" --out "$OUT" "$@"
else
  launch "$P/test.py" --config "$P/configs/tiny/scenes.yaml" --base-path "$RUNS/flmm/base-train/base" --data "$ROOT/data/flmm" \
    --head "${HEAD:-$RUNS/flmm/train/head.safetensors}" --controls --out "$OUT" "$@"
fi
