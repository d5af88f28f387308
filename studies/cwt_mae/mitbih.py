"""Heart beats of MIT-BIH in four AAMI classes: trained on the records of DS1, scored once on every other
record.

    python studies/cwt_mae/mitbih.py train  --data mitbih --out runs/cwt_mae/mitbih --seed 0
    python studies/cwt_mae/mitbih.py forest --data mitbih --out runs/cwt_mae/mitbih
    python studies/cwt_mae/mitbih.py score  --data mitbih --out runs/cwt_mae/mitbih --seeds 0 1 2

train makes one seed of every model, forest fits two random forests, score looks at the test records.

A folder that holds test records only is scored with the classifiers of an earlier run. RESULTS.md holds what
came out.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np

from common.arguments import Parser, number
from common.errors import UserError
from common.figures import new_figure, save_figure
from common.files import read_json
from cwt_mae.dataset_finetune import DS1
from cwt_mae.layouts import find_files
from studies.recipe import ROOT, recipe, size, stage
from studies.summary import write_result

CLASSES = "NSVF"
# 2 s around the beat at 90 Hz, 20 patches of 0.1 s
WINDOW = dict(model_fs=90, signal_len=180)
SIZES = dict(config=ROOT / "cwt_mae" / "config_small.yaml", set=["signal_len=180", "patch_size_time=9"])
# The rhythm decides S; the tokens, the rhythm and the amplitude in the record decide V and F
HEAD = dict(head="mlp", center_columns=6, hierarchy=True)
HEAD_SIZES = ["hidden_dim=16", "num_res_blocks=0", "dropout_rate=0.3", "input_dropout=0.8"]
# How windows are drawn and augmented and what is known beside them, for our heads and for the CNN
DRAWN = dict(task="beat", amplitude=True, sampling_power=0.3, augment=1, jitter=2, fibrillation=0.3)
LOSS = dict(batch_size=128, lr=2e-3, label_smoothing=0.05)
FREE_STEPS = 1400  # steps from random weights with a free encoder: the CPU time of pre-training and head
# The records on which the forest that is stated with the data was scored
DS2A = "100 103 105 111 117 200 202 213 222 231 234".split()
STATED = {"DS2a": {"forest, stated": 0.607}}


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("part", choices=("train", "forest", "score"), help="what to run")
    parser.add_argument("--data", type=Path, required=True, help="folder of MIT-BIH records")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the runs; results go to the folder above it"
    )
    parser.add_argument(
        "--seed", type=number(int, 0), default=0, help="train: this seed, and validation fold seed modulo 4"
    )
    parser.add_argument(
        "--seeds", type=number(int, 0), nargs="+", default=[0, 1, 2], help="score: these seeds"
    )
    parser.add_argument(
        "--cache", type=Path, help="folder for the prepared signals; data/cwt_mae/cache without it"
    )
    return parser.parse_args(argv)


def names_in(folder) -> set:
    """Names of the records that the folder holds."""
    return {path.stem for path in find_files([folder])}


def trainable(folder) -> bool:
    """Whether the folder holds records of DS1."""
    return bool(names_in(folder) & set(DS1))


def train(args):
    """One seed: pre-training without labels and a head on the frozen encoder; the controls with random
    weights; the CNN."""
    out, seed = args.out, args.seed
    if not trainable(args.data):
        if not (out / f"final-{seed}" / "model.safetensors").is_file():
            raise UserError(
                f"{args.data}: no record of DS1 to train on, and no classifier of an earlier run in {out}; "
                "train on DS1 first"
            )
        print(
            f"{args.data}: no record of DS1 to train on; its records will be scored with the classifiers in "
            f"{out}"
        )
        return
    common = dict(data=args.data, cache=args.cache, seed=seed, overwrite=True, threads=1)

    # Pre-training on the records of DS1
    base = out / f"pretrained-{seed}"
    steps = dict(batch_size=64, lr=2e-3, max_steps=size(1500, smoke=3), eval_every=500, log_every=100)
    stage("cwt_mae/train.py", **common, **SIZES, **steps, model_fs=90, split="ds1", probe="beat", out=base)

    # A head on the frozen encoder, each beat compared with the median of its record. One fold held out says
    # how well the recipe does; what is scored at the end is fitted to all of DS1.
    tune = dict(common, **HEAD, **DRAWN, **LOSS, set=HEAD_SIZES, pretrained=base / "model.safetensors")
    frozen = dict(tune, freeze=True, compare=True, max_steps=size(1000, smoke=3))
    held_out = dict(folds=4, fold=seed % 4, select="last", eval_every=0)
    stage("cwt_mae/finetune.py", **frozen, **held_out, out=out / f"fold-{seed}")
    stage("cwt_mae/finetune.py", **frozen, fold=-1, out=out / f"final-{seed}")

    # Controls: the same with random weights, and random weights that are trained for the same CPU time
    stage("cwt_mae/finetune.py", **frozen, fold=-1, random_init=True, out=out / f"final-frozen-{seed}")
    free = dict(fold=-1, random_init=True, layer_decay=1, max_steps=size(FREE_STEPS, smoke=3))
    stage("cwt_mae/finetune.py", **tune, **free, out=out / f"final-random-{seed}")
    cnn = dict(WINDOW, **DRAWN, max_steps=frozen["max_steps"])
    stage("studies/cwt_mae/cnn.py", **common, **cnn, out=out / f"final-cnn-{seed}")


def forest(args):
    """The random forest that the data's description reports, and one on what our head and the CNN are
    given."""
    if not trainable(args.data):
        return
    common = dict(data=args.data, cache=args.cache, task="beat", overwrite=True, threads=1)
    stated = dict(kind="readme", model_fs=180, low_hz=0, signal_len=180)
    ours = dict(kind="forest", **WINDOW, amplitude=True)
    for name, windows in (("forest", stated), ("forest-features", ours)):
        trees = size(200, smoke=5)
        stage("studies/cwt_mae/forest.py", **common, **windows, trees=trees, out=args.out / name)


def score(args):
    """The test records: each seed of each model, and the ensemble of our seeds; one row of the closing
    table."""
    out, common = args.out, dict(data=args.data, cache=args.cache, overwrite=True)
    titles = {
        "final": "pre-trained",
        "final-frozen": "random, frozen too",
        "final-random": "random, free, same CPU",
    }
    rows = {}
    for name, title in titles.items():
        for seed in args.seeds:
            model = out / f"{name}-{seed}" / "model.safetensors"
            stage("cwt_mae/test.py", **common, model=model, out=out / f"{name}-{seed}-test", threads=1)
        rows[title] = [metrics(out / f"{name}-{seed}-test") for seed in args.seeds]
    models = [out / f"final-{seed}" / "model.safetensors" for seed in args.seeds]
    stage("cwt_mae/test.py", **common, model=models, out=out / "final-ensemble-test", threads=1)

    # These controls were trained and scored in one go
    if trainable(args.data):
        rows |= {
            "small CNN": [metrics(out / f"final-cnn-{seed}") for seed in args.seeds],
            "forest (README)": [metrics(out / "forest")],
            "forest, our input": [metrics(out / "forest-features")],
        }
    rows["pre-trained, ensemble"] = [metrics(out / "final-ensemble-test")]
    records = "DS2a" if names_in(args.data) - set(DS1) == set(DS2A) else "other records"
    print(table_of(rows))
    draw(rows, records, out / "figures" / "test.png")
    report(args, rows, records)


def metrics(folder) -> dict:
    """The scores that a script wrote into its run folder."""
    return read_json(Path(folder) / "metrics.json")


def mean_of(results, value) -> float:
    """Mean over the seeds of value(result)."""
    return float(np.mean([value(result) for result in results]))


def per_class(results) -> dict:
    """F1 of each class, mean over the seeds."""
    return {c: mean_of(results, lambda result, c=c: result["per_class"][c]["f1"]) for c in CLASSES}


def always_first(result: dict) -> float:
    """Macro-F1 of calling every window the first class."""
    counts = np.array(result["confusion"]).sum(1)
    return float(2 * counts[0] / (counts[0] + counts.sum()) / (counts > 0).sum())


def table_of(rows: dict) -> str:
    """A line per model: macro-F1, accuracy and F1 of each class, means over the seeds."""
    lines = [f"{'test records':26} {'macro-F1':>9} {'accuracy':>9} " + " ".join(f"{c:>6}" for c in CLASSES)]
    for name, results in rows.items():
        f1, accuracy = mean_of(results, lambda r: r["macro_f1"]), mean_of(results, lambda r: r["accuracy"])
        lines.append(
            f"{name:26} {f1:9.3f} {accuracy:9.3f} "
            + " ".join(f"{v:6.3f}" for v in per_class(results).values())
        )
    return "\n".join(lines)


def draw(rows: dict, records: str, path):
    """Macro-F1 of every model, a dot a seed, and the lines that it should pass."""
    figure, axis = new_figure(1, 1, width=8)
    heights = [mean_of(results, lambda r: r["macro_f1"]) for results in rows.values()]
    axis.bar(range(len(rows)), heights, color="#2a6fbb", alpha=0.5)
    for i, results in enumerate(rows.values()):
        axis.plot([i] * len(results), [r["macro_f1"] for r in results], "o", color="#1c2430", ms=4)
    for label, value in STATED.get(records, {}).items():
        axis.axhline(value, color="#d1603d", ls="--", label=f"{label}: {value}")
    axis.axhline(always_first(rows["pre-trained"][0]), color="#5b6770", ls=":", label="always N")
    axis.set_xticks(range(len(rows)), [name.replace(", ", ",\n") for name in rows], fontsize=8)
    axis.set_ylabel(f"macro-F1 of N S V F on {records}")
    axis.legend()
    save_figure(figure, path)


def report(args, rows: dict, records: str):
    """The row of the closing table, with every control."""
    out, ours, best = args.out, rows["pre-trained"], rows["pre-trained, ensemble"][0]
    mean = {name: mean_of(results, lambda r: r["macro_f1"]) for name, results in rows.items()}
    deviation = {
        name: float(np.std([r["macro_f1"] for r in results], ddof=1))
        for name, results in rows.items()
        if len(results) > 1
    }
    spread = f", standard deviation {deviation['pre-trained']:.3f}" if deviation else ""
    reconstruction = out / f"pretrained-{args.seeds[0]}" / "figures" / "reconstruction.png"
    confusion = out / "final-ensemble-test" / "figures" / "confusion.png"
    controls = {name: mean[name] for name in rows if not name.startswith("pre-trained")}
    write_result(
        out.parent,
        f"MIT-BIH beats, {records}",
        "macro-F1 of N S V F",
        mean["pre-trained"],
        controls | STATED.get(records, {}) | {"always N": always_first(best)},
        interval=[mean_of(ours, lambda r, i=i: r["macro_f1_95"][i]) for i in (0, 1)],
        figures=[
            (out / "figures" / "test.png", "macro-F1 on the test records; a dot a seed"),
            (confusion, "test records, ensemble of the seeds"),
            (reconstruction, "pre-training: hidden, reconstructed, original"),
        ],
        note=f"Seeds {', '.join(map(str, args.seeds))}, each pre-trained and fitted on all of DS1{spread}; "
        "the recipe was chosen on folds of DS1 records. The interval is a bootstrap over the test records. "
        f"Ensemble of the seeds: {best['macro_f1']:.3f}.",
        details={
            "seeds": args.seeds,
            "per_seed": {name: [r["macro_f1"] for r in results] for name, results in rows.items()},
            "deviation": deviation,
            "per_class": {name: per_class(results) for name, results in rows.items()},
            "accuracy": {name: mean_of(results, lambda r: r["accuracy"]) for name, results in rows.items()},
            "held-out fold": [metrics(out / f"fold-{s}")["validation"] for s in args.seeds],
        },
    )


def main(args):
    parts = {"train": train, "forest": forest, "score": score}
    parts[args.part](args)


if __name__ == "__main__":
    recipe(main, parse_args())
