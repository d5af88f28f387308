#!/usr/bin/env bash
# Train under Slurm on one node or several, and go on by itself after the time limit or a preemption:
#
#   sbatch common/slurm.sh em_mllm/train.py --task-dir ... --out runs/em_mllm/base          (from the repository)
#   sbatch --nodes=4 --gpus-per-node=8 --export=ALL,ACCELERATE_CONFIG=fsdp2 common/slurm.sh dia_pangu/train.py ...
#
# Ten minutes before the limit Slurm sends USR1; the run saves itself, the job is requeued, and --resume auto goes on.
# A checkpoint that takes longer than that needs --signal=B:USR1@1800 or more. --out must lie on a shared disk.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

# Slurm runs a copy of this file, so the repository is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
[ -f common/env.sh ] || { echo "error: call sbatch from the repository" >&2; exit 2; }
source common/env.sh
NNODES=${SLURM_NNODES:-1} MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export NNODES MASTER_ADDR MASTER_PORT
# srun of Slurm 22.05 and later gives one core where it is not told again.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# One launcher per node. srun hands signals on to it, and it to all processes of the node.
srun --ntasks-per-node=1 --kill-on-bad-exit=0 bash -c 'NODE_RANK=$SLURM_NODEID exec "$PYTHON" -m common.launch "$@"' \
  launch "$@" --resume auto &
run=$! asked=
trap 'asked=1; kill -USR1 "$run"' USR1
trap 'kill -TERM "$run"' TERM
while true; do
  wait "$run"
  status=$?
  if [ $status -le 128 ] || ! kill -0 "$run" 2>/dev/null; then break; fi     # else a signal has ended `wait` alone
done
if [ -n "$asked" ] && [ "$status" = $((128 + $(kill -l USR1))) ]; then
  echo "saved; requeueing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
