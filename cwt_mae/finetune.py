"""Fine-tune a pre-trained CWT-MAE encoder to classify windows: heart beats, rhythms, or whole series.

    python cwt_mae/finetune.py --pretrained runs/cwt_mae/base/model.safetensors --data FOLDER --task beat --out runs/cwt_mae/beat

Records are split by subject into training, validation (one of --folds parts of the training records) and test. The test
records are never looked at here: steps, the checkpoint and the correction of the class frequencies are chosen on validation.

Upstream file: finetune.py (layer-wise learning rates, mixup, label smoothing). Differences: README.md.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it
from common.checkpoint import atomic_write, find_resume, load_step, save_step
from common.errors import UserError, run
from common.run import (
    Log,
    StopSignal,
    check_finite,
    describe,
    loader_worker,
    on_main,
    open_run,
    seed_everything,
)
from cwt_mae.dataset import Preprocess, build_store
from cwt_mae.dataset_finetune import (
    DownstreamClassificationDataset,
    fold_of,
    load_task,
    split_parts,
    training_part,
    usual_of,
)
from cwt_mae.metrics import describe_scores, scores
from cwt_mae.model_finetune import ENCODER_ARGS, TF_MAE_Classifier, read_model, save_model
from cwt_mae.train import lr_at, only_padded


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flag = argparse.BooleanOptionalAction
    data = parser.add_argument_group("data")
    data.add_argument("--data", nargs="+", required=True, help="labelled files and folders of them")
    data.add_argument(
        "--task",
        choices=("beat", "rhythm", "series"),
        required=True,
        help="what a label belongs to (dataset_finetune.py)",
    )
    data.add_argument(
        "--split",
        help="JSON {train: [names], test: [names]} (None: UCR parts, or the list DS1 for training and the rest for the test)",
    )
    data.add_argument(
        "--folds", type=int, default=4, help="parts of the training subjects; one is the validation part"
    )
    data.add_argument(
        "--fold",
        type=int,
        default=0,
        help="which part validates; -1: none, train on all and keep the last weights",
    )
    data.add_argument("--cache", help="folder for the prepared signals (None: data/cwt_mae/cache)")
    data.add_argument("--input-fs", type=float, help="sampling rate of files that do not say it, Hz")
    data.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave bad records and labels out, counted, instead of stopping",
    )
    data.add_argument("--workers", type=int, default=0, help="loader processes for each training process")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--pretrained",
        required=True,
        help="model.safetensors of train.py, or an upstream checkpoint; its configuration is used",
    )
    model.add_argument(
        "--random-init",
        action="store_true",
        help="keep the configuration but not the weights: the control of pre-training",
    )
    model.add_argument(
        "--signal-len",
        type=int,
        default=0,
        help="window, samples; 0 = as pre-trained, else positions are interpolated",
    )
    model.add_argument("--freeze", action="store_true", help="train the head alone")
    model.add_argument(
        "--head",
        choices=("cot", "mlp"),
        default="cot",
        help="latent reasoning tokens, or residual MLP on the mean token",
    )
    model.add_argument("--reasoning-tokens", type=int, default=8, help="of the cot head")
    model.add_argument(
        "--center-columns",
        type=int,
        default=0,
        help="mlp head: join this many time columns round the middle; 0 = mean of all",
    )
    model.add_argument("--hidden-dim", type=int, default=512, help="width of the mlp head")
    model.add_argument("--res-blocks", type=int, default=2, help="of the mlp head")
    model.add_argument("--dropout", type=float, default=0.0, help="in the mlp head")
    model.add_argument("--input-dropout", type=float, default=0.0, help="of what the head is given")
    model.add_argument(
        "--features",
        action=flag,
        default=True,
        help="beats: give the head numbers of the rhythm around the beat",
    )
    model.add_argument(
        "--compare",
        action=flag,
        default=False,
        help="with --freeze and --center-columns: give the head the tokens' difference from the record's median tokens",
    )
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--max-steps", type=int, default=1000, help="optimizer steps")
    optim.add_argument(
        "--batch-size", type=int, default=32, help="windows for each process and accumulated step"
    )
    optim.add_argument("--accum", type=int, default=1, help="batches accumulated in an optimizer step")
    optim.add_argument("--lr", type=float, default=1e-4, help="peak learning rate of the head")
    optim.add_argument(
        "--schedule",
        choices=("cosine", "constant"),
        default="cosine",
        help="after 5 %% of warm-up (upstream: constant)",
    )
    optim.add_argument(
        "--layer-decay",
        type=float,
        default=0.65,
        help="factor of the learning rate from one block to the one before",
    )
    optim.add_argument(
        "--weight-decay", type=float, default=0.05, help="not on biases, norms, tokens and positions"
    )
    optim.add_argument("--clip", type=float, default=3.0, help="largest gradient norm")
    optim.add_argument(
        "--label-smoothing", type=float, default=0.1, help="share of the target spread over all classes"
    )
    optim.add_argument(
        "--mixup",
        type=float,
        default=0.0,
        help="Beta(a, a) of the blend of two windows; 0 = none (upstream 0.2)",
    )
    optim.add_argument(
        "--sampling-power",
        type=float,
        default=1.0,
        help="a class is drawn in proportion to count^power: 1 as it is, 0 balanced",
    )
    optim.add_argument(
        "--class-weights", action=flag, default=False, help="weigh the loss by 1 / class frequency"
    )
    optim.add_argument(
        "--augment",
        type=float,
        default=0.0,
        help="strength of gain, drift and noise; 1 = up to 20 %%, 15 %%, 8 %%",
    )
    optim.add_argument("--jitter", type=int, default=0, help="largest shift of a window, samples")
    optim.add_argument(
        "--irregular",
        type=float,
        default=0.0,
        help="beats: share of windows other than S that get the rhythm numbers of simulated atrial fibrillation",
    )
    optim.add_argument("--flip", action=flag, default=False, help="augment by the sign too (PPG, not ECG)")
    optim.add_argument("--bf16", action="store_true", help="bfloat16 mixed precision")
    out = parser.add_argument_group("run")
    out.add_argument("--out", required=True, help="run folder")
    out.add_argument("--seed", type=int, default=42, help="of the head's weights, windows and augmentation")
    out.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in --out")
    out.add_argument(
        "--overwrite", action="store_true", help="delete the run that --out holds and start again"
    )
    out.add_argument("--log-every", type=int, default=50, help="steps")
    out.add_argument("--save-every", type=int, default=500, help="steps")
    out.add_argument("--eval-every", type=int, default=500, help="steps between validations")
    out.add_argument(
        "--select",
        choices=("best", "last"),
        default="best",
        help="weights to keep: best validation score, or the last",
    )
    return parser.parse_args(argv)


TAUS = (0.0, 0.25, 0.5, 0.75, 1.0)


def layer_groups(model, lr: float, decay: float, weight_decay: float) -> list[dict]:
    """AdamW groups whose `scale` falls by `decay` a layer, from the head and last norm (1) down to the embedding; biases, norms,
    tokens and positions have no weight decay (upstream: all of them do)."""
    depth, groups = len(model.encoder_model.blocks), {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        level = depth + 1
        if name.startswith("encoder_model.blocks."):
            level = int(name.split(".")[2]) + 1
        elif name.startswith("encoder_model.") and not name.startswith("encoder_model.norm"):
            level = 0
        decayed = not (parameter.ndim < 2 or "pos_embed" in name or "token" in name)
        group = {
            "params": [],
            "scale": decay ** (depth + 1 - level),
            "weight_decay": weight_decay if decayed else 0.0,
            "lr": lr,
        }
        groups.setdefault((level, decayed), group)["params"].append(parameter)
    return list(groups.values())


def loss_of(logits, batch, smoothing: float, weights):
    """Cross-entropy with label smoothing, blended where the batch is, weighed by class: mean over the batch."""

    def one(labels):
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing, reduction="none")
        return loss if weights is None else loss * weights[labels]

    if "share" not in batch:
        return one(batch["label"]).mean()
    return (batch["share"] * one(batch["label"]) + (1 - batch["share"]) * one(batch["label2"])).mean()


def usual_tokens(model, store, task, device) -> dict:
    """{record: median of its windows' middle tokens}, what a model built with compare=True compares with."""
    model.to(device)
    return usual_of(
        lambda x, real: model.middle(x.to(device), real.to(device)).cpu(),
        store,
        task,
        model.encoder_model.signal_len,
    )


@torch.no_grad()
def predict(model, dataset, features, device, batch_size: int = 512) -> np.ndarray:
    """Logits (windows, C) float64 of a data set, in its order. features: (mean, deviation), or None if the model takes none."""
    training = model.training
    model.eval()
    rows = []
    for batch in DataLoader(dataset, batch_size, generator=torch.Generator()):
        real = only_padded(batch["real"])
        numbers = None if features is None else ((batch["features"] - features[0]) / features[1]).to(device)
        usual = batch["usual"].to(device) if "usual" in batch else None
        rows.append(
            model(batch["x"].to(device), None if real is None else real.to(device), numbers, usual)
            .double()
            .cpu()
            .numpy()
        )
    model.train(training)
    return np.concatenate(rows)


def corrected(logits: np.ndarray, shift: np.ndarray, tau: float) -> np.ndarray:
    """Probabilities with the frequencies that the classes had in training undone by the share tau: logits - tau * shift."""
    logits = logits - tau * shift
    logits = np.exp(logits - logits.max(1, keepdims=True))
    return logits / logits.sum(1, keepdims=True)


def validate(model, dataset, features, shift: np.ndarray, device) -> tuple[float, dict, float]:
    """(tau, scores, value) of the validation part: the share of the prior correction that scores best, and the number that
    selects the weights: AUROC of two classes, macro-F1 of more."""
    classes, labels = dataset.task.classes, dataset.task.items["label"]
    logits = predict(model, dataset, features, device)
    taus = TAUS if np.abs(shift).max() > 0.01 else (0.0,)
    found = {tau: scores(corrected(logits, shift, tau), labels, classes) for tau in taus}
    tau = max(found, key=lambda tau: (found[tau]["macro_f1"], -tau))
    result = found[tau]
    return (
        tau,
        result,
        result["auroc"] if len(classes) == 2 and np.isfinite(result["auroc"]) else result["macro_f1"],
    )


def make_sets(args, accelerator, preprocess: dict, signal_len: int, size: int):
    """(store, task, its training part, training set, validation set or None). size: windows of a step; the data are prepared as the
    pre-trained model's were."""
    if args.compare and not args.freeze:
        raise UserError(
            "--compare needs --freeze: the tokens to compare with are those of the encoder as it is before training"
        )
    if args.irregular and (args.task != "beat" or not args.features):
        raise UserError(
            "--irregular changes the rhythm numbers of beats: it needs --task beat and --features"
        )
    if args.fold >= args.folds:
        raise UserError(f"--fold {args.fold}: there are --folds {args.folds}, numbered from 0")
    load = lambda quiet=False: build_store(
        args.data, Preprocess(**preprocess), args.cache, args.input_fs, skip_bad=args.skip_bad, quiet=quiet
    )
    on_main(accelerator, load)
    store = load(quiet=True)
    task = load_task(store, args.task, signal_len, skip_bad=args.skip_bad)
    train = training_part(task, split_parts(store, args.split))
    held = (
        fold_of(store, train, args.folds)[train.items["record"]] == args.fold
        if args.fold >= 0
        else np.zeros(len(train.items), bool)
    )
    train_set = DownstreamClassificationDataset(
        store,
        train.select(~held),
        signal_len,
        args.seed,
        draws=size * min(200, args.max_steps),
        power=args.sampling_power,
        strength=args.augment,
        jitter=args.jitter,
        flip=args.flip,
        mixup=args.mixup,
        irregular=args.irregular,
    )
    return (
        store,
        task,
        train,
        train_set,
        DownstreamClassificationDataset(store, train.select(held), signal_len) if args.fold >= 0 else None,
    )


def make_model(args, config: dict, num_classes: int, num_features: int) -> TF_MAE_Classifier:
    """The classifier on the pre-trained encoder, or on random weights of its sizes."""
    try:
        return TF_MAE_Classifier(
            None if args.random_init else args.pretrained,
            num_classes,
            use_cot=args.head == "cot",
            num_reasoning_tokens=args.reasoning_tokens,
            hidden_dim=args.hidden_dim,
            dropout_rate=args.dropout,
            input_dropout=args.input_dropout,
            num_res_blocks=args.res_blocks,
            center_columns=args.center_columns,
            compare=args.compare,
            num_features=num_features,
            **config,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def main(args):
    accelerator = Accelerator(
        gradient_accumulation_steps=args.accum,
        mixed_precision="bf16" if args.bf16 else "no",
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    seed_everything(args.seed)

    config = {name: value for name, value in read_model(args.pretrained)[1].items() if name in ENCODER_ARGS}
    signal_len = args.signal_len or config.get("signal_len", 3000)
    size = args.batch_size * accelerator.num_processes * args.accum
    store, task, train, train_set, val_set = make_sets(
        args, accelerator, config.get("preprocess") or {}, signal_len, size
    )
    counts, classes = train_set.task.counts(), task.classes
    prior = counts / counts.sum()
    shift = np.where(
        counts > 0, np.log(np.maximum(train_set.drawn_prior, 1e-9) / np.maximum(prior, 1e-9)), 0.0
    )
    weights = (
        torch.tensor(
            np.where(counts > 0, counts.sum() / np.maximum(counts, 1) / (counts > 0).sum(), 0.0),
            dtype=torch.float32,
        )
        if args.class_weights
        else None
    )
    use_features = args.features and task.features.shape[1] > 0
    seen = task.features[train_set.task.items["beat"]] if use_features else None
    features = (
        (torch.from_numpy(seen.mean(0)), torch.from_numpy(seen.std(0) + 1e-3)) if use_features else None
    )
    # the data set draws, so nothing is shuffled; a generator of its own keeps the loader from moving dropout's on a resume
    loader = DataLoader(
        train_set,
        args.batch_size,
        drop_last=True,
        num_workers=args.workers,
        worker_init_fn=loader_worker,
        generator=torch.Generator(),
    )

    model = make_model(
        args, config | {"signal_len": signal_len}, len(classes), task.features.shape[1] if use_features else 0
    )
    if args.freeze:
        model.encoder_model.requires_grad_(False)
    if args.compare:
        train_set.usual = usual_tokens(model, store, train, accelerator.device)
        if val_set:
            val_set.usual = train_set.usual
    optimizer = torch.optim.AdamW(layer_groups(model, args.lr, args.layer_decay, args.weight_decay))
    out = open_run(args.out, args, accelerator, args.resume, args.overwrite)
    stop = StopSignal(accelerator)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    plain, device = accelerator.unwrap_model(model), accelerator.device
    state = {"step": 0, "epoch": 0, "batch": 0, "best": -1.0, "tau": 0.0}
    if args.resume and (path := find_resume(out, accelerator)):
        state = load_step(accelerator, path)
        accelerator.print(f"resumed from {path}")
    if accelerator.is_main_process:
        contents = lambda part: (
            f"{len(set(part.task.items['record']))} records, windows {dict(zip(classes, part.task.counts().tolist()))}"
        )
        print(
            f"{describe(plain)} | training {contents(train_set)} | validation {contents(val_set) if val_set else 'none'} | "
            f"batch {size} | {args.max_steps} steps, lr {args.lr:g}"
        )
    log = Log(out, accelerator, args.max_steps, state["step"])
    feature_lists = None if features is None else [f.tolist() for f in features]

    def evaluate():
        """Score the validation part on the main process; keep the weights if they are the best so far."""
        if accelerator.is_main_process:
            tau, result, value = 0.0, {}, -1.0
            if val_set:
                tau, result, value = validate(plain, val_set, features, shift, device)
                log.log(
                    state["step"],
                    **{f"val_{name}": result[name] for name in ("macro_f1", "accuracy", "auroc")},
                    tau=tau,
                )
            if not val_set or args.select == "last" or value > state["best"]:
                state.update(best=float(value), tau=tau)
                card = {
                    "task": args.task,
                    "classes": classes,
                    "features": feature_lists,
                    "shift": shift.tolist(),
                    "tau": tau,
                }
                save_model(out / "model.safetensors", plain, **card, step=state["step"])
                atomic_write(
                    out / "metrics.json",
                    json.dumps({"step": state["step"], "tau": tau, "validation": result}, indent=1),
                )
        accelerator.wait_for_everyone()

    tick = time.perf_counter()
    while state["step"] < args.max_steps:
        train_set.set_epoch(state["epoch"])
        loader.set_epoch(state["epoch"])
        for batch in accelerator.skip_first_batches(loader, state["batch"]):
            with accelerator.accumulate(model):
                numbers = (
                    None
                    if features is None
                    else (batch["features"] - features[0].to(device)) / features[1].to(device)
                )
                logits = model(batch["x"], only_padded(batch["real"]), numbers, batch.get("usual"))
                loss = loss_of(
                    logits, batch, args.label_smoothing, None if weights is None else weights.to(device)
                )
                check_finite(loss.detach(), state["step"], batch["name"], out)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    grad = accelerator.clip_grad_norm_(model.parameters(), args.clip)
                    warmup = args.max_steps // 20
                    rate = (
                        lr_at(state["step"], args.max_steps, warmup, args.lr, 0.0)
                        if args.schedule == "cosine" or state["step"] < warmup
                        else args.lr
                    )
                    for group in optimizer.param_groups:
                        group["lr"] = rate * group["scale"]
                optimizer.step()
                optimizer.zero_grad()
            state["batch"] += 1
            if not accelerator.sync_gradients:
                continue
            state["step"] += 1
            done = state["step"] == args.max_steps
            if state["step"] % args.log_every == 0 or done:
                log.log(
                    state["step"],
                    loss=accelerator.gather(loss.detach()[None]).mean(),
                    lr=rate,
                    grad=grad,
                    steps_per_s=args.log_every / (time.perf_counter() - tick),
                )
                tick = time.perf_counter()
            if state["step"] % args.eval_every == 0 or done:
                evaluate()
            if stop():
                stop.leave(save_step(accelerator, out, state))
            if state["step"] % args.save_every == 0 or done:
                save_step(accelerator, out, state)
            if done:
                break
        else:
            state["epoch"], state["batch"] = state["epoch"] + 1, 0
    log.close()
    if accelerator.is_main_process and val_set:
        kept = json.loads((out / "metrics.json").read_text())
        print(f"validation, step {kept['step']}: {describe_scores(kept['validation'])}")
    accelerator.print(
        f"done; classifier in {out / 'model.safetensors'}; score the test records with cwt_mae/test.py"
    )
    accelerator.end_training()


if __name__ == "__main__":
    run(main, parse_args())
