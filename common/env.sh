# Sourced by every launcher: finds or makes the Python environment, shares out the machine, and defines `launch`.
# It never changes directory: relative paths that the user gives stay relative to where the user stands.
#
#   PYTHON             an interpreter to use as it is, whatever it holds (default: see below)
#   NPROC_PER_NODE     processes on this machine (default: number of visible GPUs, at least 1)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT    several machines, as torchrun takes them
#   ACCELERATE_CONFIG  fsdp2, zero2, zero3 (files in common/accelerate/) or the path of an accelerate yaml; default DDP
#   DATA_ROOT DATA OUT RUNS GOLDEN_DIR    data and output folders; made absolute here

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export ROOT PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
# Freed memory stays with the process (glibc): a large new tensor then costs no page faults.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-2147483648} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-8589934592} MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-268435456}
[ -t 2 ] || export HF_HUB_DISABLE_PROGRESS_BARS=1         # bars for people, not for log files
for name in DATA_ROOT DATA OUT RUNS GOLDEN_DIR; do
  value=${!name:-}
  if [ -n "$value" ]; then
    case $value in /*) ;; *) value=$PWD/$value ;; esac
    export "$name=$value"
  fi
done
RUNS=${RUNS:-$ROOT/runs}
export RUNS
CORES=${OMP_NUM_THREADS:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}     # what run_all.sh gave this project, else the machine's

env_fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

# 1. the interpreter that the caller named, 2. an active environment whose packages are in the supported range,
# 3. the repository's own .venv, made and filled from the pinned list when it is missing or the list has changed.
env_setup() {
  local list extra=() stamp base candidate log
  for list in "$ROOT/requirements.txt" ${ENV_EXTRA:+"$ROOT/$ENV_EXTRA"}; do extra+=(-r "$list"); done
  if [ -n "${PYTHON:-}" ]; then
    case $PYTHON in /*) ;; */*) PYTHON=$PWD/$PYTHON ;; esac
    command -v "$PYTHON" >/dev/null || env_fail "PYTHON=$PYTHON: no such interpreter"
    return
  fi
  for candidate in python python3; do
    if command -v "$candidate" >/dev/null && "$candidate" "$ROOT/common/env_check.py" "${extra[@]}" 2>/dev/null; then
      PYTHON=$(command -v "$candidate"); return
    fi
  done
  PYTHON=$ROOT/.venv/bin/python
  stamp=$(cat "$ROOT/requirements.txt" ${ENV_EXTRA:+"$ROOT/$ENV_EXTRA"} | cksum | tr -d ' ')
  case " $(cat "$ROOT/.venv/.stamp" 2>/dev/null) " in *" $stamp "*) return ;; esac
  base=
  for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then base=$candidate; break; fi
  done
  [ -n "$base" ] || env_fail "no Python 3.10 to 3.13 with venv was found; install one (Debian and Ubuntu: apt install python3 python3-venv) or set PYTHON=/path/to/python"
  log=$ROOT/.venv.log
  exec 9>"$ROOT/.venv.lock"                               # two launchers started together: the second waits
  if command -v flock >/dev/null; then flock 9; fi
  case " $(cat "$ROOT/.venv/.stamp" 2>/dev/null) " in *" $stamp "*) exec 9>&-; return ;; esac
  printf 'setting up %s (once, a few minutes; log: %s) ...\n' "$ROOT/.venv" "$log" >&2
  "$base" -m venv "$ROOT/.venv" >"$log" 2>&1 || env_fail "could not make $ROOT/.venv: $(tail -n 1 "$log")"
  if ! "$PYTHON" -m pip install --disable-pip-version-check "${extra[@]}" >>"$log" 2>&1; then
    env_fail "pip could not install the packages: $(grep -iE '^(error|.*no space left)' "$log" | tail -n 1); see $log. Check the network and the disk, then run this again; without a network, activate an environment that holds the packages of requirements.txt"
  fi
  # A list with the test tools holds the plain list too.
  printf '%s %s\n' "$stamp" "$(cksum <"$ROOT/requirements.txt" | tr -d ' ')" >"$ROOT/.venv/.stamp"
  exec 9>&-
}
env_setup
export PYTHON
unset ENV_EXTRA

if [ -z "${NPROC_PER_NODE:-}" ]; then
  # nvidia-smi shows every GPU of the machine, also those that CUDA_VISIBLE_DEVICES leaves to others
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then gpus=${CUDA_VISIBLE_DEVICES//,/$'\n'}
  elif command -v nvidia-smi >/dev/null; then gpus=$(nvidia-smi --list-gpus 2>/dev/null || true)
  else gpus=; fi
  NPROC_PER_NODE=$(printf '%s\n' "$gpus" | grep -cE '^ *(GPU|MIG-|[0-9])' || true)
  [ "$NPROC_PER_NODE" -ge 1 ] || NPROC_PER_NODE=1
fi
export NPROC_PER_NODE NNODES="${NNODES:-1}" NODE_RANK="${NODE_RANK:-0}" MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}" MASTER_PORT="${MASTER_PORT:-29500}"

# launch script.py args...: one plain process, or torchrun's processes, or those of an accelerate yaml.
launch() { "$PYTHON" -m common.launch "$@"; }

# show_help script.py args...: if the arguments ask for help, show that script's and leave; a launcher calls this before it makes anything.
show_help() { case " ${*:2} " in *" -h "* | *" --help "*) exec "$PYTHON" "$1" --help ;; esac; }
