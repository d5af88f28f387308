#!/usr/bin/env bash
# Set up the environment if needed, then train and test the projects on built-in data, or with --real pretrained
# models on the real data of DATA_ROOT:
#   bash run_all.sh [--smoke] [--real] [--jobs N] [project ...]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started with sh, which may be dash
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common/env.sh"
case " $* " in *" --real "*)
  list=$ROOT/requirements-real.txt
  if [ -d "${DATA_ROOT:-}" ] && ! "$PYTHON" "$ROOT/common/env_check.py" -r "$list" 2>/dev/null; then
    packages=$(sed 's/ *#.*//' "$list" | grep . | tr '\n' ' ')
    [ "$PYTHON" = "$ROOT/.venv/bin/python" ] && "$PYTHON" -m pip install --disable-pip-version-check --no-deps -r "$list" >>"$ROOT/.venv.log" 2>&1 ||
      env_fail "--real needs the packages ${packages}in the environment of $PYTHON; bring them and install them there with: pip install --no-deps -r $list"
  fi ;;
esac
exec "$PYTHON" -m studies.run_all "$@"
