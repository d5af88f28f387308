#!/usr/bin/env bash
# Set up the environment if needed, then train and test the projects on built-in data, or on real data with DATA_ROOT:
#   bash run_all.sh [--smoke] [--jobs N] [project ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common/env.sh"
exec "$PYTHON" -m studies.run_all "$@"
