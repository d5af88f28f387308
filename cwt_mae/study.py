"""The study that run_builtin.sh makes on real data, one command a part; every number of the README's tables comes from here.

    python cwt_mae/study.py beat   --data mitbih --out runs/cwt_mae/mitbih --seed 0      # trains; never looks at the test records
    python cwt_mae/study.py score  --data mitbih --out runs/cwt_mae/mitbih --seeds 0 1 2 # the test records, once, at the end
    python cwt_mae/study.py series --data ecg200.npz --out runs/cwt_mae/ecg200 --seeds 0 1 2 3 4
    python cwt_mae/study.py builtin --out runs/cwt_mae/builtin                           # collects what run_builtin.sh made

Each part calls the scripts of this folder as a user would; it adds nothing but the bookkeeping of CPU time.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root: every way of starting this file finds it
from common.checkpoint import atomic_write
from common.errors import UserError, run
from common.figures import new_figure, save_figure
from common.summary import write_result
from cwt_mae import baselines, finetune, test, train
from cwt_mae.dataset_finetune import DS1

# Sizes: thin patches over the whole height of the image, log-spaced scales, the plain signal beside the image (README.md)
SIZES = ("--cwt-scales 16 --lowest-scale 0.7 --scale-step 1.25 --log-scales --patch-size-freq 16 --embed-dim 64 --depth 3 --num-heads 4 "
         "--decoder-embed-dim 48 --decoder-depth 1 --decoder-num-heads 4 --no-patch-norm --raw-patches").split()
BEAT = "--model-fs 90 --signal-len 180".split()           # 2 s round the beat, 20 patches of 0.1 s
BEAT_TUNE = ("--task beat --folds 4 --head mlp --center-columns 6 --hidden-dim 32 --res-blocks 0 --dropout 0.3 --input-dropout 0.8 --batch-size 128 "
             "--lr 2e-3 --label-smoothing 0.05 --sampling-power 0.5 --augment 1 --jitter 2 --select last --eval-every 10000 --save-every 10000").split()
SERIES_TUNE = ("--task series --head mlp --hidden-dim 32 --res-blocks 0 --dropout 0.2 --batch-size 32 --lr 2e-3 --layer-decay 0.75 --label-smoothing 0.05 "
               "--augment 1 --jitter 2 --fold -1 --save-every 10000").split()
STATED = {"ecg200": {"1-NN": 0.880, "FCN (published)": 0.889}, "ecg5000": {"1-NN": 0.979}}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("part", choices=("beat", "score", "series", "builtin"))
    parser.add_argument("--data", help="folder of MIT-BIH records, or one UCR file")
    parser.add_argument("--out", required=True, help="folder of runs; results go to the folder above it")
    parser.add_argument("--seed", type=int, default=0, help="beat: this seed, and validation fold seed modulo 4")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="score, series: these seeds")
    parser.add_argument("--pretrain-steps", type=int, default=1500)
    parser.add_argument("--finetune-steps", type=int, default=1000)
    parser.add_argument("--cache", help="folder for the prepared signals (None: data/cwt_mae/cache)")
    return parser.parse_args(argv)


def call(module, *options) -> float:
    """Run one script in this process; returns its CPU seconds."""
    start = time.process_time()
    module.main(module.parse_args([str(option) for option in options]))
    return time.process_time() - start


def beat(args):
    """One seed: pre-train on DS1 without labels, fine-tune, random weights for the same total CPU time, small CNN."""
    if not trainable(args.data):
        if (Path(args.out) / f"tuned-{args.seed}" / "model.safetensors").is_file():
            print(f"{args.data}: no record of DS1 to train on; its records will be scored with the classifiers in {args.out}")
            return
        raise UserError(f"{args.data}: no record of DS1 to train on, and no classifier of an earlier run in {args.out}; train on a folder with DS1 first")
    common, out = ["--data", args.data, *(["--cache", args.cache] if args.cache else []), "--overwrite", "--seed", args.seed], Path(args.out)
    fold, tune = ["--fold", args.seed % 4], args.finetune_steps
    cpu = {"pre-training": call(train, *common, "--split", "ds1", *SIZES, *BEAT, "--patch-size-time", 9, "--batch-size", 64, "--lr", 2e-3, "--probe", "beat",
                                "--max-steps", args.pretrain_steps, "--eval-every", 500, "--log-every", 100, "--out", out / f"pretrained-{args.seed}")}
    start = [*common, *BEAT_TUNE, *fold, "--pretrained", out / f"pretrained-{args.seed}" / "model.safetensors"]
    cpu["fine-tuning"] = call(finetune, *start, "--encoder-lr", 0.05, "--layer-decay", 0.75, "--max-steps", tune, "--out", out / f"tuned-{args.seed}")
    longer = round(tune * (cpu["pre-training"] + cpu["fine-tuning"]) / cpu["fine-tuning"])
    cpu["random weights"] = call(finetune, *start, "--random-init", "--layer-decay", 1, "--max-steps", longer, "--out", out / f"random-{args.seed}")
    cpu["cnn"] = call(baselines, *common, "--kind", "cnn", "--task", "beat", *BEAT, *fold, "--max-steps", tune, "--sampling-power", 0.5, "--out", out / f"cnn-{args.seed}")
    atomic_write(out / f"cpu-{args.seed}.json", json.dumps({**cpu, "random weights, steps": longer}, indent=1))


def trainable(folder) -> bool:
    """Whether the folder holds records of DS1."""
    return any(path.stem in DS1 for path in Path(folder).iterdir())


def metrics(folder) -> dict:
    return json.loads((Path(folder) / "metrics.json").read_text())


def score(args):
    """The test records: each seed of each model, their ensembles, and the forests; one row of the closing table."""
    out, cache = Path(args.out), ["--cache", args.cache] if args.cache else []
    found = {}
    for name in ("tuned", "random"):
        files = [out / f"{name}-{seed}" / "model.safetensors" for seed in args.seeds]
        for seed, file in zip(args.seeds, files):
            call(test, "--model", file, "--data", args.data, *cache, "--out", out / f"{name}-{seed}-test", "--overwrite")
        call(test, "--model", *files, "--data", args.data, *cache, "--out", out / f"{name}-ensemble-test", "--overwrite")
        found[name] = [metrics(out / f"{name}-{seed}-test") for seed in args.seeds] + [metrics(out / f"{name}-ensemble-test")]
    rows = {"pre-trained": found["tuned"][:-1], "random weights, same CPU": found["random"][:-1]}
    if trainable(args.data):                              # the other controls are trained and scored in one go
        call(baselines, "--kind", "readme", "--task", "beat", "--model-fs", 180, "--low-hz", 0, "--signal-len", 180, "--data", args.data, *cache,
             "--out", out / "forest", "--overwrite")
        call(baselines, "--kind", "forest", "--task", "beat", *BEAT, "--data", args.data, *cache, "--out", out / "forest-features", "--overwrite")
        rows |= {"small CNN": [metrics(out / f"cnn-{seed}") for seed in args.seeds], "forest (README)": [metrics(out / "forest")],
                 "forest, our features": [metrics(out / "forest-features")]}
    rows |= {"pre-trained, ensemble": found["tuned"][-1:], "random, ensemble": found["random"][-1:]}
    mean = {name: float(np.mean([r["macro_f1"] for r in results])) for name, results in rows.items()}
    deviation = {name: float(np.std([r["macro_f1"] for r in results], ddof=1)) for name, results in rows.items() if len(results) > 1}
    lines = [f"{'test records':26} {'macro-F1':>9} {'accuracy':>9} {'N':>6} {'S':>6} {'V':>6} {'F':>6}"]
    for name, results in rows.items():
        lines.append(f"{name:26} {mean[name]:9.3f} {np.mean([r['accuracy'] for r in results]):9.3f} "
                     + " ".join(f"{np.mean([r['per_class'][c]['f1'] for r in results]):6.3f}" for c in "NSVF"))
    print("\n".join(lines))
    figure, axis = new_figure(1, 1, width=8)
    axis.bar(range(len(rows)), [np.mean([r["macro_f1"] for r in results]) for results in rows.values()], color="#2a6fbb", alpha=0.5)
    for i, results in enumerate(rows.values()):
        axis.plot([i] * len(results), [r["macro_f1"] for r in results], "o", color="#1c2430", ms=4)
    axis.axhline(0.607, color="#d1603d", ls="--", label="forest, stated with the data: 0.607")
    axis.set_xticks(range(len(rows)), [name.replace(", ", ",\n") for name in rows], fontsize=8)
    axis.set_ylabel("macro-F1 of N S V F on DS2a")
    axis.legend()
    save_figure(figure, out / "figures" / "ds2a.png")
    best, stated = found["tuned"][-1], {"forest, stated": 0.607} if trainable(args.data) else {}
    write_result(
        out.parent, "MIT-BIH beats, " + ("DS2a" if trainable(args.data) else "other records"), "macro-F1 of N S V F", mean["pre-trained"],
        {name: mean[name] for name in rows if name != "pre-trained" and "ensemble" not in name} | stated | {"always N": always_first(best)},
        interval=[np.mean([r["macro_f1_95"][i] for r in rows["pre-trained"]]) for i in (0, 1)],
        figures=[(out / "figures" / "ds2a.png", "macro-F1 on the test records; a dot a seed"),
                 (out / "tuned-ensemble-test" / "figures" / "confusion.png", "test records, ensemble of the seeds"),
                 (out / f"pretrained-{args.seeds[0]}" / "figures" / "reconstruction.png", "pre-training: hidden, reconstructed, original")],
        note=f"Mean of {len(args.seeds)} seeds, each with its own pre-training run and validation fold of DS1 records (deviation "
             f"{deviation.get('pre-trained', float('nan')):.3f}); interval: bootstrap over the test records. Ensemble of the seeds: {best['macro_f1']:.3f}. "
             "The test records were scored once, after all training.",
        details={"seeds": args.seeds, "per_seed": {n: [r["macro_f1"] for r in rs] for n, rs in rows.items()}, "deviation": deviation,
                 "per_class": {n: {c: float(np.mean([r["per_class"][c]["f1"] for r in rs])) for c in "NSVF"} for n, rs in rows.items()},
                 "accuracy": {n: float(np.mean([r["accuracy"] for r in rs])) for n, rs in rows.items()},
                 "validation": {n: [metrics(out / f"{n}-{s}")["validation"]["macro_f1"] for s in args.seeds] for n in ("tuned", "random")},
                 "cpu_seconds": [json.loads((out / f"cpu-{s}.json").read_text()) for s in args.seeds]})


def always_first(result: dict) -> float:
    """Macro-F1 of calling every window the first class."""
    counts = np.array(result["confusion"]).sum(1)
    return float(2 * counts[0] / (counts[0] + counts.sum()) / (counts > 0).sum())


def series(args):
    """A UCR set: pre-train on the training series, fine-tune, random weights, CNN, 1-NN; accuracy on the official test part."""
    name, out = Path(args.data).stem, Path(args.out)
    with np.load(args.data) as file:
        points = file["x_train"].shape[1]
    patch = min((p for p in range(max(2, points // 24), points // 12 + 1) if points % p == 0), key=lambda p: abs(p - points / 17), default=max(2, points // 17))
    signal_len = -(-points // patch) * patch              # series of an awkward length are padded, and the padding masked
    common = ["--data", args.data, *(["--cache", args.cache] if args.cache else []), "--overwrite"]
    sizes = ["--model-fs", 0, "--low-hz", 0, "--signal-len", signal_len]
    result = {"pre-trained": [], "random": [], "cnn": []}
    for seed in args.seeds:
        base, run_seed = out / f"pretrained-{seed}", ["--seed", seed]
        call(train, *common, *run_seed, *SIZES, *sizes, "--patch-size-time", patch, "--batch-size", 64, "--lr", 2e-3, "--windows", 640, "--val-share", 0,
             "--max-steps", args.pretrain_steps, "--eval-every", 10000, "--save-every", 10000, "--log-every", 100, "--out", base)
        for kind, options in (("pre-trained", []), ("random", ["--random-init", "--layer-decay", 1])):
            tuned = out / f"{kind}-{seed}"
            call(finetune, *common, *run_seed, *SERIES_TUNE, "--pretrained", base / "model.safetensors", "--max-steps", args.finetune_steps, *options, "--out", tuned)
            call(test, "--model", tuned / "model.safetensors", *common, "--out", f"{tuned}-test")
            result[kind].append(metrics(f"{tuned}-test")["accuracy"])
        call(baselines, *common, *run_seed, "--kind", "cnn", "--task", "series", *sizes, "--max-steps", args.finetune_steps, "--batch-size", 32, "--out", out / f"cnn-{seed}")
        result["cnn"].append(metrics(out / f"cnn-{seed}")["accuracy"])
    call(baselines, *common, "--kind", "nn", "--task", "series", *sizes, "--out", out / "nn")
    mean = {kind: float(np.mean(values)) for kind, values in result.items()}
    low_high = np.percentile([np.mean(np.random.default_rng(i).choice(result["pre-trained"], len(args.seeds))) for i in range(1000)], [2.5, 97.5])
    write_result(out.parent, f"{name.upper()}, {'binary' if name == 'ecg5000' else 'accuracy'}", "accuracy", mean["pre-trained"],
                 {"random weights": mean["random"], "small CNN": mean["cnn"], "1-NN, computed": metrics(out / "nn")["accuracy"], **STATED.get(name, {})}, interval=low_high,
                 figures=[(out / f"pre-trained-{args.seeds[0]}-test" / "figures" / "confusion.png", f"{name}, seed {args.seeds[0]}")],
                 note=f"Mean of {len(args.seeds)} seeds (pre-training and fine-tuning); interval: bootstrap over the seeds. Fixed steps, last weights, nothing selected.",
                 details={"accuracy": result})
    print(name, {kind: (round(mean[kind], 4), values) for kind, values in result.items()})


def builtin(args):
    """Rows of the closing table for the built-in data."""
    out = Path(args.out)
    base, linear, tuned = metrics(out / "base"), metrics(out / "probe"), metrics(out / "tuned-test")
    picture = [(out / "base" / "figures" / "reconstruction.png", "hidden, reconstructed, original")]
    write_result(out.parent, "built-in ECG, image reconstruction", "MSE of hidden patches, lower is better", base["val_spec"],
                 {"predict the mean": base["spec_mean"], "straight lines": base["spec_line"]}, figures=picture, note="Normalised wavelet images of subjects held out of pre-training.")
    write_result(out.parent, "built-in ECG, signal reconstruction", "MSE, lower is better", base["val_time"],
                 {"predict the mean": base["time_mean"], "straight lines": base["time_line"]}, note="The whole normalised signal, visible parts included, of the same subjects.")
    write_result(out.parent, "built-in rhythms, linear probe", "macro-F1", linear["macro_f1"], {"random weights": linear["random_mean"], "most frequent class": linear["chance"]},
                 interval=linear["interval"], figures=[(out / "probe" / "figures" / "probe.png", "linear probe of frozen features")],
                 note="Logistic regression on frozen features, other subjects for the test; interval: bootstrap over records; random: mean of the seeds.")
    write_result(out.parent, "built-in rhythms, fine-tuned", "macro-F1", tuned["macro_f1"],
                 {"random weights, fine-tuned": metrics(out / "random-test")["macro_f1"], "random forest": metrics(out / "forest")["macro_f1"], "small CNN": metrics(out / "cnn")["macro_f1"],
                  "most frequent class": linear["chance"]}, interval=tuned["macro_f1_95"],
                 figures=[(out / "tuned-test" / "figures" / "confusion.png", "fine-tuned, test records")], note="Windows of 10 s of subjects that no training saw.")


if __name__ == "__main__":
    run(lambda args: {"beat": beat, "score": score, "series": series, "builtin": builtin}[args.part](args), parse_args())
