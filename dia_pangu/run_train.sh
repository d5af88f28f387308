#!/usr/bin/env bash
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"   # started with sh, which may be dash
exec bash "$(dirname "${BASH_SOURCE[0]}")/scripts/train.sh" "$@"
