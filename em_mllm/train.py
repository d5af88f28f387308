"""Join the signal encoder to a language model and train them on questions about signals (upstream
train_mllm.py).

    python em_mllm/train.py --task-dir data/em_mllm/train --llm-model-path data/em_mllm/llm \\
        --signal-encoder-path runs/em_mllm/pretrain/encoder --output-dir runs/em_mllm/base
    torchrun --nproc_per_node=4 em_mllm/train.py ... --llm-model-path 9G4B --use-lora \\
        --freeze-signal-encoder --precision bf16 --dtype bfloat16

Writes out/model/ (adapter or language model, tokenizer, projector, encoder), which test.py and
model.load_model read, and out/metrics.json with the validation loss. Signals stand before the text:
[<IQ_START>] IQ [<IQ_END>] question answer. The loss is the mean over the tokens of the answers.
"""

import copy
import math
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
from torch.utils.data import Subset

from common.arguments import Parser, add_run_arguments, number, refuse
from common.checkpoint import atomic_json
from common.errors import UserError, run
from common.files import read_json
from common.llm import add_trust_argument
from common.run import describe, open_run, seed_everything
from common.sharding import export_model, keep_trained, prepare
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
    watched,
)
from em_mllm.dataset import (
    Augmentation,
    QuestionCollator,
    QuestionDataset,
    add_augmentation_arguments,
    check_points,
    collate_iq,
    refuse_shared,
    task_pairs,
)
from em_mllm.em_foundation.utils.utils import read_config, signal_of
from em_mllm.model import (
    LORA_TARGETS,
    PROJECTORS,
    base_folder,
    build_model,
    load_model,
    load_tokenizer,
    read_notes,
    save_model,
    set_trainable,
)
from em_mllm.optim import add_optimizer_argument, make_optimizers
from em_mllm.options import extract_letter, parse_options
from em_mllm.prepare import AS_RECORDED, SignalSpec, as_learned
from em_mllm.signal_file import DEFAULT_FS, HERTZ

# what checkpoints keep of the evaluations: the lowest loss, the newest, and evaluations since the lowest
NOTHING_SEEN = {"best_loss": None, "best_step": 0, "seen_loss": None, "seen_step": None, "waited": 0}
HELD_OUT = 50  # items held out for validation where no --val-dir is given, as upstream


def parse_args(argv=None):
    parser = Parser(__doc__)

    add_data_arguments(parser.add_argument_group("data"))
    add_model_arguments(parser.add_argument_group("model"))
    add_optimizer_arguments(parser.add_argument_group("optimizer"))

    # the seed's recipe: linear decay after 10 % warm-up; it does not clip, which is --clip 0
    add_run_arguments(parser, out=Path("output"), lr=1e-4, batch_size=4, epochs=3.0, warmup=0.1)
    return parser.parse_args(argv)


def add_data_arguments(group):
    """The questions and their signals, and what is done to them before the model reads them."""
    # every x.h5 has its x.json, as in the seed; both may also be named one by one
    group.add_argument("--task-dir", type=Path, help="folder in which every x.h5 has its x.json")
    group.add_argument("--task-files", type=Path, nargs="+", help="instead of it: h5 json h5 json ...")
    group.add_argument(
        "--val-dir",
        type=Path,
        help=f"such a folder for validation; without it {HELD_OUT} items, and every other question about "
        "their signals, are held out",
    )

    # the encoder is costly and a question is short: n of them can share one pass over their signal
    group.add_argument(
        "--questions-per-signal",
        type=number(int, 0),
        default=0,
        help="n above 0: an item is a signal with n of its questions, encoded once; 0: an item is a question",
    )

    # what is done to the recorded samples: augmentations are drawn anew each epoch, the rest is kept with
    # the model, because test.py must do the same
    add_augmentation_arguments(group)
    group.add_argument(
        "--fs", type=HERTZ, default=DEFAULT_FS, help="sampling rate in Hz of files without the attribute fs"
    )
    group.add_argument(
        "--remove-dc", action="store_true", help="take the mean off the recorded samples of every signal"
    )
    group.add_argument(
        "--resample",
        action="store_true",
        help="let the model bring signals of other sampling rates to the nearest one of training",
    )

    # what cannot be used stops the run before anything is written: left out in silence, it would be missed
    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out and count unusable questions and signals instead of stopping",
    )


def add_model_arguments(group):
    """The parts of the model, what of it is trained, and the layout of the text."""
    # the two parts, or the model of an earlier run, which holds or names both
    group.add_argument("--signal-encoder-path", type=Path, help="folder of the encoder, or its weight file")
    group.add_argument(
        "--llm-model-path",
        type=Path,
        help="folder of any causal language model and its tokenizer; FM9G-4B: 9G4B/",
    )
    group.add_argument(
        "--trained-dir",
        type=Path,
        help="model/ folder of an earlier run to continue from, instead of the two paths; a new run with a "
        "new optimizer",
    )

    # between the parts: the language model takes vectors of its own width, and as many as it is given
    group.add_argument(
        "--projector",
        choices=PROJECTORS,
        default="linear",
        help="from encoder to language model. linear: the seed's; mlp: the starter kit's; merlin: MERLIN's",
    )
    group.add_argument(
        "--align-projector",
        action="store_true",
        help="start a linear projector where least squares put it: signals near the words of their answers",
    )
    group.add_argument(
        "--signal-tokens",
        type=number(int, 0),
        default=0,
        help="vectors per signal that the language model reads: n means over equal stretches and the cls "
        "vector; 0: one per patch",
    )

    group.add_argument(
        "--attention-type",
        choices=("eager", "sdpa", "fa2"),
        default="sdpa",
        help="attention of the encoder; fa2: variable-length kernel on CUDA",
    )

    # the text; one that is too long is refused, where upstream cuts it on the right and so loses the answer
    group.add_argument(
        "--max-length",
        type=number(int, 1),
        default=512,
        help="largest number of text tokens of a question with its answer",
    )
    group.add_argument(
        "--chat-template",
        action="store_true",
        help="lay the text out by the tokenizer's chat template instead of question eos answer eos",
    )

    add_trained_arguments(group)

    # for the starter kit's checkpoints: no patch sees another, the loss is over question and padding, too
    group.add_argument(
        "--legacy",
        action="store_true",
        help="the starter kit's arithmetic and labels, for those who hold its checkpoints",
    )
    add_trust_argument(group)


def add_trained_arguments(group):
    """What of the model is trained."""
    # what is trained beside the projector and the vectors of <IQ_START> and <IQ_END>, which always are
    group.add_argument(
        "--freeze-llm", action="store_true", help="do not train the language model, its head included"
    )
    group.add_argument("--freeze-signal-encoder", action="store_true", help="do not train the encoder")
    group.add_argument(
        "--use-lora",
        action="store_true",
        help="train LoRA adapters on the language model, which stays frozen",
    )
    group.add_argument(
        "--load-in-4bit",
        action="store_true",
        help="read the language model, which is not trained itself, in 4-bit numbers (QLoRA); needs "
        "bitsandbytes",
    )
    add_lora_arguments(group)


def add_lora_arguments(group):
    """What the adapters of --use-lora are like."""
    group.add_argument("--lora-r", type=number(int, 1), default=8, help="rank of the adapters")
    group.add_argument(
        "--lora-alpha", type=number(float, 0), default=16, help="strength of the adapters is alpha / r"
    )
    group.add_argument(
        "--lora-dropout", type=number(float, 0, 1), default=0.1, help="dropout before the adapters"
    )
    group.add_argument(
        "--lora-targets",
        nargs="+",
        default=list(LORA_TARGETS),
        help="names of the layers that get an adapter",
    )


def add_optimizer_arguments(group):
    """How the steps are made, which weights are kept, and what saves memory."""
    # which steps are made, and which weights become the model: with --eval-every the best, not the last
    add_optimizer_argument(group)
    group.add_argument(
        "--schedule",
        choices=("linear", "cosine"),
        default="linear",
        help="decay of the learning rate after warm-up",
    )
    group.add_argument(
        "--select",
        choices=("best", "last"),
        default="best",
        help="which weights become the model: of the lowest validation loss at --eval-every, or the last",
    )
    group.add_argument(
        "--patience",
        type=number(int, 0),
        default=0,
        help="stop after this many evaluations in a row without a lower validation loss; 0: never",
    )

    # less memory. Weights that are trained stay float32, or small updates are lost in bfloat16's rounding
    # (upstream stores them in fp16, where AdamW made them nan)
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="number format in which the language model is stored; bfloat16 for a frozen or adapted one",
    )
    group.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, a third more time",
    )


# under other settings the stored weights would mean something else: these are taken over, not given anew
INHERITED = {  # option: what multimodal.json calls it
    "projector": "projector",
    "signal_tokens": "signal_tokens",
    "legacy": "legacy",
    "dtype": "dtype",
    "load_in_4bit": "load_in_4bit",
    "chat_template": "chat",
    "remove_dc": "remove_dc",
    "resample": "resample",
}


def check_options(args):
    """Refuse what is missing and what would have no effect; take over what --trained-dir holds."""
    if args.task_dir:
        refuse(args, ["task_files"], "beside --task-dir")

    # both parts are needed, and --trained-dir brings both
    if args.trained_dir:
        inherit(args)
    else:
        for name in ("signal_encoder_path", "llm_model_path"):
            if getattr(args, name) is None:
                raise UserError(f"--{name.replace('_', '-')} is missing; give the folder, or --trained-dir")

    # least squares give one linear layer, before it is trained, on the features of today's arithmetic
    if args.legacy:
        refuse(args, ["signal_tokens", "align_projector"], "beside --legacy")
    if args.trained_dir:
        refuse(args, ["align_projector"], "beside --trained-dir, whose projector is trained")
    if args.projector != "linear":
        refuse(args, ["align_projector"], f"on --projector {args.projector}")

    # without evaluations there is one validation loss, of the last step: nothing to choose or to wait for
    if not args.eval_every:
        refuse(args, ["select", "patience"], "without --eval-every")

    # gradients reach the adapters through 4-bit numbers, but cannot change these
    if args.load_in_4bit and not (args.use_lora or args.freeze_llm):
        raise UserError("--load-in-4bit: 4-bit numbers cannot be trained; add --use-lora or --freeze-llm")
    if not args.use_lora:
        refuse(args, ["lora_r", "lora_alpha", "lora_dropout", "lora_targets"], "without --use-lora")


def contradiction(args, name: str, stored):
    """Refuse an option that says otherwise than the model of --trained-dir; one that agrees is let pass."""
    given = getattr(args, name)
    # a default contradicts nothing, only what stands on the command line
    if name in args._given and given != stored:
        shown = " ".join(map(str, given)) if isinstance(given, list) else given
        raise UserError(
            f"--{name.replace('_', '-')} {shown} has no effect beside --trained-dir, whose model has "
            f"{stored}; leave it out"
        )


def inherit(args):
    """Take the settings of the model in --trained-dir over into `args`; refuse options that contradict them.

    --max-length and --fs are of the questions and files, so they may be given anew.
    """
    notes = read_notes(args.trained_dir)
    base_folder(args.trained_dir, notes, args.llm_model_path)  # for its error where the model is missing

    # remove_dc and resample stand in "signal"; what an earlier edition did not know is off
    held = {**notes, **(notes.get("signal") or {})}
    for name, key in INHERITED.items():
        stored = held.get(key, False)
        contradiction(args, name, stored)
        setattr(args, name, stored)

    for name, key in (("max_length", "max_length"), ("fs", "default_fs")):
        if name not in args._given:
            setattr(args, name, notes.get(key, getattr(args, name)))

    # the encoder is the folder's own; the path that the first run took it from may be given again
    encoder = read_config(args.trained_dir / "signal_encoder")
    contradiction(args, "attention_type", encoder.attention_type)
    if args.signal_encoder_path is not None:
        first = (notes.get("lineage") or [{}])[0].get("signal_encoder_path")
        if first != str(args.signal_encoder_path.resolve()):
            raise UserError(
                f"--signal-encoder-path {args.signal_encoder_path} has no effect beside --trained-dir, which "
                "holds its encoder; leave it out"
            )

    # adapters of the earlier run go on with the sizes they have; peft stores their targets in any order
    if args.use_lora and notes["llm"] == "adapter":
        stored = read_json(args.trained_dir / "llm/adapter_config.json")
        held = {"lora_r": stored["r"], **{f"lora_{k}": stored[f"lora_{k}"] for k in ("alpha", "dropout")}}
        held["lora_targets"], args.lora_targets = sorted(stored["target_modules"]), sorted(args.lora_targets)
        for name, value in held.items():
            contradiction(args, name, value)
            setattr(args, name, value)


def make_data(args, tokenizer):
    """Read the questions; returns (all training questions, training set, validation set).

    The validation set is --val-dir, or HELD_OUT items of a seeded shuffle, at most a tenth, at least one; no
    signal of theirs is in the training set, and they are not augmented.
    """
    # both sets are read alike, or their losses could not be compared
    common = dict(tokenizer=tokenizer, max_length=args.max_length, chat=args.chat_template)
    common |= dict(skip_bad=args.skip_bad, default_fs=args.fs)

    # reading checks every question and every signal
    source = QuestionDataset(
        task_pairs(args.task_dir, args.task_files),
        questions_per_signal=args.questions_per_signal,
        seed=args.seed,
        augmentation=Augmentation.of(args),
        **common,
    )

    # what the model is to read of a signal follows from the files: longest signal, sampling rates, view
    if all(file.fs_stated for file in source.files):
        refuse(args, ["fs"], "where every file states its own")
    source.prepare_for(trained_signal(args, source.signal))

    # files of validation: other signals, read as the training signals are
    if args.val_dir:
        val = QuestionDataset(task_pairs(args.val_dir), signal=source.signal, **common)
        refuse_shared(source.files, val.files, "--val-dir")
        return source, source, val

    # upstream holds out the first 50 of a shuffle with seed 42; here also every other question about their
    # signals leaves the training set, or the validation loss would measure what was learned by heart
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(42)).tolist()
    held = order[: min(HELD_OUT, max(1, len(source) // 10))]
    shown = set().union(*(source.signals_of(i) for i in held))
    kept = [i for i in order[len(held) :] if shown.isdisjoint(source.signals_of(i))]
    if not kept:
        raise UserError("--val-dir is missing: all questions are about one signal, held out for validation")

    # the copy shares the questions in memory; it stays in epoch 0, so that all evaluations draw the same
    plain = copy.copy(source)
    plain.augmentation = Augmentation()
    return source, Subset(source, kept), Subset(plain, held)


def trained_signal(args, found: SignalSpec) -> SignalSpec:
    """The specification of the model's signals: of these files, or of --trained-dir with their rates
    added."""
    stored = read_notes(args.trained_dir).get("signal") if args.trained_dir else None
    if stored is None:  # a new model, or one of an edition that stored none
        encoder = args.trained_dir / "signal_encoder" if args.trained_dir else args.signal_encoder_path
        found = as_learned(found, signal_of(encoder))
        return replace(found, remove_dc=args.remove_dc, resample=args.resample)

    # a model that resamples brings the new signals to its own rates
    spec, view = SignalSpec.from_json(stored), (found.view, found.factor)
    if spec.resample or view not in (AS_RECORDED, (spec.view, spec.factor)):
        return spec  # rows of another view are refused when they are read

    # recorded samples go through the model's view, after which they are fewer and slower
    share = spec.factor // found.factor
    rates = tuple(sorted({*spec.rates, *(rate / share for rate in found.rates)}))
    return replace(spec, points=max(spec.points, found.points // share), rates=rates)


def make_model(args, files, signal: SignalSpec | None = None):
    """Build the model from the two paths, or read it from --trained-dir; choose what is trained.

    Returns (model, tokenizer). Raises UserError when a signal of `files`, read as `signal` says, is longer
    than the encoder takes.
    """
    check_options(args)
    # an earlier run brings everything along; what contradicts it was refused above
    if args.trained_dir:
        model, tokenizer = load_model(args.trained_dir, args.llm_model_path, args.trust_remote_code)
    else:
        model, tokenizer = build_model(
            args.llm_model_path,
            args.signal_encoder_path,
            args.projector,
            args.signal_tokens,
            args.dtype,
            args.legacy,
            args.trust_remote_code,
            args.attention_type,
            args.load_in_4bit,
        )

    check_points(model.signal_encoder.config, files, signal or SignalSpec())

    # before the optimizer, which collects what is trained
    lora = dict(r=args.lora_r, alpha=args.lora_alpha, dropout=args.lora_dropout, targets=args.lora_targets)
    set_trainable(model, args.freeze_llm, args.freeze_signal_encoder, args.use_lora, lora)

    # of the parts that can: the convolutional encoder cannot
    if args.gradient_checkpointing:
        for part in (p for p in (model.llm, model.signal_encoder) if p.supports_gradient_checkpointing):
            part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, tokenizer


def make_loaders(args, model, tokenizer, train_set, val_set):
    """Loaders of the training and the validation items.

    A batch holds whole items, so with --questions-per-signal its texts are more than --batch-size; a signal
    stands in it once.
    """
    patch = model.signal_encoder.config.patch_size[0]
    collate = QuestionCollator(patch, tokenizer.pad_token_id, model.legacy)
    val_loader = make_loader(val_set, args, train=False, collate_fn=collate)
    return make_loader(train_set, args, collate_fn=collate), val_loader


@torch.no_grad()
def align_projector(model, tokenizer, train_set: QuestionDataset | Subset, most=2048, ridge=1.0):
    """Fit the linear projector by least squares: features of a signal -> mean embedding of the words that its
    answer names, of up to `most` training questions. The language model then begins with words that it knows.
    """
    source, items = train_set, range(len(train_set))
    if isinstance(train_set, Subset):  # without the questions held out for validation
        source, items = train_set.dataset, train_set.indices
    learned = {int(row) for i in items for row in source.rows[source.ends[i] : source.ends[i + 1]]}

    # questions about one signal whose answer is the name of an option; seed 0 on all processes, which all
    # solve the same system and must begin with equal weights
    rows, names = [], []
    for row in torch.randperm(len(source.records), generator=torch.Generator().manual_seed(0)).tolist():
        if row not in learned:
            continue
        record = source.records[row]
        options = parse_options(record)
        name = options.get(extract_letter(record["answer"], options)) if options else None
        if name and isinstance(record["iq_index_in_h5"], int):
            rows.append(row)
            names.append(name)
        if len(rows) == most:
            break
    if not rows:
        raise UserError("--align-projector has no effect: no question has options and an answer among them")

    # where each name lies: the mean of its tokens, as long as a typical row, because a mean is shorter
    table, words = model.llm.get_input_embeddings().weight.float().cpu(), {}
    for name in set(names):
        ids = tokenizer(name, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        mean = table[ids].mean(0)
        words[name] = mean * table.norm(dim=1).mean() / mean.norm() * model.text_scale

    # every valid patch is to give the name of its signal: x (R, D), y (R, d_llm), without the factor that
    # `embed` puts on signal vectors
    inputs, targets = [], []
    model.signal_encoder.eval()  # or batch norms would take the means of each 64 signals, and keep them
    for first in range(0, len(rows), 64):
        some = [source.signal_at(row) for row in rows[first : first + 64]]
        iq, lengths = collate_iq([x for x, _ in some], model.signal_encoder.config.patch_size[0])
        features, valid = model.signal_features(iq, lengths, torch.tensor([fs for _, fs in some]))
        inputs.append(features[valid])
        vectors = torch.stack([words[name] for name in names[first : first + 64]])
        targets.append(vectors.repeat_interleave(valid.sum(1), 0))
    x, y = torch.cat(inputs).double(), torch.cat(targets).double() / model.signal_scale

    # ridge regression around the means, in float64: features that move together make `gram` nearly singular
    centre, level = x.mean(0), y.mean(0)
    gram = (x - centre).T @ (x - centre) + ridge * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, (x - centre).T @ (y - level)).T

    model.signal_to_hidden.weight.copy_(weight)
    model.signal_to_hidden.bias.copy_(level - weight @ centre)
    print(f"projector aligned with the answers to {len(rows)} training questions")


def answer_tokens(batch):
    """Number of tokens that the mean loss of a batch is over."""
    return (batch["labels"] != -100).sum()


@torch.no_grad()
def validation_loss(model, loader, accelerator) -> float:
    """Mean loss per answer token over the validation set and all processes.

    Several processes show the first items twice where the last batches would be unequal.
    """
    # [summed loss, tokens]: a mean of the batches' means would weigh the tokens of short answers more
    model.eval()
    total = torch.zeros(2, device=accelerator.device)  # float32: some accelerators reduce no float64
    for batch in loader:
        batch.pop("rows")  # no input of the model
        count = answer_tokens(batch)
        total += torch.stack([model(**batch)["loss"].float() * count, count.float()])

    model.train()
    total = accelerator.reduce(total, "sum")
    return float(total[0] / total[1].clamp(min=1))


def save(args, model, tokenizer, source):
    """Write out/model with the contract of its texts and signals, and with the runs that it comes from."""
    # the lineage grows by one entry a run: which files the weights come from, and what each run trained
    before = read_notes(args.trained_dir) if args.trained_dir else {}
    step = {
        "trained_dir": args.trained_dir and str(args.trained_dir.resolve()),
        "signal_encoder_path": args.signal_encoder_path and str(args.signal_encoder_path.resolve()),
        "language_model": "adapter" if args.use_lora else "frozen" if args.freeze_llm else "full",
        "signal_encoder": "frozen" if args.freeze_signal_encoder else "full",
    }

    # with them goes all that test.py must repeat to ask as here: layout of the text, signals, wordings
    model.signal_encoder.config.signal = source.signal.to_json()
    save_model(
        args.out / "model",
        model,
        tokenizer,
        args.llm_model_path or before["llm_model_path"],
        chat=args.chat_template,
        max_length=args.max_length,
        default_fs=args.fs,
        signal=source.signal.to_json(),
        wordings={**before.get("wordings", {}), **source.wordings},
        lineage=[*before.get("lineage", []), step],
    )


def keep_best(args, training, model, tokenizer, source, loss: float):
    """Note an evaluation, and write the model where its loss is the lowest so far, unless --select last says
    otherwise; after --patience evaluations without a lower one the run ends with this step."""
    state = training.state
    state |= {"seen_loss": loss, "seen_step": state["step"]}
    better = math.isfinite(loss) and (state["best_loss"] is None or loss < state["best_loss"])
    state["waited"] = 0 if better else state["waited"] + 1
    if better:
        state |= {"best_loss": loss, "best_step": state["step"]}
        # at once, because the next step changes the weights
        if args.select == "best":
            write_model(args, training, model, tokenizer, source)
    stop_waiting(args, training)


def write_model(args, training, model, tokenizer, source):
    """Write the model as it is now."""
    whole = export_model(training.accelerator, model)  # all processes take part, in case it is sharded
    if training.accelerator.is_main_process:
        save(args, whole, tokenizer, source)


def stop_waiting(args, training):
    """Make the step just made the last one where --patience is used up."""
    if args.patience and training.state["waited"] >= args.patience:
        training.steps = training.state["step"]


def report(args, state: dict, skipped: dict):
    """Write metrics.json and say what became of the run."""
    # the numbers are those of the model that was written, which need not be the last step's
    which = "seen" if args.select == "last" else "best"
    loss, step = state[f"{which}_loss"], state[f"{which}_step"]
    told = {"step": state["step"], "best_step": step, "validation_loss": loss, "skipped": skipped}
    atomic_json(args.out / "metrics.json", told)
    print(f"validation loss {loss:.4f} per answer token at step {step}; model in {args.out / 'model'}")


def main(args):
    # questions and model; everything is checked before anything is written
    check_options(args)
    accelerator = make_accelerator(args)
    seed_everything(args.seed)  # without the rank: equal weights on all processes

    # the tokenizer first and alone: a faulty question is told before the language model takes its minutes
    where = args.trained_dir / "tokenizer" if args.trained_dir else args.llm_model_path
    source, train_set, val_set = make_data(args, load_tokenizer(where, args.trust_remote_code))
    model, tokenizer = make_model(args, source.files, source.signal)
    if args.align_projector:
        align_projector(model, tokenizer, train_set)

    # loaders and optimizer
    loader, val_loader = make_loaders(args, model, tokenizer, train_set, val_set)
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    about = describe(model)  # before `prepare`, which may spread the parameters
    if args.compile:
        model.compile()
    model, loader, val_loader, *optimizers = prepare(accelerator, model, loader, val_loader, *optimizers)
    keep_trained(accelerator)  # frozen weights come back with the paths that the run began with
    steps = plan_steps(args, loader)

    # the run folder, and what is about to happen in one line
    open_run(args.out, args, accelerator, args.resume, args.overwrite)
    skipped = ", ".join(f"{n} x {why}" for why, n in source.skipped.items()) or "none"
    accelerator.print(
        f"{about}; {len(train_set)} training and {len(val_set)} validation items ({len(source.records)} "
        f"questions), skipped: {skipped}; {args.batch_size} x {accelerator.num_processes} x {args.accum} "
        f"items a step, {steps} steps, lr {args.lr:g}"
    )

    # what an evaluation at --eval-every is; a stop signal may end it
    def scores():
        loss = validation_loss(model, watched(training, val_loader), accelerator)
        keep_best(args, training, model, tokenizer, source, loss)
        return {"val_loss": loss}

    # the loop: `share` weighs the answer tokens of all micro-batches and processes of a step alike
    training = start(accelerator, args, steps, optimizers, scores, **NOTHING_SEEN)
    stop_waiting(args, training)  # a run that --patience ended stays ended under --resume
    model.train()
    for batch, share in batches(training, loader, answer_tokens):
        rows = batch.pop("rows")  # which questions: for a message, not for the model
        with accelerator.accumulate(model):
            # signals go before the text, the loss is the mean over this batch's answer tokens: to change it,
            # see MultiModalModel.forward
            loss = model(**batch)["loss"] * share
            check_finite(training, (source.name(int(row)) for row in rows), loss)
            accelerator.backward(loss)

            # `steps` stays the planned number, also where --patience ends the run earlier
            factor = lr_at(training.state["step"], steps, args.warmup, args.schedule)
            grad = update(training, model, optimizers, factor)
        if accelerator.sync_gradients:
            finish_step(training, grad=grad)  # validate where it is due, log, save, stop

    # the last weights and their loss on validation questions, unless --patience ended the run by just that
    state, closing = training.state, {}
    if state["seen_step"] != state["step"]:
        closing = {"val_loss": validation_loss(model, val_loader, accelerator)}
        keep_best(args, training, model, tokenizer, source, closing["val_loss"])
    if args.select == "last":
        write_model(args, training, model, tokenizer, source)
    elif state["best_loss"] is None:
        raise UserError("no validation loss is finite, so that no model is the best; take --select last")

    if accelerator.is_main_process:
        report(args, state, source.skipped)
    finish(training, **closing)
    meet()


if __name__ == "__main__":
    run(main, parse_args())
