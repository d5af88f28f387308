#!/usr/bin/env bash
# Built-in study: data, pre-training without labels, class labels, tiny LLM, joint training, controls, tests; 8 to 11 minutes on one core a
# seed (SMOKE=1: about one). Three seeds side by side where it has three cores or more to itself, seed 0 where run_all.sh shares the machine;
# SEEDS="3 4" bash em_mllm/run_builtin.sh runs others. With DATA_ROOT: the study on the real rtl_433 captures of its folder rf/ instead.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
export NPROC_PER_NODE=1                                # the recipes' batches are those of one process
HERE=$ROOT/em_mllm BASE=$ROOT/data/em_mllm RUN=$RUNS/em_mllm
if [ -n "${SMOKE:-}" ]; then
  BASE=$BASE/smoke SIZE="--train 40 --val 5 --test 5" MAE=8 LABELS=8 WARM=20 ALIGN=6 JOINT=6 CNN=10 SHOTS="1 5" STUDY=4 COPIES=2 REAL_MAE=4
else
  SIZE="" MAE=400 LABELS=800 WARM=800 ALIGN=100 JOINT=250 CNN=300 SHOTS="1 5 10 50 100" STUDY=450 COPIES=20 REAL_MAE=200
fi
encoder=(--preset tiny --optimizer muon --lr 2e-3 --mask-ratio 0.5 --spectrum-weight 0.5 --batch-size 32 --log-every 100 --overwrite)
joint=(--signal-tokens 8 --optimizer muon --weight-decay 0.05 --warmup 0.03 --schedule cosine --batch-size 32 --questions-per-signal 2
       --log-every 50 --overwrite)
step() { echo; echo "== $* (${SECONDS} s)"; }
# join OUT SEED ENCODER LLM arguments...: first the projector alone learns to speak to the LLM, then encoder, projector and LLM learn together
join() {
  local out=$1 seed=$2 arguments=("${joint[@]}" --seed "$2" --signal-encoder-path "$3" --llm-model-path "$4" "${@:5}")
  launch "$HERE/train.py" "${arguments[@]}" --freeze-llm --freeze-signal-encoder --lr 3e-3 --max-steps $ALIGN --output-dir "${out}_align"
  launch "$HERE/train.py" "${arguments[@]}" --trained-dir "${out}_align/model" --lr 5e-4 --max-steps $JOINT --output-dir "$out"
}

# builtin SEED: everything on the built-in data of one seed
builtin() {
  local seed=$1 base=$BASE/seed-$1 run=$RUN/seed-$1
  local data=$base/data questions=(--task-dir "$base/data/train" --val-dir "$base/data/val")
  step "seed $seed: data"
  "$PYTHON" "$HERE/make_data.py" --out "$data" --seed $((100 + seed)) --overwrite $SIZE
  local labels=(--train "$data"/train/*.h5 --test "$data"/val/*.h5 --signal-encoder-path "$run/pretrain/encoder" --optimizer muon --lr 2e-3
                --steps $LABELS --log-every 100 --seed "$seed" --overwrite)
  step "seed $seed: pre-training of the encoder, without labels"
  launch "$HERE/pretrain.py" --data "$data/train" --val "$data/val" --out "$run/pretrain" --max-steps $MAE --seed "$seed" "${encoder[@]}"
  step "seed $seed: the encoder learns the classes; measured on validation data"
  launch "$HERE/finetune.py" "${labels[@]}" --out "$run/finetune"
  step "seed $seed: joint training"
  join "$run/joint" "$seed" "$run/finetune/model" "$BASE/llm" "${questions[@]}"
  step "seed $seed: test, with the wrong-signal control"
  launch "$HERE/test.py" --model "$run/joint/model" --task-dir "$data/test" --calibrate-dir "$data/val" --wrong-signal --out "$run/joint/test"
  step "seed $seed: control, the same without pre-training"
  launch "$HERE/finetune.py" "${labels[@]}" --random-encoder --out "$run/finetune_random"
  join "$run/joint_random" "$seed" "$run/finetune_random/model" "$BASE/llm" "${questions[@]}"
  launch "$HERE/test.py" --model "$run/joint_random/model" --task-dir "$data/test" --out "$run/joint_random/test"
  step "seed $seed: control, a CNN on the same IQ"
  launch "$HERE/baseline.py" --train "$data/train" --test "$data/test" --steps $CNN --seed "$seed" --out "$run/cnn" --overwrite
  step "seed $seed: few labels, with and without pre-training"
  launch "$HERE/fewshot.py" --train "$data/train/modulation.h5" --test "$data/test/modulation.h5" --signal-encoder-path "$run/pretrain/encoder" \
    --shots $SHOTS --draws 2 --methods probe --seed "$seed" --out "$run/fewshot" --overwrite
}

# The real captures of DATA_ROOT/rf: rtl433_train.npz to learn from, rtl433_test.npz or one of another name to be asked about.
RF=${DATA_ROOT:-/nowhere}/rf REAL=$BASE/rtl433
files() { pairs=(); for task in device coding keying; do pairs+=("$1/device.h5" "$1/$task.json"); done; }

# real_train: device classifiers once for each of SEEDS, the rest once
real_train() {
  local seeds=(${SEEDS:-0})
  step "views of the captures"
  "$PYTHON" "$HERE/convert.py" rtl433 "$RF/rtl433_train.npz" "$1" --out "$REAL" --copies $COPIES
  step "pre-training of the encoder on the training captures, without labels"
  launch "$HERE/pretrain.py" --data "$REAL/train" --val "$REAL/val" --out "$RUN/rtl433_pretrain" --config "$HERE/rtl433_config.json" \
    --max-steps $REAL_MAE "${encoder[@]}"
  step "devices in noise, few captures, unseen devices"
  launch "$HERE/rtl433.py" --captures "$RF/rtl433_train.npz" "$1" --data "$REAL" \
    --signal-encoder-path "$RUN/rtl433_pretrain/encoder" --steps $STUDY --seed "${seeds[0]}" --seeds ${#seeds[@]} \
    --out "$RUN/rtl433" --overwrite
  "$PYTHON" "$HERE/report.py" devices --runs "$RUN" --seeds "${seeds[@]}" ${SMOKE:+--smoke}
  step "a tiny language model that knows the device names, on text alone"
  "$PYTHON" "$HERE/make_llm.py" --out "$BASE/llm_rtl433" --tasks "$REAL/tasks.json" --steps $WARM --overwrite
  step "joint training on questions about device, coding and keying"
  files "$REAL/train"
  join "$RUN/rtl433_joint" 0 "$RUN/rtl433/encoder" "$BASE/llm_rtl433" --task-files "${pairs[@]}" --roll
}

# real: where there are no training captures, the model of an earlier run answers about the others
real() {
  local test=$RF/rtl433_test.npz file condition
  for file in "$RF"/rtl433_*.npz; do
    if [ ! -f "$test" ] && [ "$file" != "$RF/rtl433_train.npz" ]; then test=$file; fi
  done
  rm -rf "$REAL"
  if [ -f "$RF/rtl433_train.npz" ]; then
    real_train "$test"
  elif [ -d "$RUN/rtl433_joint/model" ]; then
    "$PYTHON" "$HERE/convert.py" rtl433 "$test" --out "$REAL"
  else
    env_fail "$RF: no rtl433_train.npz, and no model of an earlier run in $RUN/rtl433_joint; train on captures first"
  fi
  step "questions about the captures"
  for condition in clean 10dB 0dB -10dB clean_shift; do
    files "$REAL/test/$condition"
    launch "$HERE/test.py" --model "$RUN/rtl433_joint/model" --task-files "${pairs[@]}" --wrong-signal --out "$RUN/rtl433_joint/test_$condition"
  done
  "$PYTHON" "$HERE/report.py" questions --runs "$RUN" ${SMOKE:+--smoke}
}

if [ -d "$RF" ]; then
  real
  exit
fi
if [ "$CORES" -ge 3 ] && [ -z "${SMOKE:-}" ]; then seeds=${SEEDS:-0 1 2}; else seeds=${SEEDS:-0}; fi
step "a tiny language model, on text alone, the same for every seed"
OMP_NUM_THREADS=1 "$PYTHON" "$HERE/make_llm.py" --out "$BASE/llm" --steps $WARM --overwrite
if [ "$CORES" -ge 3 ]; then              # small models gain more from one core each
  jobs=()
  for seed in $seeds; do (export OMP_NUM_THREADS=1; builtin "$seed") & jobs+=($!); done
  for job in "${jobs[@]}"; do wait "$job"; done
else
  for seed in $seeds; do builtin "$seed"; done
fi
"$PYTHON" "$HERE/report.py" builtin --runs "$RUN" --seeds $seeds ${SMOKE:+--smoke}
