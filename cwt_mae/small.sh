# Sizes of the small models that the launchers train on one CPU core; sourced by run_train.sh, run_builtin.sh and study.sh.
# Thin patches over the whole height of the image, log-spaced scales, the plain signal beside the image, no norm that
# takes the amplitude of a patch away: README.md, "What mattered".
SMALL=(--cwt-scales 16 --lowest-scale 0.7 --scale-step 1.25 --log-scales --patch-size-freq 16 --embed-dim 64 --depth 3 --num-heads 4
       --decoder-embed-dim 48 --decoder-depth 1 --decoder-num-heads 4 --no-patch-norm --raw-patches --batch-size 64 --lr 2e-3)
BUILTIN=(--model-fs 50 --signal-len 500 --patch-size-time 10)          # windows of 10 s, 50 patches of 0.2 s
BEAT=(--model-fs 90 --signal-len 180 --patch-size-time 9)              # windows of 2 s, 20 patches of 0.1 s
