#!/usr/bin/env bash
# Train heads: DATA=<root of coco, png, refcoco...> CONFIG=<yaml> bash flmm/run_train.sh [options of train.py]
# Without DATA: a first try on built-in scenes, with a tiny base of random weights and coarse masks only. What the
# method is worth there, with a base that has learned to caption, says bash run_all.sh flmm.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started with sh, which may be dash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
show_help "$ROOT/flmm/train.py" "$@"
P=$ROOT/flmm OUT=${OUT:-$RUNS/flmm/train}
if [ -z "${DATA:-}" ]; then
  DATA=$ROOT/data/flmm-first-try CONFIG=$P/configs/tiny/scenes.yaml
  [ -e "$DATA/base" ] || NPROC_PER_NODE=1 launch "$P/make_data.py" --out "$DATA" --base llava
  set -- --base-path "$DATA/base" "$@"
fi
launch "$P/train.py" --config "${CONFIG:-$P/configs/deepseek_vl/frozen_deepseek_vl_1_3b_chat_unet_sam_l_refcoco_png.yaml}" \
  --data "$DATA" --out "$OUT" "$@"
