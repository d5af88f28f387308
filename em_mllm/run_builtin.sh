#!/usr/bin/env bash
# Built-in study: data, pre-training, tiny LLM, joint training, its controls and the tests; about 9 minutes on one core (SMOKE=1: one minute).
# With DATA_ROOT: the study on the real rtl_433 captures of its folder rf/ instead. One seed: SEED=1 bash em_mllm/run_builtin.sh for others.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
HERE=$ROOT/em_mllm BASE=$ROOT/data/em_mllm RUN=$RUNS/em_mllm SEED=${SEED:-0}
if [ -n "${SMOKE:-}" ]; then
  BASE=$BASE/smoke SIZE="--train 40 --val 5 --test 5" MAE=8 WARM=20 ALIGN=8 JOINT=6 CNN=10 SHOTS="1 5" STUDY=4 COPIES=2
else
  SIZE="" MAE=300 WARM=800 ALIGN=800 JOINT=250 CNN=350 SHOTS="1 5 10 50 100" STUDY=400 COPIES=30
fi
encoder=(--preset tiny --optimizer muon --lr 2e-3 --norm-pix-loss --mask-ratio 0.5 --batch-size 32 --log-every 100)
joint=(--signal-tokens 8 --optimizer muon --weight-decay 0.05 --warmup 0.03 --schedule cosine --batch-size 32 --questions-per-signal 2
       --log-every 100)
# Joint training in two runs: first the encoder and projector learn to speak to the frozen LLM, then everything learns together.
# join NAME STEPS_FIRST STEPS_THEN arguments...
join() {
  local name=$1 first=$2 then=$3; shift 3
  launch "$HERE/train.py" "$@" "${joint[@]}" --seed "$SEED" --overwrite --freeze-llm --lr 2e-3 --max-steps "$first" --output-dir "$RUN/${name}_align"
  launch "$HERE/train.py" "$@" "${joint[@]}" --seed "$SEED" --overwrite --trained-dir "$RUN/${name}_align/model" --lr 5e-4 --max-steps "$then" --output-dir "$RUN/$name"
}
step() { echo; echo "== $* (${SECONDS} s)"; }

if [ ! -d "${DATA_ROOT:-/nowhere}/rf" ]; then
  step "data"
  "$PYTHON" "$HERE/make_data.py" --out "$BASE/data" --seed "$SEED" --overwrite $SIZE
  step "MAE pre-training of the encoder"
  launch "$HERE/pretrain.py" --data "$BASE/data/train" --val "$BASE/data/val" --out "$RUN/pretrain" --max-steps $MAE --seed "$SEED" --overwrite "${encoder[@]}"
  step "a tiny language model, on text alone"
  "$PYTHON" "$HERE/make_llm.py" --out "$BASE/llm" --steps $WARM --seed "$SEED" --overwrite
  common=(--task-dir "$BASE/data/train" --val-dir "$BASE/data/val" --signal-encoder-path "$RUN/pretrain/encoder" --llm-model-path "$BASE/llm")
  step "joint training"
  join joint $ALIGN $JOINT "${common[@]}"
  step "test, with the wrong-signal control"
  launch "$HERE/test.py" --model "$RUN/joint/model" --task-dir "$BASE/data/test" --calibrate-dir "$BASE/data/val" --wrong-signal --out "$RUN/joint/test"
  step "control: the same joint training from a random encoder"
  join joint_random $ALIGN $JOINT "${common[@]}" --random-encoder
  launch "$HERE/test.py" --model "$RUN/joint_random/model" --task-dir "$BASE/data/test" --out "$RUN/joint_random/test"
  step "control: a CNN on the same IQ"
  launch "$HERE/baseline.py" --train "$BASE/data/train" --test "$BASE/data/test" --steps $CNN --seed "$SEED" --out "$RUN/cnn" --overwrite
  step "few labels, with and without pre-training"
  launch "$HERE/fewshot.py" --train "$BASE/data/train/modulation.h5" --test "$BASE/data/test/modulation.h5" --signal-encoder-path "$RUN/pretrain/encoder" \
    --shots $SHOTS --draws 2 --methods probe --seed "$SEED" --out "$RUN/fewshot" --overwrite
  "$PYTHON" "$HERE/report.py" builtin --runs "$RUN" ${SMOKE:+--smoke}
else
  RF=$DATA_ROOT/rf
  step "views of the captures"
  rm -rf "$BASE/rtl433"
  "$PYTHON" "$HERE/convert.py" rtl433 "$RF/rtl433_train.npz" "$RF/rtl433_test.npz" --out "$BASE/rtl433" --copies $COPIES --seed "$SEED"
  step "MAE pre-training of the encoder on the training captures"
  launch "$HERE/pretrain.py" --data "$BASE/rtl433/train" --val "$BASE/rtl433/val" --out "$RUN/rtl433_pretrain" --config "$HERE/rtl433_config.json" \
    --max-steps $MAE --seed "$SEED" --overwrite "${encoder[@]}"
  step "devices in noise, few captures, unseen devices"
  launch "$HERE/rtl433.py" --captures "$RF/rtl433_train.npz" "$RF/rtl433_test.npz" --data "$BASE/rtl433" --signal-encoder-path "$RUN/rtl433_pretrain/encoder" \
    --steps $STUDY --out "$RUN/rtl433" --seed "$SEED" --overwrite
  step "a tiny language model that knows the device names, on text alone"
  "$PYTHON" "$HERE/make_llm.py" --out "$BASE/llm_rtl433" --tasks "$BASE/rtl433/tasks.json" --steps $WARM --seed "$SEED" --overwrite
  step "joint training on questions about device, coding and keying"
  files() { for task in device coding keying; do pairs+=("$1/device.h5" "$1/$task.json"); done; }
  pairs=(); files "$BASE/rtl433/train"
  join rtl433_joint $STUDY $JOINT --task-files "${pairs[@]}" --signal-encoder-path "$RUN/rtl433_pretrain/encoder" --llm-model-path "$BASE/llm_rtl433"
  for condition in clean 10dB 0dB -5dB -10dB clean_shift; do
    pairs=(); files "$BASE/rtl433/test/$condition"
    launch "$HERE/test.py" --model "$RUN/rtl433_joint/model" --task-files "${pairs[@]}" --wrong-signal --out "$RUN/rtl433_joint/test_$condition"
  done
  "$PYTHON" "$HERE/report.py" real --runs "$RUN" ${SMOKE:+--smoke}
fi
