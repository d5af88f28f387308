"""MAE pre-training of the signal encoder on raw IQ of mixed lengths, several signals packed into a row (arXiv
2508.00274, 2508.18785).

    python em_mllm/pretrain.py --data data/em_mllm/train --out runs/em_mllm/pretrain --preset tiny
    torchrun --nproc_per_node=8 em_mllm/pretrain.py --data /data/iq --out runs/em_mllm/base --precision bf16

--data: .h5 files with IQ_data (Num, T, 2), tar shards as "shards/{000..099}.tar" (shards.py), or folders of
them; labels are not read. Targets: the hidden patches, with --spectrum-weight the log spectra of the whole
signal, and with --contrast-weight which of two views belong together. Writes out/encoder/ (config.json,
model.safetensors with the keys sit.* and decoder.*), out/metrics.json with trivial baselines beside the
errors, and pictures of reconstructions. Upstream published no trainer.
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch
from torch.utils.data import DataLoader

from common.arguments import Parser, add_run_arguments, number, refuse
from common.checkpoint import atomic_csv, atomic_dir, atomic_json
from common.errors import UserError, run
from common.figures import new_figure, save_figure
from common.run import describe, open_run, seed_everything
from common.sharding import export_model, prepare
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
    PackedSignals,
    SignalDataset,
    add_augmentation_arguments,
    refuse_shared,
    signal_files,
)
from em_mllm.em_foundation.models import SiTMAEConfig, SiTMAEForPreTraining
from em_mllm.em_foundation.models.embedder import tokens_kept
from em_mllm.em_foundation.utils.utils import load_encoder, read_config, signal_of
from em_mllm.optim import add_optimizer_argument, make_optimizers

PRESETS = {
    "base": {"attention_type": "sdpa"},  # the published sizes: 86 M encoder, 112 M with decoder
    # learns on a CPU: 64 patches of 16 points, with cls and rate (1040 + 16) // 16 positions; position tables
    # that start as sinusoids, because short runs do not learn them from noise
    "tiny": dict(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        patch_size=(16, 1),
        max_seq_len=(1040, 1),
        decoder_hidden_size=64,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=256,
        layer_norm_eps=1e-6,
        initializer_range=0.1,
        attention_type="sdpa",
        position_init="sincos",
    ),
}


def parse_args(argv=None):
    parser = Parser(__doc__)

    add_data_arguments(parser.add_argument_group("data"))
    add_model_arguments(parser.add_argument_group("model"))

    # no trainer was published to follow: weight decay (and AdamW's betas) are those of the image MAE
    optim = parser.add_argument_group("optimizer")
    add_optimizer_argument(optim)
    optim.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, a third more time",
    )

    # --val is measured once, at the end: there is nothing for --eval-every to do
    add_run_arguments(
        parser, omit=["eval_every"], lr=1e-3, batch_size=32, max_steps=10000, weight_decay=0.05, epochs=0.0
    )
    return parser.parse_args(argv)


def add_data_arguments(group):
    """The signals, the rows that they are packed into, and what is predicted of them."""
    # signals without labels; several are packed into a row, so that mixed lengths cost little padding
    group.add_argument(
        "--data", type=Path, nargs="+", required=True, help=".h5 files, tar shards, or folders of them"
    )
    group.add_argument("--val", type=Path, nargs="+", help="the same for the closing measurement")
    group.add_argument(
        "--min-points",
        type=number(int, 0),
        default=0,
        help="crop each signal to a random length between this many points and its own, log-uniform; 0: "
        "whole",
    )
    group.add_argument(
        "--row-tokens",
        type=number(int, 0),
        default=0,
        help="tokens in a row that signals are packed into; 0: as many as the encoder has positions",
    )

    # with --noise-db and --target clean the model learns to denoise, not only to fill in
    add_augmentation_arguments(group)
    group.add_argument(
        "--target",
        choices=("signal", "clean"),
        default="signal",
        help="what is predicted: patches and spectra of the signal as it is read, or without the noise of "
        "--noise-db",
    )

    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out signals with nan, inf or only zeros instead of stopping",
    )


def add_model_arguments(group):
    """The sizes of the model, and how much of a signal is hidden from it."""
    # sizes of a preset or a file; a flag below overrules one of them where it is given, and has no default,
    # or the file's value would never count
    group.add_argument(
        "--preset", choices=PRESETS, default="base", help="sizes; base is the published 86 M encoder"
    )
    group.add_argument("--config", type=Path, help="config.json with the sizes, instead of --preset")
    group.add_argument("--init", type=Path, help="encoder weights to start from, a file or folder")
    group.add_argument(
        "--patch", type=number(int, 1), help="points per patch instead of the preset's (published: 8)"
    )
    group.add_argument(
        "--stem",
        choices=("patch", "overlap"),
        help="what a token is made of: its patch (as published), or also the visible ones beside it",
    )

    # what is predicted, and how much of the signal is left to predict it from
    group.add_argument(
        "--mask-ratio",
        type=number(float, 0, 1),
        help="fraction of the patches that is hidden (published: 0.75)",
    )
    group.add_argument(
        "--norm-pix-loss",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="standardise each target patch",
    )
    group.add_argument(
        "--spectrum-weight",
        type=number(float, 0),
        help="weight of a second target: the cls token predicts the log spectra of the signal, its powers "
        "and its envelope; without it there is none",
    )
    group.add_argument(
        "--contrast-weight",
        type=number(float, 0),
        help="weight of a third target: two views of a signal, which differ by the augmentations, find each "
        "other among those of the batch; without it there is none",
    )


def make_config(args) -> SiTMAEConfig:
    """The sizes of --config or --preset, with the flags that are given on the command line."""
    if args.config:
        refuse(args, ["preset"], "beside --config")

    # None: not given, as the file or the preset says
    names = ("stem", "mask_ratio", "norm_pix_loss", "spectrum_weight", "contrast_weight")
    own = {"patch_size": args.patch and [args.patch, 1], **{name: getattr(args, name) for name in names}}
    if args.config:
        return read_config(args.config, **own)
    try:
        return SiTMAEConfig(**{**PRESETS[args.preset], **{k: v for k, v in own.items() if v is not None}})
    except ValueError as error:
        raise UserError(str(error)) from error


def simple_guesses(patches, sample_ids, mae_mask, special):
    """Errors of reconstructions that need no model, on the hidden patches: {"zeros", "nearest", "linear"}:
    (B, M) squared error.

    nearest: copy the closest visible patch of the same signal; linear: interpolate from the last point of the
    visible patch before to the first point of the one after, as a detector of smooth signals would.
    """
    patch = patches.shape[-1] // 2  # (B, M, 2 P): P values of I, then P of Q
    nearest, linear = torch.zeros_like(patches), torch.zeros_like(patches)
    for r in range(len(patches)):
        for s in torch.unique(sample_ids[r][sample_ids[r] >= 0]):
            # places of this signal's patches in the row, behind cls and rate, and the visible ones among them
            where = torch.nonzero(sample_ids[r] == s).flatten()[special:]
            seen = where[mae_mask[r, where] == 0]
            if not len(seen):
                continue

            # no guess crosses into another signal of the row
            closest = seen[(where[:, None] - seen).abs().argmin(1)]
            nearest[r, where] = patches[r, closest]

            # t: points of the signal; known: those in visible patches; a straight line between their ends
            t = np.arange(len(where) * patch)
            known = np.concatenate([np.arange(k, k + patch) for k in ((seen - where[0]) * patch).tolist()])
            for channel in (slice(patch), slice(patch, 2 * patch)):
                wave = patches[r, where, channel].flatten().numpy()
                drawn = np.interp(t, known, wave[known]).reshape(-1, patch)
                linear[r, where, channel] = torch.tensor(drawn, dtype=patches.dtype)

    # zeros is what a guess reaches that knows nothing of the signal
    guesses = {"zeros": torch.zeros_like(patches), "nearest": nearest, "linear": linear}
    return {name: ((guess - patches) ** 2).mean(-1) for name, guess in guesses.items()}


@torch.no_grad()
def measure(model, packed, batches=16, batch_size=8):
    """Mean squared errors on `packed` and one batch to draw: {"mse_hidden": of the hidden patches, by the
    model and by simple_guesses}, and with spectrum_weight {"mse_spectrum": of the log spectra, by the model
    and by the mean over these signals}."""
    model.eval()
    config, sums, count, shown, spectra, missed = model.config, {}, 0, None, [], 0.0
    for batch in itertools.islice(DataLoader(packed, batch_size), batches):
        out = model(**{k: v.to(model.device) for k, v in batch.items()})
        mask, logits = out.mae_mask.cpu(), out.logits.float().cpu()
        patches, ids = batch["patches"], batch["sample_ids_seq"]
        errors = simple_guesses(patches, ids, mask, config.num_special)

        # the model's error in the same unit as theirs: squares of the signal, whose peak is 1
        if config.norm_pix_loss:  # predicted in units of each patch's spread: back to the signal's
            logits = logits * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
        errors["model"] = ((logits - patches) ** 2).mean(-1)

        # over hidden patches alone: what is visible need only be copied. (B, M) each
        for name, e in errors.items():
            sums[name] = sums.get(name, 0.0) + float((e * mask).sum())
        count += float(mask.sum())
        shown = shown or (patches, logits, mask, ids)

        # the spectra stand in the rows of the cls tokens; the model's loss is a mean over these signals
        if config.spectrum_weight:
            spectra.append(batch["spectrum"][(batch["patch_positions"] == 0) & (ids >= 0)])
            missed += float(out.spectrum_loss) * len(spectra[-1])

    metrics = {"mse_hidden": {name: value / max(count, 1) for name, value in sums.items()}}
    # what a guess has to beat: the mean over these signals, which knows them all
    if spectra:
        true = torch.cat(spectra)
        metrics["mse_spectrum"] = {
            "mean of these signals": float(true.var(0, unbiased=False).mean()),
            "model": missed / len(true),
        }
    return metrics, shown


def draw(shown, config, path, signals=4):
    """I of the first signals: true, what the encoder saw, and the reconstruction of the rest; the numbers in
    a .csv beside it."""
    patches, logits, mask, ids = shown  # of one batch, (B, M, 2 P) and (B, M)
    patch, special = config.patch_size[0], config.num_special
    pick = [(r, s) for r in range(len(ids)) for s in range(int(ids[r].max()) + 1)][:signals]
    # the signals stand below each other, each with a scale of its own
    figure, axes = new_figure(len(pick), 1, width=9, height=1.7, sharex=False, squeeze=False)

    table = []
    for n, (axis, (r, s)) in enumerate(zip(axes[:, 0], pick)):
        # the first 256 points; more cannot be told apart in a picture
        where = torch.nonzero(ids[r] == s).flatten()[special:][: 256 // patch]
        true, guess = patches[r, where, :patch].flatten(), logits[r, where, :patch].flatten()

        # nan leaves a gap in the line: each point is drawn either as seen or as reconstructed
        hidden = mask[r, where].repeat_interleave(patch).bool()
        seen, rebuilt = true.masked_fill(hidden, float("nan")), guess.masked_fill(~hidden, float("nan"))
        axis.plot(true, color="0.75", lw=1, label="true")
        axis.plot(seen, lw=1.6, label="seen")
        axis.plot(rebuilt, lw=1.2, label="reconstructed")
        axis.set_ylabel("I / peak")

        waves = {"true": true, "seen": seen, "reconstructed": rebuilt}
        for t in range(len(true)):
            table.append({"signal": n, "point": t, **{name: f"{w[t]:.5f}" for name, w in waves.items()}})

    # one legend is enough for all rows
    axes[0, 0].legend(ncol=3, loc="upper right", fontsize=8)
    axes[-1, 0].set_xlabel("point")
    save_figure(figure, path)
    atomic_csv(path.with_suffix(".csv"), table)


def counts(batch, mask_ratio: float):
    """Hidden patches and signals of a batch: what the losses of patches and of spectra are means over."""
    ids = batch["sample_ids_seq"]
    # known before the forward pass, because the number of visible tokens does not depend on the draw
    hidden = (ids >= 0).sum() - tokens_kept(ids, mask_ratio).sum()
    return torch.stack([hidden, (ids.amax(1) + 1).sum()])


def read_data(args, config, room: int):
    """Read the signals; returns (signals, training rows, validation rows or None). room: tokens a row."""
    # training rows: planned anew each epoch from (seed, epoch), augmented
    augmentation, second = Augmentation.of(args), bool(config.contrast_weight)
    if second and augmentation == Augmentation():
        raise UserError(
            "--contrast-weight has no effect without an augmentation, by which the two views of a signal "
            "differ; add --phase, --roll, --shift-hz or --noise-db"
        )
    learned = args.init and signal_of(args.init)
    how = dict(clean=args.target == "clean", second=second, learned=learned)
    signals = SignalDataset(signal_files(args.data), (), args.skip_bad, args.seed, augmentation, **how)
    packed = PackedSignals(signals, config, room, args.min_points, args.seed)
    if not args.val:
        return signals, packed, None

    # validation rows: other files, one plan, nothing added, so that runs with different noise can be compared
    files = signal_files(args.val, "--val")
    val = SignalDataset(files, skip_bad=args.skip_bad, learned=signals.signal.to_json())
    refuse_shared(signals.files, val.files, "--val")
    return signals, packed, PackedSignals(val, config, room, args.min_points, shuffle=False)


def make_model(args, config):
    """Encoder and decoder, from random weights or from --init."""
    # the decoder starts anew where --init holds an encoder alone
    model = SiTMAEForPreTraining(config)
    if args.init:
        load_encoder(model, args.init)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # its weights are there even where no rate is used, as upstream's; DDP waits for the gradient of each
    # trained tensor, and none would reach these
    if not config.use_fs:
        model.sit.embeddings.fs_embedder.requires_grad_(False)
    return model


def save(args, model, val, metrics: dict):
    """Write out/encoder, the closing measurement on the validation rows `val` and its picture."""
    # the decoder goes along, for a later --init; train.py and finetune.py leave it out
    with atomic_dir(args.out / "encoder") as folder:
        model.save_pretrained(folder)
    if val is not None:
        errors, shown = measure(model, val)
        metrics |= errors
        draw(shown, model.config, args.out / "figures" / "reconstruction.png")
        for name, values in errors.items():
            print(f"{name}: " + ", ".join(f"{k} {v:.5f}" for k, v in values.items()))
    atomic_json(args.out / "metrics.json", metrics)
    print(f"encoder in {args.out / 'encoder'}")


def main(args):
    # signals, packed into rows; everything is checked before anything is written
    if args.noise_db is None:
        refuse(args, ["target"], "without --noise-db")
    accelerator = make_accelerator(args)
    seed_everything(args.seed)

    # the plan of the rows needs patch size and positions: sizes come before data
    config = make_config(args)
    room = args.row_tokens or config.num_positions
    signals, packed, val = read_data(args, config, room)
    config.signal = signals.signal.to_json()

    # model, loader and optimizer; the loader keeps the order of the rows, whose plan is drawn anew each epoch
    model = make_model(args, config)
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    about = describe(model)  # before `prepare`, which may spread the parameters
    if args.compile:
        model.compile()
    loader = make_loader(packed, args, shuffle=False)
    model, loader, *optimizers = prepare(accelerator, model, loader, *optimizers)
    steps = plan_steps(args, loader)

    # the run folder, and what is about to happen
    open_run(args.out, args, accelerator, args.resume, args.overwrite)
    accelerator.print(
        f"{about}\n{len(signals)} signals ({sum(signals.skipped.values())} skipped) in {len(packed)} rows of "
        f"{room} tokens, packing efficiency {packed.efficiency:.3f}; {args.batch_size} x "
        f"{accelerator.num_processes} x {args.accum} rows a step, {steps} steps, lr {args.lr:g}"
    )

    # the loop: the shares weigh all hidden patches, and all signals, of a step alike
    training = start(accelerator, args, steps, optimizers)
    model.train()
    for batch, share in batches(training, loader, lambda batch: counts(batch, config.mask_ratio)):
        with accelerator.accumulate(model):
            # which patches are hidden comes with the batch ("noise"), so that a resumed run hides the same
            result = model(**batch)

            # result.loss is not used: the two parts are means over different things, so each has its share
            parts = {"hidden": result.hidden_loss * share[0]}
            loss = parts["hidden"]
            if config.spectrum_weight:
                parts["spectrum"] = result.spectrum_loss * share[1]
                loss = loss + config.spectrum_weight * parts["spectrum"]
            if config.contrast_weight:
                parts["contrast"] = result.contrast_loss * share[1]
                loss = loss + config.contrast_weight * parts["contrast"]

            # a row holds many signals, so the message names the batch
            state = training.state
            check_finite(
                training, [f"epoch {state['epoch']} batch {state['batch']} of {args.data[0]}"], loss, **parts
            )
            accelerator.backward(loss)
            grad = update(training, model, optimizers, lr_at(state["step"], steps, args.warmup))
        # count the step, log and save where it is due, stop when asked to
        if accelerator.sync_gradients:
            finish_step(training, grad=grad)

    # the encoder, and what it reconstructs of validation signals
    whole = export_model(accelerator, model)  # all processes take part, in case the model is sharded
    if accelerator.is_main_process:
        metrics = {"step": training.state["step"], "packing_efficiency": packed.efficiency}
        save(args, whole, val, metrics)
    finish(training)
    meet()


if __name__ == "__main__":
    run(main, parse_args())
