"""A UCR set: pre-training on the training series, fine-tuning, random weights, a CNN and 1-NN, over several
seeds.

    python studies/cwt_mae/ucr.py --data ecg200.npz --out runs/cwt_mae/ecg200 --seeds 0 1 2 3 4

Accuracy on the official test part; fixed steps, last weights, nothing is selected.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np

from common.arguments import Parser, number
from common.errors import UserError
from common.files import read_json, reading
from common.intervals import bootstrap
from studies.recipe import ROOT, recipe, size, stage
from studies.summary import write_result

# Published accuracy, and accuracy of 1-NN that the archive states
STATED = {"ecg200": {"1-NN": 0.880, "FCN (published)": 0.889}, "ecg5000": {"1-NN": 0.979}}


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="npz file with x_train, y_train, x_test and y_test"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the runs; results go to the folder above it"
    )
    parser.add_argument(
        "--seeds", type=number(int, 0), nargs="+", default=[0, 1, 2, 3, 4], help="training seeds"
    )
    parser.add_argument(
        "--cache", type=Path, help="folder for the prepared signals; data/cwt_mae/cache without it"
    )
    return parser.parse_args(argv)


def patch_size(points: int) -> int:
    """Width of a patch for series of `points` samples: about 17 patches, and a divisor of the length where
    there is one."""
    fitting = (p for p in range(max(2, points // 24), points // 12 + 1) if points % p == 0)
    return min(fitting, key=lambda p: abs(p - points / 17), default=max(2, points // 17))


def main(args):
    seeds = args.seeds[: size(None, smoke=1)]
    with reading(args.data, "UCR set"), np.load(args.data) as file:
        if "x_train" not in file:
            raise UserError(f"{args.data}: has no field x_train; expected a UCR set")
        points = file["x_train"].shape[1]
    patch = patch_size(points)
    length = -(-points // patch) * patch  # an awkward length is padded, and the padding masked
    common = dict(data=args.data, cache=args.cache, overwrite=True, threads=1)
    windows = dict(common, model_fs=0, low_hz=0, signal_len=length, task="series")

    accuracy = {"pre-trained": [], "random": [], "cnn": []}
    for seed in seeds:
        model = pretrain(common, seed, length, patch, args.out / f"pretrained-{seed}")
        for kind in ("pre-trained", "random"):
            accuracy[kind].append(finetune(common, seed, model, kind, args.out))
        cnn = args.out / f"cnn-{seed}"
        steps = size(200, smoke=5)
        stage("studies/cwt_mae/cnn.py", **windows, seed=seed, max_steps=steps, batch_size=32, out=cnn)
        accuracy["cnn"].append(read_json(cnn / "metrics.json")["accuracy"])
    stage("studies/cwt_mae/forest.py", **windows, kind="nn", out=args.out / "nn")
    report(args, seeds, accuracy)


def pretrain(common: dict, seed: int, length: int, patch: int, out: Path) -> Path:
    """Pre-train on all training series; returns the model's file."""
    sizes = [f"signal_len={length}", f"patch_size_time={patch}"]
    sizes = dict(config=ROOT / "cwt_mae" / "config_small.yaml", set=sizes, model_fs=0, low_hz=0)
    steps = dict(batch_size=64, lr=2e-3, max_steps=size(300, smoke=5), eval_every=0, log_every=100)
    stage("cwt_mae/train.py", **common, **sizes, **steps, seed=seed, windows=640, val_fraction=0, out=out)
    return out / "model.safetensors"


def finetune(common: dict, seed: int, model: Path, kind: str, out: Path) -> float:
    """Fine-tune on all training series, from `model` or ("random") from random weights; returns the test
    accuracy."""
    random = kind == "random"
    start = dict(pretrained=model, random_init=random, layer_decay=1 if random else 0.75)
    head = dict(head="mlp", set=["hidden_dim=32", "num_res_blocks=0", "dropout_rate=0.2"])
    steps = dict(batch_size=32, lr=2e-3, max_steps=size(200, smoke=5), label_smoothing=0.05)
    run = dict(common, task="series", fold=-1, seed=seed, augment=1, jitter=2, out=out / f"{kind}-{seed}")
    stage("cwt_mae/finetune.py", **run, **start, **head, **steps)
    tested = out / f"{kind}-{seed}-test"
    stage("cwt_mae/test.py", **common, model=out / f"{kind}-{seed}" / "model.safetensors", out=tested)
    return read_json(tested / "metrics.json")["accuracy"]


def report(args, seeds: list, accuracy: dict):
    """The row of the closing table. accuracy: {model: one value a seed}."""
    name, out = args.data.stem, args.out
    mean = {kind: float(np.mean(values)) for kind, values in accuracy.items()}
    write_result(
        out.parent,
        f"{name.upper()}, {'binary' if name == 'ecg5000' else 'accuracy'}",
        "accuracy",
        mean["pre-trained"],
        {
            "random weights": mean["random"],
            "small CNN": mean["cnn"],
            "1-NN, computed": read_json(out / "nn" / "metrics.json")["accuracy"],
            **STATED.get(name, {}),
        },
        interval=bootstrap(np.mean, np.array(accuracy["pre-trained"])),
        figures=[
            (out / f"pre-trained-{seeds[0]}-test" / "figures" / "confusion.png", f"{name}, seed {seeds[0]}")
        ],
        note=f"Mean of {len(seeds)} training seeds (pre-training and fine-tuning). The interval is a "
        "bootstrap over the seeds. Fixed steps, last weights, nothing selected.",
        details={"accuracy": accuracy},
    )


if __name__ == "__main__":
    recipe(main, parse_args())
