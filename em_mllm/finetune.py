"""Train the signal encoder with labels: classification, and the five regressions with --multitask.

    python em_mllm/finetune.py --train data/em_mllm/train/modulation.h5 \\
        --test data/em_mllm/test/modulation.h5 \\
        --signal-encoder-path runs/em_mllm/pretrain/encoder --out runs/em_mllm/finetune
    torchrun --nproc_per_node=4 em_mllm/finetune.py ... --precision bf16

Writes out/model/ (config.json, model.safetensors), an encoder folder that train.py takes, out/metrics.json
and a picture of the confusion matrix.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from common.arguments import Parser, add_run_arguments, refuse
from common.checkpoint import atomic_dir, atomic_json
from common.errors import UserError, run
from common.figures import draw_confusion
from common.files import reading
from common.run import describe, open_run, seed_everything
from common.sharding import prepare, refuse_sharding
from common.together import meet
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
)
from em_mllm.dataset import (
    Augmentation,
    SignalCollator,
    SignalDataset,
    add_augmentation_arguments,
    check_points,
    encoder_inputs,
    refuse_shared,
    signal_files,
)
from em_mllm.em_foundation.models import SiTForMultiTask, SiTMAEForClassification
from em_mllm.em_foundation.models.configuration_em import REGRESSION_TASKS
from em_mllm.em_foundation.models.modeling_cnn import cnn_config
from em_mllm.em_foundation.utils.utils import load_encoder, read_config, signal_of
from em_mllm.optim import add_optimizer_argument, make_optimizers
from em_mllm.scores import HIGH_SNR_DB


def parse_args(argv=None):
    parser = Parser(__doc__)

    # the test files are measured once, at the end; whoever wants to watch or to choose takes --val
    data = parser.add_argument_group("data")
    data.add_argument(
        "--train",
        type=Path,
        nargs="+",
        required=True,
        help=".h5 files and tar shards with labels, or folders of them; their classes are joined by name",
    )
    data.add_argument(
        "--test", type=Path, nargs="+", required=True, help="the same to measure on, once, at the end"
    )
    data.add_argument(
        "--val", type=Path, nargs="+", help="the same to measure on every --eval-every steps, as a log line"
    )

    # beside the class: a signal whose file does not know a value counts for the other tasks alone
    data.add_argument(
        "--multitask",
        action="store_true",
        help=f"also regress {', '.join(REGRESSION_TASKS)} where the files have these columns",
    )

    # of training signals only; validation and test see the files as they are
    add_augmentation_arguments(data)
    data.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out signals with nan, inf or only zeros instead of stopping",
    )

    model = parser.add_argument_group("model")
    add_model_arguments(model)
    add_optimizer_argument(model)

    add_run_arguments(parser, lr=1e-3, batch_size=32, max_steps=500, weight_decay=0.05, log_every=50)
    return parser.parse_args(argv)


def add_model_arguments(group):
    """The encoder, what its head reads, and the controls."""
    # the encoder, how its tokens become one vector for a signal, and what else it learns from
    group.add_argument(
        "--encoder",
        choices=("sit", "cnn"),
        default="sit",
        help="sit: the one in --signal-encoder-path; cnn: a convolutional one from random weights, best with "
        "many labels",
    )
    group.add_argument("--signal-encoder-path", type=Path, help="folder of the encoder, or its weight file")
    group.add_argument(
        "--pooling",
        choices=("cls", "mean"),
        help="what the head reads of the encoder: its cls token, or the mean over the IQ tokens; without it "
        "as the encoder's configuration says",
    )
    group.add_argument(
        "--teacher",
        type=Path,
        help="model/ folder of an earlier run on these classes, which sees every signal without the noise of "
        "--noise-db: the model learns its probabilities beside the labels",
    )

    # controls: what pre-training is worth (most with few labels), and what its features hold as they are
    group.add_argument(
        "--random-encoder", action="store_true", help="control: the encoder's sizes without its weights"
    )
    group.add_argument("--linear-probe", action="store_true", help="train the head on a frozen encoder")


def read_data(args) -> tuple[SignalDataset, SignalDataset | None, SignalDataset, list[str]]:
    """Read the labelled signals; returns (training, validation or None, test, names of the classes)."""
    columns = ("label", "snr", *(REGRESSION_TASKS if args.multitask else ()))
    augmentation = Augmentation.of(args)

    # in the view that the encoder learned; with a teacher each training signal is given twice, with its noise
    # and without
    files = signal_files(args.train, "--train")
    learned = args.signal_encoder_path and signal_of(args.signal_encoder_path)
    how = dict(clean=bool(args.teacher), learned=learned)
    train = SignalDataset(files, columns, args.skip_bad, args.seed, augmentation, **how)

    # the others as the training signals are
    as_train = dict(columns=columns, skip_bad=args.skip_bad, learned=train.signal.to_json())
    val = SignalDataset(signal_files(args.val, "--val"), **as_train) if args.val else None
    test = SignalDataset(signal_files(args.test, "--test"), **as_train)
    refuse_shared(train.files, test.files, "--test")
    if val:
        refuse_shared(train.files, val.files, "--val")

    # a column that a file lacks is nan: right for a regression, but every signal needs its class
    for data in filter(None, (train, val, test)):
        label = data.columns["label"]
        wrong = (label % 1 != 0) | (label < 0)  # also of nan and inf
        if wrong.any():
            path = data.files[data.owner[wrong.argmax()]].path
            raise UserError(
                f"{path}: label is missing or not a class number; write a dataset label (Num, 1) of 0, 1, 2, "
                "..."
            )
    return train, val, test, join_classes(train, *filter(None, (val, test)))


def join_classes(train, *others) -> list[str]:
    """Names of all classes of the training files; the labels of all data sets are renumbered to this list.

    A file without class names counts its labels as the first training file does.
    """
    # by name, because class 3 of one file may be class 5 of another; in the order of first occurrence
    first = train.files[0].classes or [str(i) for i in range(int(train.columns["label"].max()) + 1)]
    names = list(dict.fromkeys([*first, *(n for file in train.files for n in file.classes or ())]))

    # file by file, own number -> name -> number in `names`; a class that was never trained is an error
    for data in (train, *others):
        for f, file in enumerate(data.files):
            rows, own = data.owner == f, file.classes or first
            label = data.columns["label"][rows].astype(int)  # none where --skip-bad left out all signals
            if (highest := label.max(initial=-1)) >= len(own):
                raise UserError(
                    f"{file.path}: label {highest} is not among the {len(own)} classes {', '.join(own)}"
                )
            if unknown := [own[k] for k in np.unique(label) if own[k] not in names]:
                raise UserError(
                    f"{file.path}: class {unknown[0]} is not among the training classes {', '.join(names)}"
                )
            data.columns["label"][rows] = [names.index(own[k]) for k in label]
    return names


def regression_scales(args, train) -> dict[str, float]:
    """{regression task: mean magnitude over the training signals, 1 where all are zero} of the tasks that
    have any value; empty without --multitask."""
    if not args.multitask:
        return {}
    # samples, counts and dB: divided by this, an error of 1 is as large as a typical value in every task
    known = {name: train.columns[name] for name in REGRESSION_TASKS}
    known = {name: v[np.isfinite(v)] for name, v in known.items()}
    scales = {name: float(np.abs(v).mean()) or 1.0 for name, v in known.items() if len(v)}
    if not scales:
        raise UserError(
            f"--multitask: {args.train[0]} has none of the datasets {', '.join(REGRESSION_TASKS)}"
        )
    return scales


def load_teacher(folder: Path, classes: list[str], train: SignalDataset) -> SiTMAEForClassification:
    """The frozen model of an earlier run, which must know the same classes and read the same signals."""
    # its probabilities are compared place by place, so the order of the classes counts, too
    config = read_config(folder)
    known = [config.id2label[k] for k in sorted(config.id2label)]
    if known != classes:
        raise UserError(
            f"--teacher {folder}: knows the classes {', '.join(known)}, not {', '.join(classes)}; give the "
            "model/ folder of a run on these files"
        )

    # and so are the signals: the teacher is shown those of the student, in the student's view
    own = (train.signal.view, train.signal.factor)
    view = (config.signal["view"], config.signal["factor"]) if config.signal else own
    if view != own:
        raise UserError(
            f"--teacher {folder}: reads the view {view[0]} x {view[1]}, these signals are read as {own[0]} x "
            f"{own[1]}; give a teacher of that view"
        )
    check_points(config, train.files, train.signal)

    # it teaches and does not learn: no dropout, no gradients
    with reading(folder, "model"):
        teacher = SiTMAEForClassification.from_pretrained(folder, config=config)
    return teacher.eval().requires_grad_(False)


def lesson(model, teacher, logits, inputs, batch) -> torch.Tensor:
    """Divergence of the model's probabilities from those that the teacher gives the signals without noise."""
    # the same signals, drawn with the same shift and phase, before the noise; (S, classes) log-probabilities
    with torch.no_grad():
        clean = encoder_inputs(batch["teacher"])
        where = (clean["patch_positions"], clean["sample_ids_seq"])
        told = teacher.per_signal(teacher(**clean).logits, *where).float().log_softmax(-1)

    # KL(teacher || model): the model has to keep every class that the teacher holds possible
    own = (
        model.per_signal(logits, inputs["patch_positions"], inputs["sample_ids_seq"]).float().log_softmax(-1)
    )
    return F.kl_div(own, told, reduction="batchmean", log_target=True)


def make_model(args, classes: list[str], scales: dict, train: SignalDataset, *others):
    """The encoder with its heads, and what of it is trained. UserError where signals are too long for it."""
    signal = train.signal
    # the names of the classes go into config.json, where a teacher's are read, and so does the signals' view
    more = dict(id2label=dict(enumerate(classes)), pooling=args.pooling, signal=signal.to_json())
    if args.encoder == "cnn":
        config = cnn_config(signal.points, **{k: v for k, v in more.items() if v is not None})
    else:
        config = read_config(args.signal_encoder_path, attention_type="sdpa", **more)

    # a random encoder has the sizes of the pre-trained one, or the control would compare sizes
    model = (SiTForMultiTask if scales else SiTMAEForClassification)(config)
    if args.encoder == "sit" and not args.random_encoder:
        load_encoder(model, args.signal_encoder_path)

    # longer signals have no positions; told now, not in the middle of an epoch
    for data in (train, *others):
        check_points(config, data.files, data.signal)

    # the un-normalised features are loud: start undecided rather than wrong
    torch.nn.init.zeros_(model.classifier.weight)
    model.sit.requires_grad_(not args.linear_probe)

    # no gradient reaches these, and DDP would wait for one: the final norm, because the heads read the
    # un-normalised output, as upstream; the MLP of a rate that is not used; heads of tasks without values
    model.sit.layernorm.requires_grad_(False)
    if config.encoder == "sit" and not config.use_fs:
        model.sit.embeddings.fs_embedder.requires_grad_(False)
    if scales:
        for name in set(REGRESSION_TASKS) - set(scales):
            getattr(model, f"regression_head_{name}").requires_grad_(False)
    return model


def split_labels(batch, scales):
    """Split a collated batch into inputs and labels of the model; regressions are divided by their scale."""
    # (S,) class numbers; nan in a regression stays nan, which the loss leaves out
    inputs, label = encoder_inputs(batch), batch["label"].long()
    if not scales:
        return inputs, label
    values = {name: batch[name].float() / scale for name, scale in scales.items()}
    return inputs, {"classification": label, **values}


def known_values(batch, tasks):
    """For each task the number of signals of a batch that have a value: what its mean loss is over."""
    # (tasks,): the tasks know different signals, so each has its own share of the step
    columns = [batch["label" if task == "classification" else task] for task in tasks]
    return torch.stack([torch.isfinite(column).sum() for column in columns])


def weighed(model, result, share, tasks, taught=None):
    """The loss of a batch as its share of the step, and the parts of it that are logged beside it. taught:
    the divergence from the teacher, if there is one."""
    # labels alone where there is no teacher; several tasks are weighed by the configuration's label_weights
    if taught is not None:
        parts = {"labels": result.loss * share[0], "teacher": taught * share[0]}
        return sum(parts.values()), parts
    if len(tasks) > 1:
        parts = {t: result.loss_details[t] * share[k] for k, t in enumerate(tasks)}
        return model.weigh(parts), parts
    return result.loss * share[0], {}


@torch.no_grad()
def predict(model, data, scales, batch_size=64):
    """Predicted class, and regressions in the units of the columns, of every signal."""
    # without dropout, and with the stored statistics of batch norms; afterwards as before
    was_training = model.training
    model.eval()
    collate, classes, values = SignalCollator(model.config), [], {name: [] for name in scales}
    for batch in DataLoader(data, batch_size, collate_fn=collate):
        inputs = encoder_inputs(batch, model.device)
        logits, where = model(**inputs).logits, (inputs["patch_positions"], inputs["sample_ids_seq"])

        # logits are per token, (B, M, classes); per_signal reads cls or the mean, as config.pooling says
        scores = model.per_signal(logits["classification"] if scales else logits, *where)
        classes.append(scores.argmax(-1).cpu())
        for name in scales:
            values[name].append(model.per_signal(logits[name], *where)[:, 0].cpu() * scales[name])

    model.train(was_training)
    return torch.cat(classes).numpy(), {name: torch.cat(v).numpy() for name, v in values.items()}


def score(label, predicted, snr) -> dict:
    """Accuracy over all signals and over those of high SNR, beside the fraction of the largest class."""
    # the largest class is what a guess without looking would say
    hit = predicted == label
    scores = {
        "accuracy": float(hit.mean()),
        "chance": float(np.bincount(label).max() / len(label)),
        "count": len(label),
    }
    high = snr >= HIGH_SNR_DB  # nan where the SNR is not known
    if high.any():
        scores["accuracy_high_snr"] = float(hit[high].mean())
    return scores


def regression_errors(values, train, test) -> dict:
    """Mean absolute error of every regression that the test signals have values of, beside that of the
    training median."""
    errors = {}
    for name, guess in values.items():
        known, learned = (np.isfinite(data.columns[name]) for data in (test, train))
        if not known.any():
            continue

        # the median is what mean absolute error is least for, if nothing of the signal is known
        truth, median = test.columns[name][known], float(np.median(train.columns[name][learned]))
        errors[f"mae_{name}"] = {
            "model": float(np.abs(guess[known] - truth).mean()),
            "training median": float(np.abs(median - truth).mean()),
        }
    return errors


def check_options(args):
    """Refuse what is missing and what would have no effect."""
    if not args.val:
        refuse(args, ["eval_every"], "without --val")
    elif not args.eval_every:
        refuse(args, ["val"], "without --eval-every")
    if args.noise_db is None or args.multitask:
        refuse(args, ["teacher"], "beside --multitask" if args.multitask else "without --noise-db")
    if args.encoder == "cnn":
        refuse(args, ["signal_encoder_path", "random_encoder", "linear_probe"], "beside --encoder cnn")
    elif args.signal_encoder_path is None:
        raise UserError("--signal-encoder-path is missing; give the encoder's folder, or --encoder cnn")


def save_results(args, model, train, test, classes: list[str], scales: dict):
    """Write the model, and what it is worth on the test signals."""
    # the weights first: they are what took the time
    with atomic_dir(args.out / "model") as folder:
        model.save_pretrained(folder)

    predicted, values = predict(model, test, scales)
    label = test.columns["label"].astype(int)
    metrics = score(label, predicted, test.columns["snr"]) | regression_errors(values, train, test)
    atomic_json(args.out / "metrics.json", metrics)

    # which classes are taken for each other
    matrix = np.zeros((len(classes), len(classes)), int)  # (truth, prediction)
    np.add.at(matrix, (label, predicted), 1)
    draw_confusion(matrix, classes, args.out / "figures" / "confusion.png", "fraction of signals")
    print("\n".join(f"{k}: {v}" for k, v in metrics.items()))


def main(args):
    # labelled signals; everything is checked before anything is written
    check_options(args)
    accelerator = make_accelerator(args)
    # one process predicts the test signals alone, for which it needs the whole model
    refuse_sharding(accelerator, "the encoder fits on every GPU; leave ACCELERATE_CONFIG unset, for DDP")
    seed_everything(args.seed)
    train, val, test, classes = read_data(args)
    scales = regression_scales(args, train)
    tasks = ["classification", *scales]

    # model, loader and optimizer
    model = make_model(args, classes, scales, train, *filter(None, (val, test)))
    # a teacher may have another kind of encoder, with other patches: the collator lays its signals out apart
    teacher = load_teacher(args.teacher, classes, train).to(accelerator.device) if args.teacher else None
    loader = make_loader(train, args, collate_fn=SignalCollator(model.config, teacher and teacher.config))
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay)

    # parameters are counted before the model is compiled and wrapped
    about = describe(model)
    if args.compile:
        model.compile()
    model, loader, *optimizers = prepare(accelerator, model, loader, *optimizers)

    # without DDP's wrapper, which would wait for the others where one process predicts alone
    plain = accelerator.unwrap_model(model)
    steps = plan_steps(args, loader)

    # the run folder, and what is about to happen in one line
    open_run(args.out, args, accelerator, args.resume, args.overwrite)
    accelerator.print(
        f"{about}; {len(train)} training and {len(test)} test signals, {len(classes)} classes; "
        f"{args.batch_size} x {accelerator.num_processes} x {args.accum} signals a step, {steps} steps, "
        f"lr {args.lr:g}"
    )

    # every process predicts all validation signals: there is nothing to gather
    def scores():
        predicted, _ = predict(plain, val, scales)
        return {"val_accuracy": float((predicted == val.columns["label"]).mean())}

    # the loop: `share` weighs all signals of a step alike, task by task
    training = start(accelerator, args, steps, optimizers, scores)
    model.train()
    for batch, share in batches(training, loader, lambda batch: known_values(batch, tasks)):
        inputs, labels = split_labels(batch, scales)
        with accelerator.accumulate(model):
            # forward: what the labels say, and what a teacher says of the same signals without noise
            result = model(**inputs, labels=labels)
            taught = None if teacher is None else lesson(plain, teacher, result.logits, inputs, batch)
            loss, parts = weighed(plain, result, share, tasks, taught)
            check_finite(training, (f"signal {int(i)}" for i in batch["index"]), loss, **parts)
            accelerator.backward(loss)
            grad = update(training, model, optimizers, lr_at(training.state["step"], steps, args.warmup))
        if accelerator.sync_gradients:
            finish_step(training, grad=grad)  # validate where it is due, log, save, stop

    # the model, and its scores on signals that nothing was chosen on
    if accelerator.is_main_process:
        save_results(args, plain, train, test, classes, scales)
    finish(training)
    meet()


if __name__ == "__main__":
    run(main, parse_args())
