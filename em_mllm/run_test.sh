#!/usr/bin/env bash
# Test a trained model.  MODEL (default: what run_train.sh wrote)  TASK_DIR (or DATA)  OUT; arguments go to test.py, such as --iq file --question "..."
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
HERE=$ROOT/em_mllm
show_help "$HERE/test.py" "$@"
MODEL=${MODEL:-$RUNS/em_mllm/base/model}
case " $* " in
  *" --iq "* | *" --validate "*) ;;
  *" --task-files "*) set -- --out "${OUT:-$(dirname "$MODEL")/test}" "$@" ;;
  *) set -- --task-dir "${TASK_DIR:-${DATA:-$ROOT/data/em_mllm/small/test}}" --out "${OUT:-$(dirname "$MODEL")/test}" "$@" ;;
esac
launch "$HERE/test.py" --model "$MODEL" "$@"
