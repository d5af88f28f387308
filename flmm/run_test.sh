#!/usr/bin/env bash
# Score a head: DATA=<root> CONFIG=<yaml> HEAD=<file> SPLIT=refcoco_val bash flmm/run_test.sh [options of test.py]
# Without DATA: the head of run_train.sh on the held-out built-in scenes, with controls.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started with sh, which may be dash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
show_help "$ROOT/flmm/test.py" "$@"
P=$ROOT/flmm OUT=${OUT:-$RUNS/flmm/test} HEAD=${HEAD:-$RUNS/flmm/train/head.safetensors}
[ -e "$HEAD" ] || env_fail "$HEAD: no trained head; let bash flmm/run_train.sh end first (--resume goes on), or set HEAD to the file of one"
if [ -z "${DATA:-}" ]; then
  DATA=$ROOT/data/flmm-first-try CONFIG=$P/configs/tiny/scenes.yaml SPLIT=test
  set -- --base-path "$DATA/base" --controls "$@"
fi
launch "$P/test.py" --config "${CONFIG:-$P/configs/deepseek_vl/frozen_deepseek_vl_1_3b_chat_unet_sam_l_refcoco_png.yaml}" \
  --data "$DATA" --head "$HEAD" --split "${SPLIT:-refcoco_val}" --out "$OUT" "$@"
