"""Control without wavelets and pre-training: a small convolutional network on the windows that finetune.py
and test.py get.

    python studies/cwt_mae/cnn.py --task beat --data FOLDER --out runs/cwt_mae/cnn

105,000 parameters for beats; windows and features are drawn and augmented alike. Trains and scores the test
part in one go.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch
import torch.nn as nn

from common.arguments import Parser, add_run_arguments, refuse
from common.checkpoint import atomic_json
from common.errors import run
from common.figures import draw_confusion
from common.run import describe, open_run, seed_everything
from common.together import meet
from common.train import (
    batches,
    check_finite,
    finish,
    finish_step,
    lr_at,
    make_accelerator,
    make_loader,
    parameter_groups,
    plan_steps,
    start,
    update,
)
from cwt_mae.dataset_finetune import DownstreamClassificationDataset, median_beats
from cwt_mae.finetune import (
    add_drawing_arguments,
    corrected,
    feature_scale,
    loss_of,
    predict,
    prior_shift,
    standardised,
    validate,
)
from cwt_mae.metrics import describe_scores, scores
from studies.cwt_mae.windows import add_window_arguments, split_windows


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_window_arguments(parser)
    add_drawing_arguments(parser, augment=1.0, jitter=2)
    defaults = dict(max_steps=1000, epochs=30.0, batch_size=64, lr=2e-3, weight_decay=0.05, save_every=0)
    add_run_arguments(parser, omit=["eval_every"], **defaults)
    return parser.parse_args(argv)


class SmallCNN(nn.Module):
    """Three pairs of convolutions with pooling, and an MLP head on the middle third in time, or on mean and
    maximum."""

    def __init__(self, signal_len: int, num_classes: int, num_features: int, centred: bool):
        super().__init__()
        widths, layers, self.centred = (2 if centred else 1, 32, 48, 64), [], centred
        for before, after in zip(widths, widths[1:]):
            layers += [nn.Conv1d(before, after, 7, padding=3), nn.BatchNorm1d(after), nn.ReLU()]
            layers += [nn.Conv1d(after, after, 5, padding=2), nn.BatchNorm1d(after), nn.ReLU()]
            layers += [nn.MaxPool1d(2)]
        self.body, self.columns = nn.Sequential(*layers), signal_len // 8
        joined = 64 * len(range(self.columns)[self.middle()]) if centred else 128
        self.head = nn.Sequential(
            nn.Dropout(0.5), nn.Linear(joined, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, num_classes)
        )
        if num_features:  # beside it, as in TF_MAE_Classifier
            self.feature_head = nn.Sequential(
                nn.Linear(num_features, 64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, num_classes)
            )

    def middle(self) -> slice:
        """The middle third of the time columns."""
        return slice(self.columns // 3, self.columns - self.columns // 3)

    def forward(self, x, real=None, features=None, median_beat=None):
        """x (B, L), for beats the record's median beat (B, L) -> logits (B, C). real is not needed: padding
        is zero."""
        y = self.body(torch.stack([x, x - median_beat], 1) if self.centred else x[:, None])
        y = y[:, :, self.middle()].flatten(1) if self.centred else torch.cat([y.mean(2), y.amax(2)], 1)
        return self.head(y) if features is None else self.head(y) + self.feature_head(features)


def dataset_of(args, store, task, **options) -> DownstreamClassificationDataset:
    """Windows of a task; beats come with the median beat of their record."""
    dataset = DownstreamClassificationDataset(store, task, args.signal_len, args.seed, **options)
    if task.kind == "beat":
        dataset.median_beats = median_beats(lambda x, real: x, store, task, args.signal_len)
    return dataset


def main(args):
    accelerator = make_accelerator(args)
    seed_everything(args.seed)
    if args.task != "beat":
        refuse(args, ["amplitude", "fibrillation"], f"for --task {args.task}")

    # Data: an epoch draws as many windows as there are, at least those of one step
    windows = split_windows(args)
    train_set = dataset_of(
        args,
        windows.store,
        windows.train,
        draws=max(len(windows.train.items), args.batch_size * args.accum * accelerator.num_processes),
        power=args.sampling_power,
        strength=args.augment,
        jitter=args.jitter,
        fibrillation_fraction=args.fibrillation,
    )
    scale = feature_scale(windows.train)
    loader = make_loader(train_set, args, shuffle=False)

    # Model and optimizer
    classes = windows.train.classes
    model = SmallCNN(args.signal_len, len(classes), windows.train.features.shape[1], args.task == "beat")
    optimizer = torch.optim.AdamW(parameter_groups(model, args.lr, args.weight_decay))
    if args.compile:
        model.compile()
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = plan_steps(args, loader)
    out = open_run(args.out, args, accelerator, args.resume, args.overwrite)
    accelerator.print(f"{describe(model)} | {len(windows.train.items)} training windows | {steps} steps")

    training = start(accelerator, args, steps, [optimizer])
    model.train()
    for batch, share in batches(training, loader):
        with accelerator.accumulate(model):
            features = standardised(batch, scale, accelerator.device)
            logits = model(batch["x"], None, features, batch.get("median_beat"))
            loss = loss_of(logits, batch, 0.05, None) * share
            check_finite(training, batch["name"], loss=loss)
            accelerator.backward(loss)
            factor = lr_at(training.state["step"], steps, args.warmup, ramp="zero")
            grad = update(training, model, [optimizer], factor)
        if accelerator.sync_gradients:
            finish_step(training, grad=grad)

    # The prior correction is chosen on the validation part; the scored part chooses nothing
    if accelerator.is_main_process:
        plain = accelerator.unwrap_model(model)
        shift, tau = prior_shift(train_set.drawn_prior, windows.train.counts()), 0.0
        if windows.validation is not None:
            validation = dataset_of(args, windows.store, windows.validation)
            tau = validate(plain, validation, scale, shift, accelerator.device)[0]
        scored = dataset_of(args, windows.store, windows.scored)
        found = corrected(predict(plain, scored, scale, accelerator.device), shift, tau)
        save_scores(out, "cnn", found, windows, args.resamples)
    finish(training)
    meet()


def save_scores(out, kind: str, found: np.ndarray, windows, resamples: int):
    """Write metrics.json and the confusion picture of probabilities `found` (scored windows, C)."""
    task = windows.scored
    records = windows.store.recordings(task.items)
    groups = None if len(np.unique(records)) == len(records) else records
    result = scores(found, task.items["label"], task.classes, groups, resamples)
    title = f"{kind}, macro-F1 {result['macro_f1']:.3f}"
    draw_confusion(result["confusion"], task.classes, out / "figures" / "confusion.png", title)
    atomic_json(out / "metrics.json", {"kind": kind, **result})
    print(f"{kind}: {describe_scores(result)}")


if __name__ == "__main__":
    run(main, parse_args())
