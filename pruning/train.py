"""Heal a pruned model: train LoRA, or all weights of the layers, for a short while.

    python pruning/train.py --pruned-model-path pruned/hf_drop23_28 --texts reports.txt --out healed
    python pruning/train.py --data data/dia_pangu --lang-model-path path/to/llm --out healed \\
        --pruned-model-path pruned/pytorch_model_pruned_drop23_28_merged_clean_v0112_en_cpu.bin \\
        --prune-map-path pruned/prune_layer_map_drop23_28_v0112_en_cpu.json
    torchrun --nproc_per_node 8 pruning/train.py ...

With --texts it heals a plain language model, with --data a report model of dia_pangu on volumes and their
reports. With --distill the loss is mixed with the distance to the unpruned model's predictions. Upstream:
after-pruning-tools/train_pruned_{CN,EN}_cli.py, which could not start: each imports from the other's file.
"""

import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.arguments import Parser, add_run_arguments, number, refuse
from common.checkpoint import atomic_dir, atomic_json
from common.errors import Interrupted, UserError, run
from common.llm import add_lora, usual_targets
from common.run import describe, open_run, seed_everything
from common.sharding import export_model, keep_trained, prepare
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
from pruning.layers import decoder, decoder_layers, longest, parse_drop_layers, plain, text_config
from pruning.pruning_tools import read_back
from pruning.pruning_tools.language_model import check_lora, copy_companions, read_map
from pruning.pruning_tools.prune_llm import VERSIONS, result_names
from pruning.repair import REPAIRS, final_norm, repair
from pruning.sensitivity_analyse.layer_sensitivity_scan import text_prompts
from pruning.sensitivity_analyse.load_model import (
    add_pruned_arguments,
    check_kind,
    check_words,
    load_model,
    read_texts,
    scorable,
)
from pruning.sensitivity_analyse.scan_methods import apply_head

TRAINED = ("lora", "last", "full")  # ways of --repair that train; the others are closed forms
LOGITS = 1 << 25  # that are held at a time in a loss: 128 MiB in float32
INPUTS = ("lang_x", "vision_x", "tokens", "attention_mask", "labels")
# Upstream's names of the schedules, and what follows the warm-up in each.
SCHEDULES = {"constant_with_warmup": "constant", "cosine": "cosine", "constant": "constant"}


def parse_args(argv=None):
    p = Parser(__doc__)
    add_model_arguments(p.add_argument_group("model"))
    add_data_arguments(p.add_argument_group("data"))
    add_healing_arguments(p.add_argument_group("healing"))

    # the defaults are those of upstream's English recipe; a healing run is short and evaluates nothing
    add_run_arguments(
        p, omit=["eval_every"], lr=5e-5, epochs=5.0, accum=8, warmup=20, weight_decay=0.0, seed=42
    )
    return p.parse_args(argv)


def add_model_arguments(group):
    # the pruned model, in the words of upstream's two scripts; what it was cut from is the teacher
    add_pruned_arguments(group)
    group.add_argument("--drop-layers", help="the layers that were removed; only checked against the map")
    group.add_argument("--teacher", type=Path, help="the unpruned checkpoint or folder, for --distill")
    group.add_argument(
        "--teacher-lang-model-path", type=Path, help="the teacher's language model, if not --lang-model-path"
    )


def add_data_arguments(group):
    # which of the two there is decides what kind of model is healed
    group.add_argument("--data", type=Path, help="a CTRG folder, to heal a report model")
    group.add_argument(
        "--texts",
        type=Path,
        help="texts for a plain language model: one a line, or .jsonl with the field text",
    )
    group.add_argument(
        "--limit", type=number(int, 0), default=0, help="use only the first samples; 0: use all"
    )

    # how texts become rows of a batch
    group.add_argument(
        "--max-length", type=number(int, 2), default=512, help="longest text in tokens; longer ones are cut"
    )
    group.add_argument(
        "--pack",
        action="store_true",
        help="join the texts and cut every --max-length tokens, without padding",
    )

    # volumes and prompts as in the training of the report model, whose flags have these names too
    group.add_argument("--cache", type=Path, help="folder for prepared volumes")
    group.add_argument(
        "--flip", type=number(float, 0, 1), default=0.02, help="share of statuses that prompts state wrongly"
    )
    group.add_argument(
        "--places", type=Path, help="places.json of dia_pangu, for a model whose prompts name side and place"
    )


def add_healing_arguments(group):
    # what is repaired: closed forms need no training, and what trains may start behind them
    group.add_argument(
        "--repair",
        nargs="+",
        choices=(*REPAIRS, *TRAINED, "none"),
        default=["lora"],
        help="first any of linear, compensate and replace, which repair gap by gap; then one of lora, last "
        "(three layers and the output head) and full (every layer), which trains. none: nothing",
    )
    group.add_argument(
        "--repair-texts",
        type=number(int, 2),
        default=64,
        help="first texts of --texts, for the repairs gap by gap",
    )
    group.add_argument(
        "--also", nargs="+", choices=("norm", "head"), default=[], help="train these too, beside --repair's"
    )
    group.add_argument("--full", action="store_true", help="the same as --repair full")

    # LoRA: its strength is alpha / r, so a wrong alpha changes every output without any error
    group.add_argument(
        "--lora-target-modules",
        help="names of linear modules for a new LoRA, with commas; default: those of q and v. Of one that is "
        "there: checked",
    )
    group.add_argument(
        "--lora-r", type=number(int, 1), default=4, help="rank of a new LoRA; of one that is there: checked"
    )
    group.add_argument(
        "--lora-alpha",
        type=float,
        help="alpha of LoRA, where nothing else says it; of a new one 4 r if left out",
    )
    group.add_argument(
        "--lora-dropout", type=number(float, 0, 1), default=0.0, help="dropout of LoRA (upstream 0.1 and 0.2)"
    )

    # the loss, and the optimizer beyond the shared run flags
    group.add_argument(
        "--distill", type=number(float, 0, 1), default=0.0, help="weight of the distance to the teacher"
    )
    group.add_argument(
        "--lr-scheduler-type",
        choices=SCHEDULES,
        default="constant_with_warmup",
        help="course of the learning rate",
    )
    group.add_argument(
        "--adam-beta2", type=number(float, 0, 1), default=0.999, help="second decay rate of AdamW"
    )


def text_rows(path, tokenizer, max_length: int, limit: int = 0, pack: bool = False) -> list[dict]:
    """{id, ids} of the texts of a file, with the end-of-text token behind each; every token is scored.

    pack: join all texts and cut them every `max_length` tokens, so that no place in a batch is padding.
    """
    # the end-of-text token is learnt too, except where the text is cut before it; some models have none
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = read_texts(path, limit or None)
    rows = {place: tokenizer(text).input_ids + end for place, text in texts.items()}

    # one long stream, so that a piece may begin in the middle of a text; only its last piece is short
    if pack:
        stream = [i for ids in rows.values() for i in ids]
        pieces = [stream[start : start + max_length] for start in range(0, len(stream), max_length)]
        rows = {f"{path}, piece {i}": piece for i, piece in enumerate(pieces, 1)}
    return [{"id": place, "ids": torch.tensor(ids[:max_length])} for place, ids in scorable(rows).items()]


def collate_texts(samples: list[dict]) -> dict:
    """Pad token ids on the right: lang_x and attention_mask with 0, labels with -100; each (B, N)."""

    def padded(rows, value=0):
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    # the ids are their own labels: the loss shifts them by one
    ids = [sample["ids"] for sample in samples]
    return {
        "id": [sample["id"] for sample in samples],
        "lang_x": padded(ids),
        "attention_mask": padded([torch.ones_like(row) for row in ids]),
        "labels": padded(ids, -100),
    }


class Healing(nn.Module):
    """The student's loss, mixed with its distance to a teacher.

    loss = (1 - distill) * cross entropy + distill * KL(teacher || student), both means over the batch's
    scored tokens. student and teacher are report models (with embedding_layer and lang_model) or plain causal
    language models. The teacher is no part of the module, so that checkpoints do not hold it.
    """

    def __init__(self, student, teacher=None, distill: float = 0.0):
        super().__init__()
        self.student, self.distill = student, distill
        self.teachers = [] if teacher is None else [teacher]  # a list hides it from checkpoints

    @staticmethod
    def states(model, lang_x, attention_mask, vision_x, tokens):
        """(language model, its final hidden states (B, N, d)) of either kind of model."""
        # a plain model reads ids, a report model the embeddings of its prompt with image tokens in them
        if not hasattr(model, "embedding_layer"):
            inputs, llm = {"input_ids": lang_x}, model
        else:
            with torch.no_grad():  # the vision part is frozen
                tokens = model.encode(vision_x) if tokens is None else tokens
                embeds = model.embedding_layer(text_input=lang_x, tokens=tokens)
            inputs, llm = {"inputs_embeds": embeds.to(model.lang_model.dtype)}, model.lang_model

        # without the output head: its (B, N, V) logits are wanted at the scored positions alone
        output = decoder(llm)(**inputs, attention_mask=attention_mask, use_cache=False)
        return plain(llm), output.last_hidden_state

    @staticmethod
    def sums(llm, teacher, states, labels, seen=None):
        """Summed cross entropy and distance to the teacher of some positions: states (M, d) of the student,
        labels (M,), seen (M, d) of the teacher."""
        logits = apply_head(llm, states).float()
        lm_loss = F.cross_entropy(logits, labels, reduction="sum")
        if seen is None:
            return lm_loss, torch.zeros_like(lm_loss)
        with torch.no_grad():
            target = apply_head(teacher, seen).float().log_softmax(-1)
        return lm_loss, F.kl_div(logits.log_softmax(-1), target, reduction="sum", log_target=True)

    def forward(self, lang_x, attention_mask, labels, vision_x=None, tokens=None) -> dict:
        """labels (B, N), -100 where nothing is scored. Returns loss and, with a teacher, its two parts."""
        # final states at the scored positions: position t predicts the token at t + 1
        inputs = (lang_x, attention_mask, vision_x, tokens)
        wanted = labels[:, 1:] != -100
        count = wanted.sum().clamp(min=1)  # a report that the length limit cut away leaves nothing to score
        llm, states = self.states(self.student, *inputs)
        teacher, scored = None, [states[:, :-1][wanted], labels[:, 1:][wanted]]  # (M, d) and (M,)
        if self.distill:
            with torch.no_grad():
                teacher, seen = self.states(self.teachers[0], *inputs)
            scored.append(seen[:, :-1][wanted])

        # a piece of the logits at a time, made again for its gradient: all would be most of the memory
        rows = max(1, LOGITS // text_config(llm).vocab_size)
        pieces = list(zip(*(part.split(rows) for part in scored)))
        if len(pieces) == 1:
            sums = [self.sums(llm, teacher, *pieces[0])]
        else:
            sums = [checkpoint(self.sums, llm, teacher, *piece, use_reentrant=False) for piece in pieces]

        # sums become means over the batch's scored tokens, however many pieces there were
        lm_loss, distance = (sum(part) / count for part in zip(*sums))
        if not self.distill:
            return {"loss": lm_loss}
        loss = (1 - self.distill) * lm_loss + self.distill * distance
        return {"loss": loss, "lm_loss": lm_loss, "distance": distance}


def set_trained(model, full: bool, last: int = 0, also=()) -> list[str]:
    """Let LoRA alone train, or (full) all decoder layers; return the names of the trained tensors.

    last: train the last so many layers and the output head instead. also: "norm" and "head" train the final
    norm and the output head too. Embeddings and vision part stay frozen, but for a head that is tied to the
    embeddings. Trained tensors become float32: in half precision the steps of AdamW, about 1e-5, would
    vanish; with whole matrices among them the rest follows, because a product needs one type.
    """
    # a report model's own parts keep what dia_pangu trained
    llm = getattr(model, "lang_model", model)
    layers = list(decoder_layers(llm))
    chosen = layers if full else layers[-last:] if last else []
    parts = list(chosen)
    if last or "head" in also:
        parts.append(plain(llm).get_output_embeddings())
    if "norm" in also:
        parts.append(final_norm(llm))

    # by identity and not by name: PEFT renames modules, and a tied head is the embedding
    whole = {id(parameter) for part in parts for parameter in part.parameters()}
    for name, parameter in model.named_parameters():
        lora = "lora_" in name and not (full or last)
        parameter.requires_grad_(id(parameter) in whole or lora)

    # one number format for all of the language model, or LoRA's own beside frozen half precision
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in llm.parameters() if whole else trained.values():
        parameter.data = parameter.data.float()
    return list(trained)


def new_lora(model, r: int = 4, alpha: float | None = None, dropout: float = 0.0, targets=None) -> tuple:
    """Return (`model` with a new LoRA, its settings). targets: module names separated by commas."""
    # upstream trained the whole model with r 4 and alpha 16, which is where 4 r comes from
    lora = {
        "r": r,
        "alpha": 4 * r if alpha is None else alpha,
        "dropout": dropout,
        "targets": usual_targets(model) if targets is None else targets.split(","),
    }
    return add_lora(model, *lora.values(), option="--lora-target-modules"), lora


def check(args):
    """Refuse what contradicts itself and what would have no effect, before anything is loaded."""
    check_kind(args)

    # what belongs to the other kind of model
    if args.texts:
        only_reports = ["lang_model_path", "teacher_lang_model_path", "cache", "flip", "places"]
        refuse(args, only_reports, "with --texts")
        if not args.drop_layers and not set(args.repair) & {*REPAIRS}:
            refuse(args, ["prune_map_path"], "with --texts, without --drop-layers and without a closed form")
    else:
        refuse(args, ["max_length", "trust_remote_code", "pack"], "with --data")
    check_repair(args)

    # no new LoRA where something else trains; a report checkpoint may hold its own, whose alpha matters
    if "lora" not in args.repair:
        own = ["lora_r", "lora_dropout", "lora_target_modules"]
        refuse(args, own + (["lora_alpha"] if args.texts else []), f"with --repair {' '.join(args.repair)}")

    # distillation, and the warm-up that a constant rate does not have
    if args.distill and not args.teacher:
        raise UserError("--distill needs --teacher, the unpruned model")
    if not args.distill:
        refuse(args, ["teacher_lang_model_path"], "without --distill")
        if not set(args.repair) & {*REPAIRS}:
            refuse(args, ["teacher"], f"without --distill and without --repair {' or '.join(REPAIRS)}")
    if args.lr_scheduler_type == "constant":
        refuse(args, ["warmup"], "with --lr-scheduler-type constant")

    # upstream's --drop_layers says again what the map says
    if args.drop_layers:
        if not args.prune_map_path:
            raise UserError("--drop-layers is checked against the map; name it with --prune-map-path")
        dropped = read_map(args.prune_map_path).get("drop_layers")
        if parse_drop_layers(args.drop_layers) != dropped:
            raise UserError(f"--drop-layers {args.drop_layers}: {args.prune_map_path} says {dropped}")


def check_repair(args):
    """Refuse ways of --repair that exclude each other or lack what they need; --full becomes one of them."""
    # the short form of one of the ways
    if args.full:
        refuse(args, ["repair"], "beside --full")
        args.repair = ["full"]

    # closed forms may follow each other; of what trains there is one, because it says which weights move
    closed = set(args.repair) & {*REPAIRS}
    if len(set(args.repair)) < len(args.repair) or len(set(args.repair) & {*TRAINED}) > 1:
        raise UserError(
            f"--repair {' '.join(args.repair)}: name each once, and only one of lora, last and full"
        )
    if "none" in args.repair and len(args.repair) > 1:
        raise UserError("--repair none stands alone")

    # closed forms are fitted on texts, against the states of the unpruned model
    if args.data and (closed or "last" in args.repair or args.also):
        raise UserError(f"--repair {', '.join(REPAIRS)} and last, and --also, are for --texts")
    if closed and not args.teacher:
        raise UserError(f"--repair {' '.join(sorted(closed))} needs --teacher, the unpruned model")
    if not closed:
        refuse(args, ["repair_texts"], f"without --repair {' or '.join(REPAIRS)}")
    # no training: what only a training reads would be ignored without a word
    if not set(args.repair) & {*TRAINED}:
        without = ["also", "distill", "max_steps", "epochs", "lr", "dry_run", "pack"]
        refuse(args, without, f"with --repair {' '.join(args.repair)}")


def dropped_layers(args) -> list[int]:
    """The layers that the pruned model lacks, by --prune-map-path or the map beside its folder."""
    # prune_llm.py writes hf_<tag> and its map side by side
    file = args.prune_map_path
    if file is None:
        folder = args.pruned_model_path.absolute()
        tag = folder.name.removeprefix("hf_")
        maps = [folder.with_name(result_names(tag, version)["map"]) for version in VERSIONS]
        if (file := next(filter(Path.is_file, maps), None)) is None:
            raise UserError(
                f"{args.pruned_model_path}: no prune map beside it; name it with --prune-map-path, so that "
                "the missing layers are known"
            )

    # a map without old_layers cannot tell dropped layers behind the last kept one
    prune_map = read_map(file)
    kept = set(prune_map["layer_id_map"].values())
    count = prune_map.get("old_layers") or max(kept) + 1
    return [layer for layer in range(count) if layer not in kept]


def load_report_task(args):
    """Return (model, teacher or None, training set, collate function, settings) of a report model."""
    from pruning import report_model  # dia_pangu's code, which plain language models do not need

    # every tensor must be there: upstream loads equal shapes alone and leaves the rest random
    loaded = report_model.load_report_model(
        args.pruned_model_path, args.lang_model_path, args.prune_map_path, args.lora_alpha, args.lora_dropout
    )
    model, text, config = loaded

    # LoRA: the checkpoint's own goes on training, else it gets a new one
    if config["lora"]:
        check_lora(args, config["lora"]["r"], config["lora"]["targets"])
    elif "lora" in args.repair:
        model.lang_model, config["lora"] = new_lora(
            model.lang_model, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target_modules
        )
    else:
        refuse(args, ["lora_alpha"], "for a checkpoint without LoRA")

    # the teacher sees the same prompts
    teacher = None
    if args.distill:
        teacher_llm = args.teacher_lang_model_path or args.lang_model_path
        teacher = report_model.load_report_model(args.teacher, teacher_llm)[0]
    train_set = report_model.training_set(model, text, config, args)
    return model, teacher, train_set, report_model.collate, config


def load_text_task(args, device):
    """Return (pruned model, repaired in closed form where that is asked for, teacher or None, tokenizer)."""
    # the teacher is a whole second model in memory, so it is loaded only where something asks it
    model, tokenizer = load_model(args.pruned_model_path, trust_remote_code=args.trust_remote_code)
    args.max_length = longest(model, args, "max_length")
    texts = read_texts(args.texts, args.limit or None)
    check_words(model, tokenizer, texts)
    closed = [kind for kind in args.repair if kind in REPAIRS]
    teacher = None
    if args.distill or closed:
        teacher = load_model(args.teacher, trust_remote_code=args.trust_remote_code)[0]

    # repairs gap by gap come first, so that LoRA learns on top of what they mended
    if closed:
        drop = dropped_layers(args)
        if len(decoder_layers(model)) + len(drop) != len(decoder_layers(teacher)):
            raise UserError(
                f"--teacher {args.teacher}: is not the model that {args.pruned_model_path} was cut from"
            )
        first = dict([*texts.items()][: args.repair_texts])
        prompts = text_prompts(first, tokenizer, args.max_length)
        repair(model.to(device), teacher.to(device), drop, closed, prompts)

    if "lora" in args.repair:
        lora = (args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target_modules)
        model, _ = new_lora(model, *lora)
    return model, teacher if args.distill else None, tokenizer


def scored(batch) -> torch.Tensor:
    """Number of scored tokens: what a batch's loss is the mean over."""
    return torch.zeros(()) if "error" in batch else (batch["labels"][:, 1:] != -100).sum()


def refuse_bad_sample(accelerator, batch):
    """End every process with one line where any process met a sample that it cannot read."""
    # all processes must know, because those with a good batch would wait for the others for ever
    bad = torch.tensor(float("error" in batch), device=accelerator.device)
    if accelerator.num_processes > 1:
        bad = accelerator.reduce(bad)
    if bad:
        raise UserError(batch.get("error", "another process met a sample that it cannot read"))


def heal(model, train_set, collate_fn, args, accelerator, teacher=None):
    """Train the tensors of `model` that require a gradient; log and checkpoints go to args.out.

    Returns the `Healing` module as it was trained, which may be sharded over the processes.
    """
    # what trains, and how: vectors and embeddings are not decayed, other matrices and LoRA's are
    healing = Healing(model, teacher, args.distill)
    groups = parameter_groups(healing, args.lr, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, args.adam_beta2))
    loader = make_loader(train_set, args, collate_fn=collate_fn)
    if args.compile:
        healing.compile()  # in place: checkpoints keep their names
    healing, optimizer, loader = prepare(accelerator, healing, optimizer, loader)
    # checkpoints hold what trains; the rest comes back with the paths that the run began with, unless a
    # closed form computes it anew, which another processor does with other last digits
    if not set(args.repair) & {*REPAIRS}:
        keep_trained(accelerator)

    # transformers' constant schedule has no warm-up, and the shared flag has a default
    steps = plan_steps(args, loader)
    warmup = 0 if args.lr_scheduler_type == "constant" else args.warmup
    schedule = SCHEDULES[args.lr_scheduler_type]

    # the loop: a report's tokens all weigh the same, whichever batch or process they are in
    training = start(accelerator, args, steps, [optimizer])
    healing.train()
    for batch, share in batches(training, loader, count=scored):
        refuse_bad_sample(accelerator, batch)
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        with accelerator.accumulate(healing):
            # mean losses, weighted so that accumulation and processes give one large batch's mean
            losses = {name: value * share for name, value in healing(**inputs).items()}
            check_finite(training, batch["id"], **losses)
            accelerator.backward(losses["loss"])
            factor = lr_at(training.state["step"], steps, warmup, schedule)
            grad = update(training, healing, [optimizer], factor)
        if accelerator.sync_gradients:
            finish_step(training, grad=grad)  # log, save, stop
    finish(training)
    return healing.eval()


def main(args):
    # contradictions end the run before a 7 B model is read
    check(args)
    accelerator = make_accelerator(args)
    seed_everything(args.seed)

    # the pruned model, its teacher and what it trains on
    config = None
    if args.data:
        model, teacher, train_set, collate_fn, config = load_report_task(args)
    else:
        model, teacher, tokenizer = load_text_task(args, accelerator.device)
        train_set = text_rows(args.texts, tokenizer, args.max_length, args.limit, args.pack)
        collate_fn = collate_texts
    # training turns tensors to float32; the result is written in the types that were read
    stored = {name: value.dtype for name, value in plain(model).state_dict().items()}

    # what of it trains
    names = set_trained(model, "full" in args.repair, 3 if "last" in args.repair else 0, args.also)
    if teacher is not None:  # not prepared: it stands whole on every process and never changes
        teacher = teacher.to(accelerator.device).requires_grad_(False)
    accelerator.print(f"{describe(model)} in {len(names)} tensors | {len(train_set)} samples")

    # healing; timing.json says how it ended, also when it was stopped
    open_run(args.out, args, accelerator, args.resume, args.overwrite)
    started, status = time.time(), "failed"
    try:
        if set(args.repair) & {*TRAINED}:
            healing = heal(model, train_set, collate_fn, args, accelerator, teacher)
        else:
            healing = Healing(model)  # nothing trains: closed forms alone
        status = "finished"
    except (Interrupted, KeyboardInterrupt):
        status = "interrupted"
        raise
    finally:
        if accelerator.is_main_process and not args.dry_run:
            # upstream's file, in its words: finished, interrupted or failed
            timing = {"status": status, "started": started, "wall_seconds": time.time() - started}
            atomic_json(args.out / "timing.json", timing)

    # the healed model, in the form that it came in
    whole = export_model(accelerator, healing)  # every process takes part, in case it is sharded
    if accelerator.is_main_process:
        if args.data:
            for name, parameter in whole.student.named_parameters():
                parameter.data = parameter.data.to(stored[name])
            save_report(whole.student.state_dict(), args.out, config)
        else:
            save_plain(whole.student, args.out, stored, args.pruned_model_path)


def save_report(weights: dict, out: Path, config: dict):
    """Write a healed report model as dia_pangu does, LoRA beside the weights."""
    from pruning.report_model import save_model

    save_model(weights, out, config)
    place = shlex.quote(str(out))
    print(f"wrote {out}/pytorch_model.bin; test it with pruning/test.py --pruned-model-path {place}")


def save_plain(model, out: Path, stored: dict, source: Path):
    """Write a healed language model as a folder that transformers loads, LoRA merged into the weights.

    stored: {name: type} of the tensors as they were read; they are written so, and config.json says so.
    source: the folder that they were read from, whose tokenizer, licence and the like are kept as they are.
    """
    # PEFT holds a wrapped matrix as NAME.base_layer; what trained in float32 is rounded back here
    lora = hasattr(model, "merge_and_unload")
    whole = model.merge_and_unload() if lora else model
    types = {name.replace(".base_layer.", "."): kind for name, kind in stored.items()}
    for name, parameter in whole.named_parameters():
        parameter.data = parameter.data.to(types.get(name, parameter.dtype))

    # read back before the folder gets its name, so that a folder that is there can be loaded
    with atomic_dir(out / "model") as temporary:
        whole.save_pretrained(temporary)
        copy_companions(source, temporary)
        read_back.check_folder(temporary)
    print(f"wrote {out}/model" + (", LoRA merged into the weights" if lora else ""))


if __name__ == "__main__":
    run(main, parse_args())
