"""Label efficiency: what a pre-trained encoder is worth when few windows have a label (built-in rhythms).

    python studies/cwt_mae/labels.py --out runs/cwt_mae/labels

Three ways to use the encoder, each with pre-trained and with random weights, on 1, 2, 5, 10, 50 and 100 % of
the training labels, at least one of each class:

    linear   a logistic regression on the mean and the deviation of the frozen tokens
    frozen   the head of finetune.py on the frozen encoder
    full     the same with the encoder trained too

Each number is the macro-F1 on the test subjects after a fixed number of steps: nothing is selected. Every
seed draws its own labels and its own random weights.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch

from common.arguments import Parser, number
from common.checkpoint import atomic_json
from common.figures import new_figure, save_figure
from common.files import read_json
from cwt_mae import finetune, test
from cwt_mae.dataset import Preprocess, build_store
from cwt_mae.dataset_finetune import DownstreamClassificationDataset, load_task, share_of, split_parts
from cwt_mae.metrics import confusion, linear_probe, macro_f1
from cwt_mae.model import CWT_MAE_RoPE
from cwt_mae.model_finetune import load_model
from cwt_mae.validation import probe_features
from studies.cwt_mae.builtin import draw_records, pretrain
from studies.recipe import options, recipe, size
from studies.summary import write_result

SHARES = (0.01, 0.02, 0.05, 0.1, 0.5, 1.0)
WEIGHTS = ("pre-trained", "random")
COLOURS = {"linear": "#2a6fbb", "frozen": "#d1603d", "full": "#3a8f5d"}


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the runs; results go to the folder above it"
    )
    parser.add_argument(
        "--model", type=Path, help="pre-trained model of builtin.py; one is trained without it"
    )
    parser.add_argument("--seeds", type=number(int, 1), default=2, help="how often labels are drawn")
    return parser.parse_args(argv)


def probes(model_path, labelled: dict, seeds) -> dict:
    """{weights: macro-F1 (seeds, shares)} of the linear probe."""
    trained = load_model(model_path)
    store = build_store([labelled["data"]], Preprocess(**trained.config["preprocess"]))
    task, parts = load_task(store, "rhythm", trained.signal_len), split_parts(store, labelled["split"])
    own = parts[task.items["record"]]
    train, scored = (task.select(own == part) for part in ("train", "test"))

    def one(weights: str, seed: int) -> list[float]:
        model = trained
        if weights == "random":
            torch.manual_seed(seed)
            model = CWT_MAE_RoPE(**trained.config)
        sets = (DownstreamClassificationDataset(store, part, model.signal_len) for part in (train, scored))
        x, test_x = (probe_features(model, part, "cpu") for part in sets)
        found = []
        for share in SHARES:
            chosen = share_of(train, share, seed, store.recordings(train.items))
            guess = linear_probe(x[chosen], train.items["label"][chosen], test_x).argmax(1)
            found.append(macro_f1(confusion(scored.items["label"], guess, len(task.classes))))
        return found

    return {weights: np.array([one(weights, seed) for seed in seeds]) for weights in WEIGHTS}


def tuned(model_path, labelled: dict, out: Path, way: str, weights: str, share: float, seed: int) -> float:
    """Macro-F1 of a head on the frozen encoder ("frozen"), or of head and encoder trained together ("full"),
    with a share of the labels."""
    common = dict(labelled, overwrite=True)
    run, random = out / f"{way}-{weights}-{share:g}-{seed}", weights == "random"
    start = dict(pretrained=model_path, random_init=random, freeze=way == "frozen")
    if way == "full":
        start["layer_decay"] = 1 if random else 0.75
    steps = dict(lr=1e-3, sampling_power=0.5, augment=1, max_steps=size(150, smoke=2), save_every=0)
    train = dict(start, **steps, task="rhythm", label_share=share, fold=-1, seed=seed, out=run)
    finetune.main(finetune.parse_args(options(common | train)))
    score = dict(model=run / "model.safetensors", resamples=0, out=run / "test")
    test.main(test.parse_args(options(common | score)))
    return read_json(run / "test" / "metrics.json")["macro_f1"]


def draw(rows: dict, path):
    """A curve for each row: the mean over the seeds, and their range. rows: {(way, weights): (seeds,
    shares)}."""
    figure, axis = new_figure(1, 1, width=7)
    for (way, weights), values in rows.items():
        line = "-" if weights == "pre-trained" else ":"
        axis.plot(
            SHARES, values.mean(0), line, marker="o", ms=3, color=COLOURS[way], label=f"{way}, {weights}"
        )
        axis.fill_between(SHARES, values.min(0), values.max(0), color=COLOURS[way], alpha=0.1, lw=0)
    axis.set_xscale("log")
    axis.set_xticks(SHARES, [f"{100 * share:g} %" for share in SHARES])
    axis.set_xlabel("labels of the training subjects")
    axis.set_ylabel("macro-F1 on the test subjects")
    axis.legend(fontsize=8)
    save_figure(figure, path)


def main(args):
    data, labelled = draw_records()
    model = args.model or pretrain(data, labelled["split"], args.out / "base")

    # Every way with both weights; {(way, weights): macro-F1 (seeds, shares)}
    seeds = range(size(args.seeds, smoke=1))
    rows = {("linear", weights): found for weights, found in probes(model, labelled, seeds).items()}
    for way in ("frozen", "full"):
        for weights in WEIGHTS:
            score = lambda share, seed, way=way, weights=weights: tuned(
                model, labelled, args.out, way, weights, share, seed
            )
            rows[way, weights] = np.array([[score(share, seed) for share in SHARES] for seed in seeds])

    # Means over the seeds
    print(f"{'macro-F1':22}" + "".join(f"{100 * share:>7g}%" for share in SHARES))
    for (way, weights), values in rows.items():
        print(f"{way + ', ' + weights:22}" + "".join(f"{value:8.3f}" for value in values.mean(0)))
    draw(rows, args.out / "figures" / "labels.png")
    table = {f"{way}, {weights}": values.tolist() for (way, weights), values in rows.items()}
    atomic_json(args.out / "metrics.json", {"shares": SHARES, "macro_f1": table})
    tenth = {", ".join(key): values.mean(0)[SHARES.index(0.1)] for key, values in rows.items()}
    write_result(
        args.out.parent,
        "built-in rhythms, a tenth of the labels",
        "macro-F1 of the linear probe",
        tenth.pop("linear, pre-trained"),
        tenth,
        figures=[(args.out / "figures" / "labels.png", "macro-F1 by the share of the labels")],
        note=f"Means of {len(seeds)} draws of the labels; subjects that no training saw.",
        details=table,
    )


if __name__ == "__main__":
    recipe(main, parse_args())
