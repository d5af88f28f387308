#!/usr/bin/env bash
# Heal one pruned model; arguments go to train.py, such as --distill 0.5 --teacher folder, --places file.
#   MODEL   merged checkpoint of prune_llm.py, with MAP (its prune map), LLM (folder of the language model) and DATA (a CTRG folder);
#           or its hf_<tag> folder, with TEXTS (a file of texts)
#   OUT     run folder (default: RUNS/pruning/healed)        NPROC_PER_NODE=8 for several GPUs
# Nothing at hand: `python studies/pruning/builtin.py` makes data and a model, prunes, heals and tests.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started with sh, which may be dash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
show_help "$ROOT/pruning/train.py" "$@"
[ -n "${MODEL:-}" ] || env_fail "MODEL is not set: give the checkpoint or folder that prune_llm.py wrote; for a first try with built-in data: python studies/pruning/builtin.py"
launch "$ROOT/pruning/train.py" --pruned-model-path "$MODEL" ${MAP:+--prune-map-path "$MAP"} ${LLM:+--lang-model-path "$LLM"} \
  ${DATA:+--data "$DATA"} ${TEXTS:+--texts "$TEXTS"} --out "${OUT:-$RUNS/pruning/healed}" "$@"
