"""What pre-training is worth at few labels: accuracy against labels per class, with and without it, and
beside a CNN. Embeddings to a file.

    python studies/em_mllm/fewshot.py --train train/modulation.h5 --test test/modulation.h5 \\
        --signal-encoder-path runs/em_mllm/pretrain/encoder --out runs/em_mllm/fewshot
    python studies/em_mllm/fewshot.py --embed embeddings.h5 --test data/em_mllm/test/modulation.h5 \\
        --signal-encoder-path runs/em_mllm/pretrain/encoder

probe: ridge regression on [cls, mean, spread] of the frozen encoder's normalised output, its strength chosen
by leave-one-out error inside the shots. finetune: the whole encoder. Every draw takes other shots and, for
the random encoder, other weights.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import h5py
import numpy as np
import torch
from accelerate import Accelerator
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader, Subset

from common.arguments import Parser, refuse
from common.checkpoint import atomic_csv, atomic_json, atomic_path
from common.errors import UserError, run
from common.figures import new_figure, save_figure
from common.run import open_run, progress, seed_everything
from common.train import lr_at
from em_mllm.dataset import SignalCollator, SignalDataset, encoder_inputs
from em_mllm.em_foundation.models import SiTMAEForClassification, SiTMAEModelWithoutMask
from em_mllm.em_foundation.utils.utils import load_encoder, read_config, signal_of
from em_mllm.optim import make_optimizers
from em_mllm.scores import HIGH_SNR_DB
from studies.em_mllm import short
from studies.em_mllm.baseline import predict, train_cnn

METHODS = ("probe", "finetune", "cnn")


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--train", type=Path, help=".h5 with label")
    parser.add_argument("--test", type=Path, required=True, help=".h5 with label")
    parser.add_argument(
        "--signal-encoder-path", type=Path, required=True, help="encoder folder or weight file"
    )
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5, 10, 50, 100], help="labels per class")
    parser.add_argument("--draws", type=int, default=3, help="repetitions with other shots")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["probe", "cnn"],
        help="default probe cnn; finetune takes longest",
    )
    parser.add_argument("--steps", type=int, default=120, help="steps of finetune and cnn")
    parser.add_argument("--finetune-lr", type=float, default=5e-4, help="peak rate of finetune")
    parser.add_argument(
        "--embed", type=Path, help="write cls, mean and spread vectors of --test to this .h5 and stop"
    )
    parser.add_argument("--out", type=Path, help="folder for metrics and the curve")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in --out")
    return parser.parse_args(argv)


def make_encoder(path, random_seed=None):
    """The pre-trained encoder, or one of its sizes with random weights of that seed."""
    encoder = SiTMAEModelWithoutMask(read_config(path, attention_type="sdpa"))
    if random_seed is None:
        load_encoder(encoder, path, quiet=True)
    else:
        torch.manual_seed(random_seed)
        encoder = SiTMAEModelWithoutMask(encoder.config)
    return encoder.eval()


@torch.no_grad()
def embed(encoder, data, device, batch_size=64) -> np.ndarray:
    """(N, 3 D): cls, mean and standard deviation over the IQ tokens of the normalised output."""
    encoder.to(device)
    out, special = [], encoder.config.num_special
    for batch in DataLoader(data, batch_size, collate_fn=SignalCollator(encoder.config)):
        inputs = encoder_inputs(batch, device)
        h = encoder(**inputs).last_hidden_state
        valid = (inputs["sample_ids_seq"] >= 0)[:, special:, None]
        count = valid.sum(1)
        mean = (h[:, special:] * valid).sum(1) / count
        spread = (((h[:, special:] - mean[:, None]) ** 2 * valid).sum(1) / count).sqrt()
        out.append(torch.cat([h[:, 0], mean, spread], 1).cpu())
    return torch.cat(out).numpy()


def probe(x, y, test_x):
    """Ridge regression to the classes; its strength is chosen by leave-one-out error inside the shots."""
    return make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(0, 4, 9))).fit(x, y).predict(test_x)


def fit(encoder_path, pretrained: bool, seed, data, rows, classes, steps, lr, device, batch_size=32):
    """Encoder and linear head, trained for `steps` steps on `rows` of `data`; pretrained False takes the
    encoder's sizes alone."""
    torch.manual_seed(seed)
    model = SiTMAEForClassification(read_config(encoder_path, attention_type="sdpa", num_labels=classes))
    if pretrained:
        load_encoder(model, encoder_path, quiet=True)
    torch.nn.init.zeros_(model.classifier.weight)  # as finetune.py
    model.to(device).train()
    collate, rng = SignalCollator(model.config), np.random.default_rng(seed)
    optimizers = make_optimizers(model, "muon", lr, 0.05)
    for step in range(steps):
        data.set_epoch(step)  # what it draws at random, it draws anew
        batch = collate([data[i] for i in rng.choice(rows, min(batch_size, len(rows)), replace=False)])
        loss = model(**encoder_inputs(batch, device), labels=batch["label"].long().to(device)).loss
        short.step(model, optimizers, loss, lr_at(step, steps, 0.1), clip=1.0)
    return model.eval()


@torch.no_grad()
def classify(model, data, shifts=1, batch_size=64) -> np.ndarray:
    """Predicted class of every signal.

    shifts: the logits are means over this many circular shifts of the signal inside a patch. Captures begin
    anywhere, and the grid of patches, unlike a convolution, does not move with them.
    """
    collate, patch, classes = SignalCollator(model.config), model.config.patch_size[0], []
    for start in range(0, len(data), batch_size):
        items, logits = [data[i] for i in range(start, min(start + batch_size, len(data)))], 0.0
        for k in range(shifts):
            batch = collate([{**item, "iq": np.roll(item["iq"], k * patch // shifts, 0)} for item in items])
            inputs = encoder_inputs(batch, model.device)
            logits = logits + model.per_signal(
                model(**inputs).logits, inputs["patch_positions"], inputs["sample_ids_seq"]
            )
        classes.append(logits.argmax(-1).cpu())
    return torch.cat(classes).numpy()


def draw_shots(label, count: int, seed) -> np.ndarray:
    """Rows of `count` random signals of each class of `label`, without repetition."""
    rng = np.random.default_rng(seed)
    classes = range(label.max() + 1)
    return np.concatenate([rng.choice(np.nonzero(label == c)[0], count, replace=False) for c in classes])


def write_embeddings(args, test, device):
    """Write the embeddings of the test signals to --embed."""
    with atomic_path(args.embed) as temporary, h5py.File(temporary, "w") as file:
        file["embedding"] = embed(make_encoder(args.signal_encoder_path), test, device)
        file["label"] = test.columns["label"]
        file.attrs["columns"] = "cls, mean, standard deviation of the normalised encoder output, equally wide"
    print(f"{args.embed}: {len(test)} embeddings")


def compare(args, train, test, shots, device) -> dict:
    """Train every method from every number of shots; returns {method: {shots: [predictions of each draw]}}.

    Every draw takes other shots and, for the random encoder, other weights.
    """
    label = train.columns["label"].astype(int)
    classes = int(label.max()) + 1

    # the encoders and their view of the test signals: one pre-trained, one random for each draw
    encoders = {}
    if "probe" in args.methods:
        start = make_encoder(args.signal_encoder_path)
        encoders["pre-trained"] = [(start, embed(start, test, device))] * args.draws
        starts = [make_encoder(args.signal_encoder_path, args.seed + draw + 1) for draw in range(args.draws)]
        encoders["random"] = [(start, embed(start, test, device)) for start in starts]

    answers = {}
    for count in shots:
        for draw in progress(range(args.draws), desc=f"{count} per class"):
            rows = draw_shots(label, count, (args.seed, count, draw))
            shown = Subset(train, rows.tolist())
            guesses = {}
            for kind, ready in encoders.items():
                encoder, test_x = ready[draw]
                guesses[f"probe, {kind}"] = probe(embed(encoder, shown, device), label[rows], test_x)
            if "finetune" in args.methods:
                for kind, seed in (("pre-trained", 0), ("random", args.seed + draw + 1)):
                    how = (seed, train, rows, classes, args.steps, args.finetune_lr, device)
                    tuned = fit(args.signal_encoder_path, kind == "pre-trained", *how)
                    guesses[f"finetune, {kind}"] = classify(tuned, test)
            if "cnn" in args.methods:
                model = train_cnn(shown, classes, args.steps, 64, 3e-3, Accelerator(), args.seed + draw)
                guesses["CNN from scratch"] = predict(model, test, device).argmax(1)
            for name, guess in guesses.items():
                answers.setdefault(name, {}).setdefault(count, []).append(guess)
    return answers


def summarise(answers: dict, test) -> dict:
    """{method: {shots: accuracy, spread over the draws, accuracy at high SNR}} of what `compare` returned."""
    label, high = test.columns["label"].astype(int), test.columns["snr"] >= HIGH_SNR_DB
    summary = {}
    for name, curve in answers.items():
        for count, guesses in curve.items():
            hits = np.stack(guesses) == label  # (draws, signals)
            summary.setdefault(name, {})[count] = {
                "accuracy": float(hits.mean()),
                "spread": float(hits.mean(1).std()),
                "accuracy_high_snr": float(hits[:, high].mean()) if high.any() else None,
            }
    return summary


def draw_curves(summary, shots, chance: float, title: str, path: Path):
    """Accuracy against labels per class, and the numbers in a .csv beside the picture."""
    figure, axis = new_figure()
    rows = []
    for name, curve in summary.items():
        values, spread = [v["accuracy"] for v in curve.values()], [v["spread"] for v in curve.values()]
        axis.errorbar(list(curve), values, spread, marker="o", capsize=2, label=name)
        rows += [{"method": name, "labels_per_class": count, **value} for count, value in curve.items()]
    axis.axhline(chance, color="0.6", ls="--", lw=1)
    axis.set(xscale="log", xlabel="labels per class", ylabel="accuracy", title=title)
    axis.set_xticks(shots, shots)
    axis.minorticks_off()
    axis.legend(fontsize=8)
    save_figure(figure, path)
    atomic_csv(path.with_suffix(".csv"), rows)


def main(args):
    accelerator = Accelerator()
    seed_everything(args.seed)
    learned = signal_of(args.signal_encoder_path)
    test = SignalDataset([args.test], ("label", "snr"), learned=learned)
    if args.embed:
        refuse(args, ["train", "out", "shots", "draws", "methods", "steps", "finetune_lr"], "beside --embed")
        write_embeddings(args, test, accelerator.device)
        return
    if args.train is None or args.out is None:
        raise UserError("give --train and --out, or --embed to write embeddings alone")
    if not {"finetune", "cnn"} & set(args.methods):
        refuse(args, ["steps"], "without the methods finetune and cnn")
    if "finetune" not in args.methods:
        refuse(args, ["finetune_lr"], "without the method finetune")

    # as many shots as the rarest class allows
    train = SignalDataset([args.train], ("label", "snr"), learned=learned)
    most = int(np.bincount(train.columns["label"].astype(int)).min())
    shots = [count for count in args.shots if count <= most]
    if not shots:
        raise UserError(
            f"{args.train}: the rarest class has {most} signals, fewer than the smallest of --shots"
        )
    open_run(args.out, args, accelerator, overwrite=args.overwrite)

    # every method at every number of shots
    summary = summarise(compare(args, train, test, shots, accelerator.device), test)
    chance = 1 / (int(train.columns["label"].max()) + 1)
    atomic_json(args.out / "metrics.json", {"chance": chance, "curves": summary})
    title = f"{args.test.stem}, {args.draws} draws; dashed: chance"
    draw_curves(summary, shots, chance, title, args.out / "figures" / "fewshot.png")
    for name, curve in summary.items():
        print(f"{name}: " + ", ".join(f"{count}: {v['accuracy']:.3f}" for count, v in curve.items()))


if __name__ == "__main__":
    run(main, parse_args())
