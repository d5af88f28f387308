#!/usr/bin/env bash
# Test one pruned model: reports, scores, perplexity, latency; arguments go to test.py, such as --limit 100.
#   MODEL   a checkpoint or a run folder of train.py (default: RUNS/pruning/healed), with MAP (its prune map), LLM (folder of the
#           language model) and DATA (a CTRG folder); or a language model's folder, with TEXTS (a file of texts)
#   OUT     folder of the results (default: RUNS/pruning/test)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started with sh, which may be dash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
show_help "$ROOT/pruning/test.py" "$@"
NPROC_PER_NODE=1 launch "$ROOT/pruning/test.py" --pruned-model-path "${MODEL:-$RUNS/pruning/healed}" ${MAP:+--prune-map-path "$MAP"} \
  ${LLM:+--lang-model-path "$LLM"} ${DATA:+--data "$DATA"} ${TEXTS:+--texts "$TEXTS"} --out-dir "${OUT:-$RUNS/pruning/test}" "$@"
