"""What run_builtin.sh runs, one command a part; every number of the README's tables comes from here.

    python cwt_mae/study.py beat   --data mitbih --out runs/cwt_mae/mitbih --seed 0      # trains; only the CNN is scored at once
    python cwt_mae/study.py forest --data mitbih --out runs/cwt_mae/mitbih               # two forests, trained and scored in one go
    python cwt_mae/study.py score  --data mitbih --out runs/cwt_mae/mitbih --seeds 0 1 2 # the test records, once
    python cwt_mae/study.py series --data ecg200.npz --out runs/cwt_mae/ecg200 --seeds 0 1 2 3 4
    python cwt_mae/study.py builtin --out runs/cwt_mae/builtin                           # the built-in data

Each part calls the scripts of this folder as a user would; it adds nothing but the bookkeeping of CPU time.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it
from common.checkpoint import atomic_write
from common.errors import UserError, run
from common.figures import new_figure, save_figure
from studies.summary import write_result
from cwt_mae import baselines, finetune, make_data, probe, test, train, visualize
from cwt_mae.dataset import ROOT, find_files
from cwt_mae.dataset_finetune import DS1

# Thin patches over the whole height of the image, log-spaced scales, the plain signal beside the image (README.md)
SIZES = dict(
    cwt_scales=16,
    lowest_scale=0.7,
    scale_step=1.25,
    log_scales=True,
    patch_size_freq=16,
    embed_dim=64,
    depth=3,
    num_heads=4,
    decoder_embed_dim=48,
    decoder_depth=1,
    decoder_num_heads=4,
    patch_norm=False,
    raw_patches=True,
    batch_size=64,
    lr=2e-3,
)
BEAT = dict(model_fs=90, signal_len=180)  # 2 s round the beat, 20 patches of 0.1 s
BEAT_TUNE = dict(
    task="beat",
    folds=4,
    head="mlp",
    center_columns=6,
    compare=True,
    hidden_dim=16,
    res_blocks=0,
    dropout=0.3,
    input_dropout=0.8,
    batch_size=128,
    lr=2e-3,
    label_smoothing=0.05,
    sampling_power=0.5,
    augment=1,
    jitter=2,
    irregular=0.3,
    select="last",
    eval_every=10000,
)
FREE_STEPS = 0.6  # steps that train the encoder too, for the CPU time of one that does not
SERIES_TUNE = dict(
    task="series",
    fold=-1,
    head="mlp",
    hidden_dim=32,
    res_blocks=0,
    dropout=0.2,
    batch_size=32,
    lr=2e-3,
    label_smoothing=0.05,
    augment=1,
    jitter=2,
)
DS2A = (
    "100 103 105 111 117 200 202 213 222 231 234".split()
)  # the records that the stated forest was scored on
STATED = {
    "DS2a": {"forest, stated": 0.607},
    "ecg200": {"1-NN": 0.880, "FCN (published)": 0.889},
    "ecg5000": {"1-NN": 0.979},
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("part", choices=("beat", "forest", "score", "series", "builtin"))
    parser.add_argument("--data", help="folder of MIT-BIH records, or one UCR file")
    parser.add_argument("--out", required=True, help="folder of runs; results go to the folder above it")
    parser.add_argument(
        "--seed", type=int, default=0, help="beat: this seed, and validation fold seed modulo 4"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="score, series: these seeds")
    parser.add_argument("--pretrain-steps", type=int, default=1500, help="optimizer steps of pre-training")
    parser.add_argument(
        "--finetune-steps", type=int, default=1000, help="optimizer steps of fine-tuning and of the CNN"
    )
    parser.add_argument("--smoke", action="store_true", help="everything runs, hardly anything is learned")
    parser.add_argument("--cache", help="folder for the prepared signals (None: data/cwt_mae/cache)")
    args = parser.parse_args(argv)
    if args.smoke:
        args.pretrain_steps, args.finetune_steps, args.seeds = 15, 10, args.seeds[:1]
    return args


def call(module, **options) -> float:
    """Run one script in this process, `max_steps=5` standing for `--max-steps 5`; returns its CPU seconds."""
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words += [flag if value else flag.replace("--", "--no-", 1)]
        elif value is not None:
            words += [flag, *map(str, value if isinstance(value, list) else [value])]
    start = time.process_time()
    module.main(module.parse_args(words))
    return time.process_time() - start


def beat(args):
    """One seed: pre-train on DS1 without labels and train a head on the frozen encoder; the same with random weights, frozen, and
    free for the same total CPU time; small CNN."""
    out, seed = Path(args.out), args.seed
    if not trainable(args.data):
        if not (out / f"final-{seed}" / "model.safetensors").is_file():
            raise UserError(
                f"{args.data}: no record of DS1 to train on, and no classifier of an earlier run in {out}; train on DS1 first"
            )
        print(
            f"{args.data}: no record of DS1 to train on; its records will be scored with the classifiers in {out}"
        )
        return
    common, steps, cpu = (
        dict(data=args.data, cache=args.cache, overwrite=True, seed=seed),
        args.finetune_steps,
        {},
    )
    base = out / f"pretrained-{seed}"
    cpu["pre-training"] = call(
        train,
        **common,
        **SIZES,
        **BEAT,
        patch_size_time=9,
        split="ds1",
        probe="beat",
        out=base,
        max_steps=args.pretrain_steps,
        eval_every=500,
        log_every=100,
    )
    tune = common | BEAT_TUNE | dict(fold=seed % 4, pretrained=base / "model.safetensors")
    cpu["head, one fold held out"] = call(
        finetune, **tune, freeze=True, max_steps=steps, out=out / f"fold-{seed}"
    )
    # the fold says how well this recipe does; what is scored at the end is fitted to all of DS1
    tune |= dict(fold=-1)
    cpu["head"] = call(finetune, **tune, freeze=True, max_steps=steps, out=out / f"final-{seed}")
    tune |= dict(random_init=True)
    cpu["random, frozen"] = call(
        finetune, **tune, freeze=True, max_steps=steps, out=out / f"final-frozen-{seed}"
    )
    free = round(
        FREE_STEPS * steps * (cpu["pre-training"] + cpu["head"]) / cpu["head"]
    )  # the same total CPU time
    cpu["random"] = call(
        finetune,
        **tune | dict(compare=False),
        layer_decay=1,
        max_steps=free,
        out=out / f"final-random-{seed}",
    )
    cpu["cnn"] = call(
        baselines,
        **common,
        **BEAT,
        kind="cnn",
        task="beat",
        max_steps=steps,
        sampling_power=0.5,
        irregular=BEAT_TUNE["irregular"],
        out=out / f"final-cnn-{seed}",
    )
    atomic_write(out / f"cpu-{seed}.json", json.dumps({**cpu, "random, steps": free}, indent=1))


def names_in(folder) -> set:
    """Names of the records that the folder holds."""
    return {path.stem for path in find_files([folder])}


def trainable(folder) -> bool:
    """Whether the folder holds records of DS1."""
    return bool(names_in(folder) & set(DS1))


def metrics(folder) -> dict:
    """The scores that a script wrote into its run folder."""
    return json.loads((Path(folder) / "metrics.json").read_text())


def forest(args):
    """The random forest that the data's description reports, and one on what our head and the CNN are given."""
    if trainable(args.data):
        common = dict(
            data=args.data, cache=args.cache, overwrite=True, task="beat", trees=5 if args.smoke else 200
        )
        call(
            baselines,
            **common,
            kind="readme",
            model_fs=180,
            low_hz=0,
            signal_len=180,
            out=Path(args.out) / "forest",
        )
        call(baselines, **common, **BEAT, kind="forest", out=Path(args.out) / "forest-features")


def score(args):
    """The test records: each seed of each model, and our seeds' ensemble; one row of the closing table."""
    out, common, found = Path(args.out), dict(data=args.data, cache=args.cache, overwrite=True), {}
    for name in ("final", "final-frozen", "final-random"):
        for seed in args.seeds:
            call(
                test,
                **common,
                model=out / f"{name}-{seed}" / "model.safetensors",
                out=out / f"{name}-{seed}-test",
            )
        found[name] = [metrics(out / f"{name}-{seed}-test") for seed in args.seeds]
    call(
        test,
        **common,
        model=[out / f"final-{seed}" / "model.safetensors" for seed in args.seeds],
        out=out / "final-ensemble-test",
    )
    best = metrics(out / "final-ensemble-test")
    rows = {
        "pre-trained": found["final"],
        "random, frozen too": found["final-frozen"],
        "random, free, same CPU": found["final-random"],
    }
    if trainable(args.data):  # these controls were trained and scored in one go
        rows |= {
            "small CNN": [metrics(out / f"final-cnn-{seed}") for seed in args.seeds],
            "forest (README)": [metrics(out / "forest")],
            "forest, our input": [metrics(out / "forest-features")],
        }
    rows |= {"pre-trained, ensemble": [best]}
    records = "DS2a" if names_in(args.data) - set(DS1) == set(DS2A) else "other records"
    stated = STATED.get(records, {})
    mean = {name: float(np.mean([r["macro_f1"] for r in results])) for name, results in rows.items()}
    deviation = {
        name: float(np.std([r["macro_f1"] for r in results], ddof=1))
        for name, results in rows.items()
        if len(results) > 1
    }
    lines = [f"{'test records':26} {'macro-F1':>9} {'accuracy':>9} {'N':>6} {'S':>6} {'V':>6} {'F':>6}"]
    for name, results in rows.items():
        lines.append(
            f"{name:26} {mean[name]:9.3f} {np.mean([r['accuracy'] for r in results]):9.3f} "
            + " ".join(f"{np.mean([r['per_class'][c]['f1'] for r in results]):6.3f}" for c in "NSVF")
        )
    print("\n".join(lines))
    figure, axis = new_figure(1, 1, width=8)
    axis.bar(
        range(len(rows)),
        [np.mean([r["macro_f1"] for r in results]) for results in rows.values()],
        color="#2a6fbb",
        alpha=0.5,
    )
    for i, results in enumerate(rows.values()):
        axis.plot([i] * len(results), [r["macro_f1"] for r in results], "o", color="#1c2430", ms=4)
    for label, value in stated.items():
        axis.axhline(value, color="#d1603d", ls="--", label=f"{label}: {value}")
    axis.set_xticks(range(len(rows)), [name.replace(", ", ",\n") for name in rows], fontsize=8)
    axis.axhline(always_first(best), color="#5b6770", ls=":", label="always N")
    axis.set_ylabel(f"macro-F1 of N S V F on {records}")
    axis.legend()
    save_figure(figure, out / "figures" / "test.png")
    write_result(
        out.parent,
        f"MIT-BIH beats, {records}",
        "macro-F1 of N S V F",
        mean["pre-trained"],
        {name: mean[name] for name in rows if name != "pre-trained" and "ensemble" not in name}
        | stated
        | {"always N": always_first(best)},
        interval=[np.mean([r["macro_f1_95"][i] for r in rows["pre-trained"]]) for i in (0, 1)],
        figures=[
            (out / "figures" / "test.png", "macro-F1 on the test records; a dot a seed"),
            (
                out / "final-ensemble-test" / "figures" / "confusion.png",
                "test records, ensemble of the seeds",
            ),
            (
                out / f"pretrained-{args.seeds[0]}" / "figures" / "reconstruction.png",
                "pre-training: hidden, reconstructed, original",
            ),
        ],
        note=f"Mean of {len(args.seeds)} seeds, each pre-trained and fitted on all of DS1 (deviation "
        f"{deviation.get('pre-trained', float('nan')):.3f}); the recipe was chosen on folds of DS1 records. Interval: bootstrap over the "
        f"test records. Ensemble of the seeds: {best['macro_f1']:.3f}.",
        details={
            "seeds": args.seeds,
            "per_seed": {n: [r["macro_f1"] for r in rs] for n, rs in rows.items()},
            "deviation": deviation,
            "per_class": {
                n: {c: float(np.mean([r["per_class"][c]["f1"] for r in rs])) for c in "NSVF"}
                for n, rs in rows.items()
            },
            "accuracy": {n: float(np.mean([r["accuracy"] for r in rs])) for n, rs in rows.items()},
            "held-out fold": [metrics(out / f"fold-{s}")["validation"] for s in args.seeds],
            "cpu_seconds": [json.loads((out / f"cpu-{s}.json").read_text()) for s in args.seeds],
        },
    )


def always_first(result: dict) -> float:
    """Macro-F1 of calling every window the first class."""
    counts = np.array(result["confusion"]).sum(1)
    return float(2 * counts[0] / (counts[0] + counts.sum()) / (counts > 0).sum())


def series(args):
    """A UCR set: pre-train on the training series, fine-tune, random weights, CNN, 1-NN; accuracy on the official test part."""
    name, out = Path(args.data).stem, Path(args.out)
    with np.load(args.data) as file:
        points = file["x_train"].shape[1]
    fitting = (p for p in range(max(2, points // 24), points // 12 + 1) if points % p == 0)
    patch = min(fitting, key=lambda p: abs(p - points / 17), default=max(2, points // 17))
    sizes = dict(
        model_fs=0, low_hz=0, signal_len=-(-points // patch) * patch
    )  # an awkward length is padded, and the padding masked
    common, steps = dict(data=args.data, cache=args.cache, overwrite=True), args.finetune_steps
    result = {"pre-trained": [], "random": [], "cnn": []}
    for seed in args.seeds:
        base = out / f"pretrained-{seed}"
        call(
            train,
            **common,
            **SIZES,
            **sizes,
            seed=seed,
            patch_size_time=patch,
            windows=640,
            val_share=0,
            max_steps=args.pretrain_steps,
            eval_every=10000,
            log_every=100,
            out=base,
        )
        tune = common | SERIES_TUNE | dict(seed=seed, pretrained=base / "model.safetensors", max_steps=steps)
        call(finetune, **tune, layer_decay=0.75, out=out / f"pre-trained-{seed}")
        call(finetune, **tune, layer_decay=1, random_init=True, out=out / f"random-{seed}")
        for kind in ("pre-trained", "random"):
            call(
                test,
                **common,
                model=out / f"{kind}-{seed}" / "model.safetensors",
                out=out / f"{kind}-{seed}-test",
            )
            result[kind].append(metrics(out / f"{kind}-{seed}-test")["accuracy"])
        call(
            baselines,
            **common,
            **sizes,
            seed=seed,
            kind="cnn",
            task="series",
            max_steps=steps,
            batch_size=32,
            out=out / f"cnn-{seed}",
        )
        result["cnn"].append(metrics(out / f"cnn-{seed}")["accuracy"])
    call(baselines, **common, **sizes, kind="nn", task="series", out=out / "nn")
    mean = {kind: float(np.mean(values)) for kind, values in result.items()}
    rng = np.random.default_rng(0)
    low_high = np.percentile(
        [rng.choice(result["pre-trained"], len(args.seeds)).mean() for _ in range(1000)], [2.5, 97.5]
    ).tolist()
    write_result(
        out.parent,
        f"{name.upper()}, {'binary' if name == 'ecg5000' else 'accuracy'}",
        "accuracy",
        mean["pre-trained"],
        {
            "random weights": mean["random"],
            "small CNN": mean["cnn"],
            "1-NN, computed": metrics(out / "nn")["accuracy"],
            **STATED.get(name, {}),
        },
        interval=low_high,
        figures=[
            (
                out / f"pre-trained-{args.seeds[0]}-test" / "figures" / "confusion.png",
                f"{name}, seed {args.seeds[0]}",
            )
        ],
        note=f"Mean of {len(args.seeds)} seeds (pre-training and fine-tuning); interval: bootstrap over the seeds. "
        "Fixed steps, last weights, nothing selected.",
        details={"accuracy": result},
    )
    print(name, {kind: (round(mean[kind], 4), values) for kind, values in result.items()})


def builtin(args):
    """Built-in data: pre-train, linear probe, fine-tune, controls; four rows of the closing table."""
    out, data = Path(args.out), ROOT / "data" / "cwt_mae" / ("builtin-smoke" if args.smoke else "builtin")
    call(make_data, out=data, subjects=9 if args.smoke else 30, seconds=120 if args.smoke else 300)
    split = dict(split=data / "labelled" / "split.json", overwrite=True)
    labelled = dict(data=data / "labelled", **split)
    sizes = dict(model_fs=50, signal_len=500)  # 10 s, 50 patches of 0.2 s
    call(
        train,
        data=data,
        **split,
        **SIZES,
        **sizes,
        patch_size_time=10,
        max_steps=args.pretrain_steps,
        windows=640 if args.smoke else 6400,
        eval_every=500,
        save_every=500,
        log_every=100,
        probe="rhythm",
        out=out / "base",
    )
    model = out / "base" / "model.safetensors"
    call(
        probe, **labelled, model=model, task="rhythm", random_seeds=1 if args.smoke else 3, out=out / "probe"
    )
    tune = labelled | dict(
        pretrained=model,
        task="rhythm",
        lr=1e-3,
        sampling_power=0.5,
        augment=1,
        max_steps=args.finetune_steps,
        eval_every=100,
        log_every=100,
        folds=3,
    )
    call(finetune, **tune, layer_decay=0.75, out=out / "tuned")
    call(finetune, **tune, layer_decay=1, random_init=True, out=out / "random")
    for name in ("tuned", "random"):
        call(test, **labelled, model=out / name / "model.safetensors", out=out / f"{name}-test")
    for kind in ("forest", "cnn"):
        call(
            baselines,
            **labelled,
            **sizes,
            kind=kind,
            task="rhythm",
            max_steps=args.finetune_steps,
            out=out / kind,
        )
    call(visualize, model=model, data=data / "ppg", out=out / "ppg.png", window=1)

    base, linear, tuned = metrics(out / "base"), metrics(out / "probe"), metrics(out / "tuned-test")
    write_result(
        out.parent,
        "built-in ECG, image reconstruction",
        "MSE of hidden patches, lower is better",
        base["val_spec"],
        {"predict the mean": base["spec_mean"], "straight lines": base["spec_line"]},
        figures=[
            (out / "base" / "figures" / "reconstruction.png", "ECG: hidden, reconstructed, original"),
            (out / "ppg.png", "the same, PPG"),
        ],
        note="Normalised wavelet images of subjects held out of pre-training.",
    )
    write_result(
        out.parent,
        "built-in ECG, signal reconstruction",
        "MSE, lower is better",
        base["val_time"],
        {"predict the mean": base["time_mean"], "straight lines": base["time_line"]},
        note="The whole normalised signal, visible parts included, of the same subjects.",
    )
    write_result(
        out.parent,
        "built-in rhythms, linear probe",
        "macro-F1",
        linear["macro_f1"],
        {"random weights": linear["random_mean"], "most frequent class": linear["chance"]},
        interval=linear["interval"],
        figures=[(out / "probe" / "figures" / "probe.png", "linear probe of frozen features")],
        note="Logistic regression on frozen features, other subjects for the test; interval: bootstrap over records; "
        "random: mean of the seeds.",
    )
    write_result(
        out.parent,
        "built-in rhythms, fine-tuned",
        "macro-F1",
        tuned["macro_f1"],
        {
            "random weights, fine-tuned": metrics(out / "random-test")["macro_f1"],
            "random forest": metrics(out / "forest")["macro_f1"],
            "small CNN": metrics(out / "cnn")["macro_f1"],
            "most frequent class": linear["chance"],
        },
        interval=tuned["macro_f1_95"],
        figures=[(out / "tuned-test" / "figures" / "confusion.png", "fine-tuned, test records")],
        note="Windows of 10 s of subjects that no training saw.",
    )


def main(args):
    {"beat": beat, "forest": forest, "score": score, "series": series, "builtin": builtin}[args.part](args)


if __name__ == "__main__":
    run(main, parse_args())
