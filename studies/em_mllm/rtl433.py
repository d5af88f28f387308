"""Real captures: which device, clean and in noise, with few labels and for devices never seen, beside two
classical baselines.

    python em_mllm/convert.py rtl433 .../rtl433_train.npz .../rtl433_test.npz --out data/em_mllm/rtl433
    python em_mllm/pretrain.py --data data/em_mllm/rtl433/train --out runs/em_mllm/rtl433_pretrain \\
        --config studies/em_mllm/rtl433_config.json --spectrum-weight 0.5 --max-steps 200 ...
    python studies/em_mllm/rtl433.py --captures .../rtl433_train.npz .../rtl433_test.npz \\
        --signal-encoder-path runs/em_mllm/rtl433_pretrain/encoder --data data/em_mllm/rtl433 --out runs/r

Training and test captures come from the same sittings with the same receiver: nothing here follows for
another receiver. Unseen devices: the encoder is trained on eight classes; the other four are told apart from
a few captures each by its embeddings.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
from accelerate import Accelerator
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import Subset

from common.arguments import Parser
from common.checkpoint import atomic_csv, atomic_dir, atomic_json
from common.errors import run
from common.figures import new_figure, save_figure
from common.run import open_run, seed_everything
from em_mllm.convert import NOISE_DB, disturb, read_rtl433
from em_mllm.dataset import Augmentation, SignalDataset
from studies.em_mllm.baseline import predict, train_cnn
from studies.em_mllm.fewshot import classify, embed, fit, make_encoder, probe

UNSEEN = ("auriol_z31055", "door_bell", "hyundai_key", "dsc")
EDGES = np.geomspace(10, 20000, 17)  # samples at 250 kHz: 40 us to 80 ms


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument(
        "--captures", type=Path, nargs=2, required=True, metavar=("TRAIN", "TEST"), help="the two npz files"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that convert.py rtl433 wrote")
    parser.add_argument(
        "--signal-encoder-path", type=Path, required=True, help="encoder folder or weight file"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=450,
        help="training steps of encoder and CNN on all captures, a quarter of it on few",
    )
    parser.add_argument("--seeds", type=int, default=1, help="repetitions with other seeds")
    parser.add_argument("--out", type=Path, required=True, help="folder for encoder, metrics and pictures")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in --out")
    return parser.parse_args(argv)


def pulse_features(z) -> np.ndarray:
    """33 numbers: shares of pulse lengths and of gap lengths in 16 logarithmic classes each, and the log of
    the number of pulses."""
    envelope = np.convolve(np.abs(z - z.mean()), np.ones(16) / 16, "same")
    on = envelope > 0.5 * np.percentile(envelope, 99)
    edges = np.nonzero(np.diff(on.astype(int)))[0]
    lengths, first = np.diff(edges), on[edges[0] + 1] if len(edges) else False
    pulses, gaps = (lengths[0::2], lengths[1::2]) if first else (lengths[1::2], lengths[0::2])
    shares = [np.histogram(x.clip(EDGES[0], EDGES[-1]), EDGES)[0] / max(1, len(x)) for x in (pulses, gaps)]
    return np.concatenate([*shares, [np.log1p(len(pulses))]])


def pulse_regression(train, test, augmented: bool, rng) -> dict:
    """Accuracy in each condition of a logistic regression on pulse_features, trained on clean captures or on
    disturbed copies too."""
    signals, labels = list(train["iq"]), list(train["y"])
    if augmented:
        for _ in range(8):
            signals += [
                disturb(z, train["fs"], rng, rng.uniform(-10, 30), rng.uniform(-25e3, 25e3))
                for z in train["iq"]
            ]
            labels += list(train["y"])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=500)).fit(
        [pulse_features(z) for z in signals], labels
    )
    return {
        noise: float(
            np.mean(
                model.predict([pulse_features(disturb(z, test["fs"], rng, noise)) for z in test["iq"]])
                == test["y"]
            )
        )
        for noise in (None, *NOISE_DB)
    }


def learn(args, train, rows, classes, steps, seed, device) -> dict:
    """The encoder from both starts and the CNN, trained on `rows`: {name: function from a data set to
    classes}, pre-trained encoder."""
    models = {
        "encoder, pre-trained": fit(
            args.signal_encoder_path, True, seed, train, rows, classes, steps, 1e-3, device
        ),
        "encoder, random start": fit(
            args.signal_encoder_path, False, seed + 1, train, rows, classes, steps, 1e-3, device
        ),
    }
    cnn = train_cnn(Subset(train, rows.tolist()), classes, steps, 32, 3e-3, Accelerator(), seed)
    answers = {
        name: lambda data, model=model: classify(model, data, shifts=4) for name, model in models.items()
    }
    return answers | {"CNN": lambda data: predict(cnn, data, device).argmax(1)}, models[
        "encoder, pre-trained"
    ].sit


def by_condition(answer, data: Path) -> dict:
    """{condition: accuracy} of `answer`(data set) -> classes over every test folder."""
    out = {}
    for folder in sorted((data / "test").iterdir()):
        test = SignalDataset([folder / "device.h5"], ("label",))
        out[folder.name] = float(np.mean(answer(test) == test.columns["label"]))
    return out


def unseen_devices(args, train, names, capture, device, draws=10) -> dict:
    """Accuracy among the four UNSEEN classes from 1 and 2 captures each: {(encoder, shots): mean over draws}.

    The encoders: random, pre-trained by masking on all training captures without labels, and trained with
    labels on the other classes. capture: which capture each row of `train` is a copy of. Shots and test items
    are different captures; every one is seen in all copies.
    """
    label = train.columns["label"].astype(int)
    unseen = np.isin(np.array(names)[label], UNSEEN)
    known, rows = np.nonzero(~unseen)[0], np.nonzero(unseen)[0]
    encoders = {
        "random": make_encoder(args.signal_encoder_path, args.seed + 1),
        "masked pre-training": make_encoder(args.signal_encoder_path),
        "labels of the other devices": fit(
            args.signal_encoder_path, True, 0, train, known, len(names), args.steps // 2, 1e-3, device
        ).sit,
    }
    target, group = label[rows], capture[rows]
    out = {}
    for name, encoder in encoders.items():
        x = embed(encoder, Subset(train, rows.tolist()), device)
        for shots in (1, 2):
            hits = []
            for draw in range(draws):
                rng = np.random.default_rng((args.seed, draw))
                chosen = np.concatenate(
                    [
                        rng.choice(np.unique(group[target == c]), shots, replace=False)
                        for c in np.unique(target)
                    ]
                )
                shown = np.isin(group, chosen)
                hits.append(np.mean(probe(x[shown], target[shown], x[~shown]) == target[~shown]))
            out[f"{name}, {shots} captures"] = float(np.mean(hits))
    return out


def draw(conditions, count, chance, folder):
    """Accuracy of every method against the noise, and the numbers in a .csv."""
    figure, axis = new_figure()
    levels = ["clean", *(f"{n}dB" for n in NOISE_DB)]
    for name, scores in conditions.items():
        axis.plot(levels, [scores[k] for k in levels], marker="o", label=name)
    axis.axhline(chance, color="0.6", ls="--", lw=1)
    title = f"12 devices, {count} captures; dashed: largest class"
    axis.set(xlabel="noise below burst power", ylabel="accuracy", ylim=(0, 1.02), title=title)
    axis.legend(fontsize=8)
    save_figure(figure, folder / "devices.png")
    rows = [{"method": name, **{k: scores[k] for k in levels}} for name, scores in conditions.items()]
    atomic_csv(folder / "devices.csv", rows)


def main(args):
    accelerator = Accelerator()
    device = accelerator.device
    train_captures = read_rtl433(args.captures[0])
    test_captures = read_rtl433(args.captures[1], train_captures)
    train = SignalDataset(
        [args.data / "train" / "device.h5"], ("label",), seed=args.seed, augmentation=Augmentation(roll=True)
    )
    names = train.files[0].classes
    everything = np.arange(len(train))
    capture = everything % len(train_captures["y"])  # copies of all captures follow one another in the file
    open_run(args.out, args, accelerator, overwrite=args.overwrite)
    conditions, few = {}, {}  # {method: [{condition: accuracy}, one per seed]}
    for seed in range(args.seed, args.seed + args.seeds):
        seed_everything(seed)
        answers, encoder = learn(args, train, everything, len(names), args.steps, seed, device)
        if seed == args.seed:  # for the joint training
            encoder.config.signal = train.signal.to_json()
            with atomic_dir(args.out / "encoder") as folder:
                encoder.save_pretrained(folder)
        for name, answer in answers.items():
            conditions.setdefault(name, []).append(by_condition(answer, args.data))
            print(
                f"seed {seed}, {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in conditions[name][-1].items())
            )
        for shots in (1, 3):  # captures per device, each with all its copies
            rng = np.random.default_rng((seed, shots))
            chosen = np.concatenate(
                [
                    rng.choice(np.nonzero(train_captures["y"] == c)[0], shots, replace=False)
                    for c in range(len(names))
                ]
            )
            rows = everything[np.isin(capture, chosen)]
            answers, _ = learn(args, train, rows, len(names), args.steps // 4, seed, device)
            for name, answer in answers.items():
                few.setdefault(f"{name}, {shots} captures", []).append(by_condition(answer, args.data))
    mean = lambda runs: {k: float(np.mean([r[k] for r in runs])) for k in runs[0]}
    seeds, conditions = conditions, {name: mean(runs) for name, runs in conditions.items()}
    rng = np.random.default_rng(args.seed)
    for name, augmented in (
        ("pulse lengths, clean training", False),
        ("pulse lengths, disturbed training", True),
    ):
        scores = pulse_regression(train_captures, test_captures, augmented, rng)
        conditions[name] = {("clean" if k is None else f"{k}dB"): v for k, v in scores.items()}
    metrics = {
        "count": len(test_captures["y"]),
        "chance": float(np.bincount(test_captures["y"]).max() / len(test_captures["y"])),
        "conditions": conditions,
        "seeds": seeds,
        "few_captures": {name: mean(runs) for name, runs in few.items()},
        "unseen_devices": unseen_devices(args, train, names, capture, device),
    }
    atomic_json(args.out / "metrics.json", metrics)
    draw(conditions, metrics["count"], metrics["chance"], args.out / "figures")
    for part in ("conditions", "few_captures"):
        for name, scores in metrics[part].items():
            print(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
    print("unseen devices: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics["unseen_devices"].items()))


if __name__ == "__main__":
    run(main, parse_args())
