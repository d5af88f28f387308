#!/usr/bin/env bash
# Test a trained model; arguments go to test.py, such as --iq file --question "...".
#   MODEL    model folder (default: what run_train.sh and studies/em_mllm/first.py write)
#   TASK_DIR (or DATA)    folder of questions (default: the built-in ones of first.py)
#   OUT    folder of the results (default: test/ beside the model)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started with sh, which may be dash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
show_help "$ROOT/em_mllm/test.py" "$@"
MODEL=${MODEL:-$RUNS/em_mllm/base/model}
OUT=${OUT:-$(dirname "$MODEL")/test}
case " ${*//_/-}" in   # flags may be written with underscores
  *" --validate"*) ;;   # questions and answer file alone
  *" --iq"*) set -- --model "$MODEL" "$@" ;;
  *" --task-files"*) set -- --model "$MODEL" --out "$OUT" "$@" ;;
  *) set -- --model "$MODEL" --task-dir "${TASK_DIR:-${DATA:-$ROOT/data/em_mllm/first/data/test}}" --out "$OUT" "$@" ;;
esac
launch "$ROOT/em_mllm/test.py" "$@"
