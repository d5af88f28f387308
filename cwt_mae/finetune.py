r"""Fine-tune a pre-trained CWT-MAE encoder to classify windows: heart beats, rhythms, or whole series.

    python cwt_mae/finetune.py --pretrained runs/cwt_mae/base/model.safetensors --data FOLDER --task beat \
        --out runs/cwt_mae/beat

Records are split by subject into training, validation (one of --folds parts of the training records) and
test. The test records are never looked at here: the checkpoint and the correction of the class frequencies
are chosen on validation.

Upstream file: finetune.py (layer-wise learning rates, mixup, label smoothing). README.md lists the
differences.
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from common.arguments import Parser, add_run_arguments, number, refuse
from common.checkpoint import atomic_json
from common.errors import UserError, run
from common.files import read_json
from common.run import describe, open_run, seed_everything
from common.sharding import refuse_sharding
from common.together import from_main
from common.train import (
    batches,
    check_finite,
    finish,
    finish_step,
    lr_at,
    make_accelerator,
    make_loader,
    plan_steps,
    start,
    update,
    watched,
)
from cwt_mae.config import parse_changes, shape_of
from cwt_mae.dataset import Preprocess, read_store
from cwt_mae.dataset_finetune import (
    RHYTHM,
    DownstreamClassificationDataset,
    fold_of,
    load_task,
    median_beats,
    share_of,
    split_parts,
    training_part,
)
from cwt_mae.layouts import add_file_arguments, add_split_argument
from cwt_mae.metrics import describe_label_scores, describe_scores, label_scores, scores
from cwt_mae.model_finetune import ENCODER_ARGS, TF_MAE_Classifier, read_model, save_model
from cwt_mae.validation import only_padded

# Sizes of the two heads that --set may change
COT_SIZES = ("num_reasoning_tokens",)
MLP_SIZES = ("hidden_dim", "num_res_blocks", "dropout_rate")
ALL_SIZES = shape_of(TF_MAE_Classifier)
HEAD_SHAPE = {name: ALL_SIZES[name] for name in (*COT_SIZES, *MLP_SIZES, "input_dropout")}
# How much of the drawn class frequencies validation may undo: none ... all
TAUS = (0.0, 0.25, 0.5, 0.75, 1.0)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_data_arguments(parser)
    add_model_arguments(parser)
    add_loss_arguments(parser)

    # Upstream's values but for the length: it trains 30 epochs, but a pass over a small set is very little.
    defaults = dict(batch_size=32, lr=1e-4, weight_decay=0.05, clip=3.0, seed=42, epochs=30.0, max_steps=1000)
    add_run_arguments(parser, **defaults, log_every=50, save_every=500, eval_every=500)

    # Which weights end up in model.safetensors.
    selection = parser.add_argument_group("selection")
    which = "weights to keep: best on validation, or last"
    selection.add_argument("--select", choices=("best", "last"), default="best", help=which)
    return parser.parse_args(argv)


def add_data_arguments(parser: argparse.ArgumentParser):
    """Options that say which windows there are and which of them train."""
    data = parser.add_argument_group("data")
    data.add_argument("--data", "--data-root", nargs="+", required=True, help="labelled files or folders")

    # The task says what a window is; the split, which windows may train.
    data.add_argument(
        "--task",
        choices=("beat", "rhythm", "series", "labels"),
        required=True,
        help="what has a label: a heart beat, a stretch of one rhythm, a record (labels: any number of them)",
    )
    data.add_argument("--level", default="", help="labels: their level, such as superdiagnostic of PTB-XL")
    add_split_argument(data)

    # The validation part is a fold of the training subjects, so that the test part stays unseen.
    data.add_argument(
        "--folds", type=number(int, 2), default=4, help="parts of the training subjects; one validates"
    )
    data.add_argument(
        "--fold", type=number(int, -1), default=0, help="which part validates; -1: none, train on all"
    )
    data.add_argument(
        "--label-share",
        type=number(float, 0, 1),
        default=1.0,
        help="train on this share of the labels alone, drawn by --seed, at least one of each class",
    )

    # How files are read; the preparation of the signals comes with the pre-trained model.
    add_file_arguments(data)


def add_model_arguments(parser: argparse.ArgumentParser):
    """Options of the encoder and of the head on it."""
    # The encoder: where it comes from, and whether it is trained.
    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained",
        "--pretrained-path",
        required=True,
        help="model.safetensors of train.py, or an upstream checkpoint; its configuration is used",
    )
    model.add_argument(
        "--random-init", action="store_true", help="use the sizes of --pretrained with random weights"
    )

    # A window of another length than in pre-training is possible: the position table is interpolated.
    model.add_argument(
        "--signal-len", type=number(int, 0), default=0, help="window, samples; 0: as pre-trained"
    )
    model.add_argument("--freeze", action="store_true", help="train the head alone")

    # The head: upstream's two, chosen on the command line.
    model.add_argument(
        "--head",
        choices=("cot", "mlp"),
        default="cot",
        help="cot: reasoning tokens that attend to the patches; mlp: residual MLP on the mean of the patches",
    )
    model.add_argument(
        "--center-columns",
        type=number(int, 0),
        default=0,
        help="mlp head: join this many time columns around the middle; 0: the mean of all",
    )
    model.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="sizes of the head: num_reasoning_tokens=8 (cot), hidden_dim=512, num_res_blocks=2, "
        "dropout_rate=0 (mlp), input_dropout=0",
    )

    # What the head of a beat classifier is given beside the tokens.
    model.add_argument(
        "--features",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="beats: give the head numbers about the rhythm around the beat",
    )
    model.add_argument(
        "--amplitude", action="store_true", help="beats: and about its height, width and shape in its record"
    )
    model.add_argument(
        "--hierarchy",
        action="store_true",
        help="beats: the rhythm alone tells S from N, everything tells V and F from both",
    )
    model.add_argument(
        "--compare",
        action="store_true",
        help="with --freeze, --center-columns: subtract the record's median tokens",
    )


def add_loss_arguments(parser: argparse.ArgumentParser):
    """Options of the loss, the learning rates, the sampling and the augmentation."""
    # Learning rates and loss; upstream: constant after the warm-up, decay 0.65, smoothing 0.1.
    optim = parser.add_argument_group("loss and sampling")
    optim.add_argument(
        "--schedule", choices=("cosine", "constant"), default="cosine", help="learning rate after the warm-up"
    )
    optim.add_argument(
        "--layer-decay",
        type=number(float, 0, 1),
        default=0.65,
        help="learning rate of a block over the next one's",
    )
    optim.add_argument(
        "--label-smoothing", type=number(float, 0, 1), default=0.1, help="share of the target for all classes"
    )

    # Two ways to treat rare classes: in the loss, or by drawing them more often (--sampling-power).
    optim.add_argument(
        "--class-weights", action="store_true", help="weigh the loss by the inverse of the class frequency"
    )

    # All of it is off by default: what helps depends on the sensor.
    augmentation = add_drawing_arguments(parser)
    augmentation.add_argument(
        "--mixup",
        type=number(float, 0),
        default=0.0,
        help="a of Beta(a, a), which blends two windows (upstream: 0.2)",
    )
    augmentation.add_argument(
        "--flip", action="store_true", help="with --augment: turn half of the windows over (PPG, not ECG)"
    )


def add_drawing_arguments(parser: argparse.ArgumentParser, augment: float = 0.0, jitter: int = 0):
    """Options of how windows are drawn and changed in training; returns their group."""
    group = parser.add_argument_group("sampling and augmentation")
    group.add_argument(
        "--sampling-power",
        type=number(float, 0, 1),
        default=1.0,
        help="a class is drawn in proportion to its count to this power: 1 as it is, 0 balanced",
    )

    # What may change about a window without changing its class.
    group.add_argument(
        "--augment",
        type=number(float, 0),
        default=augment,
        help="strength of gain, baseline drift and noise; 1: up to 20 %%, 15 %% and 8 %%",
    )
    group.add_argument(
        "--jitter", type=number(int, 0), default=jitter, help="largest shift of a window, samples"
    )

    # Few patients are in atrial fibrillation, where an early normal beat is normal.
    group.add_argument(
        "--fibrillation",
        type=number(float, 0, 1),
        default=0.0,
        help="beats: share of the windows but S that get the rhythm features of simulated fibrillation",
    )
    return group


def check_options(args, head_sizes: dict):
    """Refuse options that contradict each other or have no effect in this mode."""
    if args.compare and not args.freeze:
        raise UserError(
            "--compare needs --freeze: the median tokens are those of the encoder before the training"
        )
    if args.fold >= args.folds:
        raise UserError(f"--fold {args.fold}: there are --folds {args.folds}, numbered from 0")

    # What would silently do nothing
    for holds, names, where in (
        (args.fold < 0, "folds select eval_every", "without a validation part (--fold -1)"),
        (args.task != "beat", "features fibrillation amplitude hierarchy", f"for --task {args.task}"),
        (args.task == "labels", "class_weights sampling_power label_smoothing mixup", "for --task labels"),
        (args.task != "labels", "level", f"for --task {args.task}"),
        (not args.features, "fibrillation amplitude hierarchy", "with --no-features"),
        (args.freeze, "layer_decay", "with --freeze"),
        (not args.augment, "flip", "without --augment"),
        (args.head == "cot", "center_columns", "with --head cot"),
    ):
        if holds:
            refuse(args, names.split(), where)
    for name in MLP_SIZES if args.head == "cot" else COT_SIZES:
        if name in head_sizes:
            raise UserError(f"--set {name} has no effect with --head {args.head}; leave it out")


def layer_groups(model, lr: float, decay: float, weight_decay: float) -> list[dict]:
    """AdamW groups whose peak learning rate falls by `decay` from layer to layer: `lr` in the head and the
    last norm, lowest in the patch embedding. Biases, norms, tokens and positions are not decayed (upstream:
    all of them are)."""
    depth, groups = len(model.encoder_model.blocks), {}
    for name, parameter in model.named_parameters():
        # Frozen parameters are in no group.
        if not parameter.requires_grad:
            continue

        # Levels from the input: 0 patch embedding, tokens and positions; i + 1 block i; depth + 1 the rest.
        level = depth + 1
        if name.startswith("encoder_model.blocks."):
            level = int(name.split(".")[2]) + 1
        elif name.startswith("encoder_model.") and not name.startswith("encoder_model.norm"):
            level = 0

        # Weight decay pulls towards 0, which is no natural place for gains, tokens and positions.
        decayed = not (parameter.ndim < 2 or "pos_embed" in name or "token" in name)
        rate = lr * decay ** (depth + 1 - level)
        group = {"params": [], "lr": rate, "peak": rate, "weight_decay": weight_decay if decayed else 0.0}
        groups.setdefault((level, decayed), group)["params"].append(parameter)
    return list(groups.values())


def loss_of(logits, batch, smoothing: float, weights):
    """Mean cross-entropy over the batch with label smoothing, blended where the windows are, weighed by class
    (C,) or None."""

    # Several labels may apply: a yes or no for each, the same weight for all of them.
    if batch["label"].ndim == 2:
        return F.binary_cross_entropy_with_logits(logits.float(), batch["label"])

    def one(labels):
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing, reduction="none")
        return loss if weights is None else loss * weights[labels]

    # Mixup: the loss is blended as the windows were; upstream blends every batch.
    if "blend" not in batch:
        return one(batch["label"]).mean()
    return (batch["blend"] * one(batch["label"]) + (1 - batch["blend"]) * one(batch["label2"])).mean()


def class_weights(counts: np.ndarray) -> torch.Tensor:
    """Weights (C,) of the loss in inverse proportion to the class counts; their mean over the windows is
    1."""
    # A class without windows gets 0 instead of an infinite weight.
    weights = np.where(counts > 0, counts.sum() / np.maximum(counts, 1) / (counts > 0).sum(), 0.0)
    return torch.tensor(weights, dtype=torch.float32)


def prior_shift(drawn_prior: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Logarithm (C,) of how much more often a class was drawn in training than it occurs; 0 for a class that
    is absent."""
    # A model that saw a class twice as often as it occurs gives it log 2 too much in the logits.
    prior = counts / counts.sum()
    return np.where(counts > 0, np.log(np.maximum(drawn_prior, 1e-9) / np.maximum(prior, 1e-9)), 0.0)


def feature_scale(task):
    """(mean, standard deviation) of the features of a task's windows, float32 (F,) each; None if it has no
    features."""
    if not task.features.shape[1]:
        return None
    # The small constant keeps a feature that never changes finite.
    seen = task.features[task.items["beat"]]
    return torch.from_numpy(seen.mean(0)), torch.from_numpy(seen.std(0) + 1e-3)


def standardised(batch, scale, device):
    """The features of a batch (B, F), less their mean and over their standard deviation; None if the model
    takes none."""
    if scale is None:
        return None
    mean, deviation = (part.to(device) for part in scale)
    return (batch["features"].to(device) - mean) / deviation


def median_tokens(model, store, task, device) -> dict:
    """{record: median of its windows' middle tokens}: what a model built with compare=True compares with."""
    # No label goes in, so a test record may be compared with itself, too.
    model.to(device)
    middle = lambda x, real: model.middle(x.to(device), real.to(device)).cpu()
    return median_beats(middle, store, task, model.encoder_model.signal_len, batch_of(model))


def batch_of(model) -> int:
    """Windows of one batch without gradients: 512, and of a large encoder what fits into 2 GB."""
    encoder = getattr(model, "encoder_model", None)
    return 512 if encoder is None else min(512, max(1, encoder.windows_at_once(2.0**31) // encoder.leads))


@torch.no_grad()
def predict(model, dataset, scale, device, watch=iter) -> np.ndarray:
    """Logits (windows, C) float64 of a data set, in its order. scale: of the features, or None if the model
    takes none. watch: function that passes the batches of the loader on."""
    training = model.training  # given back at the end
    model.eval()

    rows = []
    # A generator of its own, so that the loader leaves the random state of dropout alone.
    for batch in watch(DataLoader(dataset, batch_of(model), generator=torch.Generator())):
        real = only_padded(batch["real"])
        real = None if real is None else real.to(device)
        median_beat = batch["median_beat"].to(device) if "median_beat" in batch else None
        logits = model(batch["x"].to(device), real, standardised(batch, scale, device), median_beat)
        rows.append(logits.double().cpu().numpy())
    model.train(training)
    return np.concatenate(rows)


def corrected(logits: np.ndarray, shift: np.ndarray, tau: float) -> np.ndarray:
    """Probabilities (n, C) of logits - tau * shift: the class frequencies of the training undone by the
    fraction tau."""
    logits = logits - tau * shift

    # Less the largest one, so that no exponential overflows.
    logits = np.exp(logits - logits.max(1, keepdims=True))
    return logits / logits.sum(1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probability of each label on its own."""
    # 1 / (1 + exp(-x)) in a form that does not overflow
    return 0.5 * (1 + np.tanh(0.5 * logits))


def by_record(probabilities: np.ndarray, store, task) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean probabilities, targets, a row of the store) of each recording, from those of its windows."""
    _, first, place = np.unique(store.recordings(task.items), return_index=True, return_inverse=True)
    sums = np.zeros((len(first), probabilities.shape[1]))
    np.add.at(sums, place, probabilities)
    return sums / np.bincount(place)[:, None], task.targets[first], task.items["record"][first]


def validate(model, dataset, scale, shift: np.ndarray, device, watch=iter) -> tuple[float, dict, float]:
    """(tau, scores, value) of the validation part: the fraction of the prior correction that scores best, and
    the number that selects the weights: AUROC of two classes, macro-F1 of more, macro-AUROC of several labels
    for a record."""
    classes, labels = dataset.task.classes, dataset.task.items["label"]
    logits = predict(model, dataset, scale, device, watch=watch)

    # Several labels belong to a record, so its windows are averaged; F max where no AUROC is defined.
    if dataset.task.targets is not None:
        found = label_scores(*by_record(sigmoid(logits), dataset.store, dataset.task)[:2], classes)
        return 0.0, found, found["macro_auroc"] if np.isfinite(found["macro_auroc"]) else found["f_max"]

    # Where the classes are drawn as they are, there is nothing to correct.
    taus = TAUS if np.abs(shift).max() > 0.01 else (0.0,)
    found = {tau: scores(corrected(logits, shift, tau), labels, classes) for tau in taus}
    # Of equally good corrections the smallest.
    tau = max(found, key=lambda tau: (found[tau]["macro_f1"], -tau))
    result = found[tau]

    # AUROC needs no threshold, but it is defined for two classes only.
    two = len(classes) == 2 and np.isfinite(result["auroc"])
    return tau, result, result["auroc"] if two else result["macro_f1"]


def make_sets(args, accelerator, preprocess: dict, signal_len: int):
    """(training set, validation set or None): windows of the training records, those of one fold of the
    subjects held out.

    The signals are prepared as the pre-trained model's were. An epoch draws as many windows as there are, and
    at least those of one step.
    """
    # Every labelled window of the task, whichever part its record belongs to.
    store = read_store(args, Preprocess(**preprocess), accelerator)
    task = load_task(
        store, args.task, signal_len, skip_bad=args.skip_bad, level=args.level, amplitude=args.amplitude
    )
    if not args.features:
        task = task.without_features()

    # From here on there are training and validation records only.
    parts = split_parts(store, args.split)
    own = task.select(parts[task.items["record"]] == "val")
    task = training_part(task, parts)
    train, validation = task, None
    if len(own.items) and not args._given & {"fold", "folds"}:
        # Manifests and databases such as PTB-XL name their own validation part.
        validation = DownstreamClassificationDataset(store, own, signal_len)
    elif args.fold >= 0:
        # Folds are made of subjects and share out rare classes.
        held_out = fold_of(store, task, args.folds)[task.items["record"]] == args.fold
        train = task.select(~held_out)
        validation = DownstreamClassificationDataset(store, task.select(held_out), signal_len)

    # Fewer labels shorten the training set alone, so that runs with other shares are validated alike.
    train = train.select(share_of(train, args.label_share, args.seed, store.recordings(train.items)))

    # Only the training windows are drawn by class, augmented and blended.
    train_set = DownstreamClassificationDataset(
        store,
        train,
        signal_len,
        args.seed,
        draws=max(len(train.items), args.batch_size * accelerator.num_processes * args.accum),
        power=args.sampling_power,
        strength=args.augment,
        jitter=args.jitter,
        flip=args.flip,
        mixup=args.mixup,
        fibrillation_fraction=args.fibrillation,
    )
    return train_set, validation


def make_model(args, config: dict, head_sizes: dict, task) -> TF_MAE_Classifier:
    """The classifier on the pre-trained encoder, or on random weights of its sizes; only the head is trained
    under --freeze."""
    try:
        model = TF_MAE_Classifier(
            # what has another shape than in the file is an error, not a random encoder
            None if args.random_init else args.pretrained,
            len(task.classes),
            use_cot=args.head == "cot",
            center_columns=args.center_columns,
            compare=args.compare,
            num_features=task.features.shape[1],
            hierarchy=RHYTHM if args.hierarchy else 0,
            **head_sizes,
            **config,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    if args.freeze:
        model.encoder_model.requires_grad_(False)  # its dropout is 0, so training mode does not matter
    return model


def make_card(train_set, scale, args) -> dict:
    """What test.py needs beside the weights; it goes into the metadata of model.safetensors."""
    task = train_set.task
    return {
        "task": task.kind,
        "classes": task.classes,
        "level": args.level,
        "amplitude": args.amplitude,
        # Features are standardised in a test as they were in training.
        "features": None if scale is None else [part.tolist() for part in scale],
        # How much more often each class was drawn than it occurs; validation says how much of it is undone.
        "shift": [0.0] * len(task.classes)
        if task.targets is not None
        else prior_shift(train_set.drawn_prior, task.counts()).tolist(),
    }


def describe_windows(dataset) -> str:
    """Records and windows of each class, for the screen."""
    if dataset is None:
        return "none"
    task = dataset.task
    counts = dict(zip(task.classes, task.counts().tolist()))
    return f"{len(np.unique(task.items['record']))} records, windows {counts}"


def evaluate(training, model, validation, scale, card: dict) -> dict:
    """Score the validation part and keep the weights if they are to be kept; done by the main process, told
    to all.

    Updates "best" and "tau" of the training's state. card: what test.py needs beside the weights.
    """
    accelerator, out, news, result = training.accelerator, Path(training.args.out), {}, None
    state = dict(training.state)  # changed on the main process, then sent to all
    if accelerator.is_main_process:
        plain, value = accelerator.unwrap_model(model), 0.0
        if validation:
            shift, watch = np.array(card["shift"]), lambda loader: watched(training, loader, together=False)
            tau, result, value = validate(plain, validation, scale, shift, accelerator.device, watch)
            told = ("macro_f1", "accuracy", "auroc", "macro_auroc", "f_max")
            news = {f"val_{name}": result[name] for name in told if name in result} | {"tau": tau}

        # Without a validation part the last weights are all there is.
        if not validation or training.args.select == "last" or value > state["best"]:
            state |= {"best": float(value), "tau": news.get("tau", 0.0)}
            save_model(out / "model.safetensors", plain, **card, tau=state["tau"], step=state["step"])
            atomic_json(
                out / "metrics.json", {"step": state["step"], "tau": state["tau"], "validation": result or {}}
            )
    elif validation:  # the other processes learn here whether a stop signal ended it
        list(watched(training, [], together=False))

    # Every process keeps the same state, which the checkpoints hold.
    state, news = from_main((state, news))
    training.state.update(state)
    return news


def tell_end(args, validated: bool):
    """Print the scores of the weights that were kept, and the command that scores the test records."""
    if validated:
        kept = read_json(args.out / "metrics.json")
        tell = describe_label_scores if args.task == "labels" else describe_scores
        print(f"validation, step {kept['step']}: {tell(kept['validation'])}")
    words = ["--model", args.out / "model.safetensors", "--data", *args.data]
    words += ["--split", args.split] if args.split else []
    command = shlex.join(map(str, words))  # the line can be pasted
    print(f"done; score the test records with: python cwt_mae/test.py {command} --out FOLDER")


def main(args):
    # What the options say, before anything is read
    accelerator = make_accelerator(args)
    refuse_sharding(accelerator, "it fits on every GPU; leave ACCELERATE_CONFIG unset, for DDP")
    seed_everything(args.seed)
    head_sizes = parse_changes(args.set, HEAD_SHAPE)
    check_options(args, head_sizes)

    # Data, prepared and cut as the pre-trained model wants them
    config = {name: value for name, value in read_model(args.pretrained)[1].items() if name in ENCODER_ARGS}
    config["signal_len"] = args.signal_len or config.get("signal_len", 3000)
    train_set, validation = make_sets(args, accelerator, config.get("preprocess") or {}, config["signal_len"])
    task, scale = train_set.task, feature_scale(train_set.task)  # of the training windows alone

    # Rare classes may weigh more in the loss; how often they are drawn is the data set's business.
    weights = class_weights(task.counts()).to(accelerator.device) if args.class_weights else None

    # The data set draws its windows itself, so nothing is shuffled here
    loader = make_loader(train_set, args, shuffle=False)

    # Model: random where it is new; with --compare it needs the median tokens of every record
    model = make_model(args, config, head_sizes, task)
    if args.compare:
        for part in filter(None, (train_set, validation)):
            part.median_beats = median_tokens(model, part.store, part.task, accelerator.device)

    # Optimizer: learning rates that fall towards the input, where pre-training learned what is general
    optimizer = torch.optim.AdamW(layer_groups(model, args.lr, args.layer_decay, args.weight_decay))
    if args.compile:
        model.compile()  # all but the wavelet transform
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    # Everything that can be wrong was looked at by now; only here the run folder is made.
    steps = plan_steps(args, loader)
    open_run(args.out, args, accelerator, args.resume, args.overwrite)
    accelerator.print(
        f"{describe(model)} | training {describe_windows(train_set)} | validation "
        f"{describe_windows(validation)} | {args.batch_size} x {accelerator.num_processes} x {args.accum} "
        f"windows a step | {steps} steps, learning rate {args.lr:g}"
    )
    card = make_card(train_set, scale, args)

    # The loop; best and tau are in every checkpoint, so that a resumed run selects as the whole one does
    def find_best():
        return evaluate(training, model, validation, scale, card)

    every = find_best if validation else None
    training = start(accelerator, args, steps, [optimizer], every, best=-1.0, tau=0.0)
    model.train()
    for batch, share in batches(training, loader):
        with accelerator.accumulate(model):
            # (B, F) numbers of the rhythm, or None; logits (B, C)
            features = standardised(batch, scale, accelerator.device)
            logits = model(batch["x"], only_padded(batch["real"]), features, batch.get("median_beat"))

            # share makes the accumulation of k batches equal one batch that is k times as large.
            loss = loss_of(logits, batch, args.label_smoothing, weights) * share
            check_finite(training, batch["name"], loss=loss)  # before the weights change; names the records
            accelerator.backward(loss)

            # Linear from 0 at step 0, then --schedule; every group multiplies its own peak.
            factor = lr_at(training.state["step"], steps, args.warmup, args.schedule, ramp="zero")
            grad = update(training, model, [optimizer], factor)
        if accelerator.sync_gradients:
            finish_step(training, grad=grad)  # evaluate where it is due, log, save, stop

    # The end: the last weights are candidates too; what was kept is told
    finish(training, **find_best())
    if accelerator.is_main_process:
        tell_end(args, validation is not None)


if __name__ == "__main__":
    run(main, parse_args())
