"""Train Dia-Pangu on chest CT volumes and their reports. Upstream: src/train.py, train_pre.py, train_ft.py.

    python dia_pangu/train.py --stage pre --data CTRG --lang-encoder-path LLM --start DIA_LLAMA --out runs/pre
    python dia_pangu/train.py --stage ft --data CTRG --lang-encoder-path LLM --start runs/pre --out runs/ft
    NPROC_PER_NODE=8 bash dia_pangu/run_train.sh --stage ft ...   (ACCELERATE_CONFIG=fsdp2 shards the model)

Stage pre trains the Perceiver. Stage ft trains LoRA on the language model and the whole embedding layer.
--train and --freeze change that by parts of parameter names. --dry-run prints the parameters and a memory
plan without loading any weights.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from common.arguments import Parser, add_run_arguments, number, refuse
from common.checkpoint import atomic_json
from common.errors import UserError
from common.errors import run as run_script
from common.llm import add_lora
from common.memory import LiveBytes, lines_of, table_of
from common.run import open_run, seed_everything
from common.sharding import export_state, keep_trained, prepare
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
    watched,
)
from dia_pangu.evaluate.findings import calibrate, finding_scores
from dia_pangu.evaluate.labeler import language_of
from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset, collate, raise_bad, read_places
from dia_pangu.src.Model.build import (
    add_model,
    build_model,
    check_preparation,
    load_start,
    make_embedding,
    make_grid,
    make_text,
    print_model,
    read_config,
    save_model,
    settle_preparation,
    tell,
)
from dia_pangu.src.Model.multimodality_model import (
    LORA,
    NEVER_TRAINED,
    TRAINED,
    MultiPanguForCausalLM,
    label_count,
    token_loss,
)
from dia_pangu.src.Model.pangu import load_tokenizer

# What the model reads of a batch; training adds loss_reweight, where the key words weigh more.
BATCH_KEYS = ("lang_x", "vision_x", "cls_labels", "attention_mask", "labels")
# --lr-scheduler-type, by its names in transformers -> the schedule of common.train.lr_at
SCHEDULES = {
    "constant_with_warmup": "constant",
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
}
# Learned tables and vectors that weight decay would only shrink.
PLAIN = ("prototype", "sample_memory", "latents", "pos_embedding", "figure_token")


def check_flags(args):
    """Refuse flags that contradict each other, and flags that have no effect in the given mode."""
    # The language model is the one part that this repository does not bring along.
    if not args.lang_encoder_path:
        raise UserError("--lang-encoder-path is needed: the folder of the language model")

    # Stage pre has no LoRA; hidden places and --take need what they are taken from.
    if args.stage == "pre":
        refuse(args, ["lora_r", "lora_alpha", "lora_dropout", "lora_targets"], "with --stage pre")
    if not args.places:
        refuse(args, ["hide_places"], "without --places, because no prompt then names a place")
    if not args.start:
        refuse(args, ["take"], "without --start")

    # "constant" is transformers' name for a schedule without warm-up.
    if args.lr_scheduler_type == "constant":
        refuse(args, ["warmup"], "with --lr-scheduler-type constant; take constant_with_warmup")
        args.warmup = 0


def model_config(args) -> dict:
    """Return the model's configuration as the flags say it: sizes, LoRA, evidence head."""
    # Stage pre leaves the language model as it is; LoRA belongs to stage ft alone. What stands on the command
    # line wins over --config, which wins over upstream's values.
    config = read_config(args)
    stored = config["lora"] or {}
    flags = {name: getattr(args, f"lora_{name}") for name in LORA}
    lora = {
        name: flag if f"lora_{name}" in args._given else stored.get(name, flag)
        for name, flag in flags.items()
    }
    config["lora"] = lora if args.stage == "ft" else None

    # The head sees the places that prompts name. `test.py` names them where it finds the head, so that a
    # model whose training prompts named none has none.
    config["embedding"]["evidence_head"] = bool(args.places)
    return config


def first_texts(args, config, vocabulary: int) -> list[dict]:
    """Return the texts of the first batch, or in their place some of usual length where none can be read."""
    try:
        folder = args.tokenizer_path or args.lang_encoder_path
        text = make_text(load_tokenizer(folder, args.trust_remote_code), config, vocabulary)
        places = read_places(args.places) if args.places else None
        options = {
            "language": config["language"],
            "limit": args.batch_size,
            "vision": False,
            "places": places,
        }
        data = CTRGDataset(args.data, "train", make_grid(config), text, **options)
        return [data.sample(i % len(data))["text"] for i in range(args.batch_size)]
    except UserError as error:
        # A plan is wanted before the data are there, too; it then says what it assumed.
        usual = min(config["max_length"], 320)
        print(f"no text can be read ({error}); a sample is taken to have {usual} tokens, half of them report")
        half = usual // 2
        return [{"lang_x": [0] * usual, "labels": [-100] * half + [0] * (usual - half)}] * args.batch_size


def plan_step(model, vision_x, length: int, answers: int):
    """Make the forward and backward pass of a training step on tensors without values, which `forward` would
    look at: B samples of `length` tokens, with `answers` labels among them."""
    # The image tokens stand among the words, so that both make up the length.
    layer = model.embedding_layer
    tokens = model.encode(vision_x)
    visual = layer.visual_tokens(tokens)
    words = layer.weight.new_empty(len(visual), length - visual.shape[1], visual.shape[2])
    embeds = torch.cat((words, visual.to(words.dtype)), dim=1)

    # Padding and eos make the mask of the attention a matrix; logits stand at the labels alone.
    base = (
        model.lang_model.get_base_model() if hasattr(model.lang_model, "get_base_model") else model.lang_model
    )
    mask = torch.ones(len(embeds), 1, length, length, dtype=torch.bool, device=embeds.device)
    hidden = base.get_decoder()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state.flatten(0, 1)
    logits = base.get_output_embeddings()(hidden[:answers])
    loss = token_loss(logits, torch.zeros(answers, dtype=torch.long, device=logits.device)) / answers
    sim = layer.similarity(tokens) / layer.temperature()
    (loss + model.lambda_ctr * sim.flatten(0, 1).logsumexp(-1).mean()).backward()


def fake(model, device):
    """Give a model on the meta device fake tensors, which have a device too, and still no values."""
    made = {}  # a tensor under two names stays one
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and old not in made:
                    new = torch.empty(old.shape, dtype=old.dtype, device=device)
                    is_buffer = tensors is module._buffers
                    made[old] = new if is_buffer else torch.nn.Parameter(new, old.requires_grad)
                tensors[name] = made.get(old)


def dry_run(args, config):
    """Print the parameters, what trains, and the memory of the first step; no weights are loaded."""
    # On the meta device a tensor has a shape and no values, so that 8 billion parameters take no memory.
    llm_config = AutoConfig.from_pretrained(args.lang_encoder_path, trust_remote_code=args.trust_remote_code)
    options = {"dtype": frozen_dtype(args), "attn_implementation": args.attn}
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(llm_config, **options)
        if config["lora"]:
            llm = add_lora(llm, **config["lora"])
        model = MultiPanguForCausalLM(llm, make_embedding(config, *llm.get_input_embeddings().weight.shape))
    names = model.set_trained(args.train or TRAINED[args.stage], (*NEVER_TRAINED, *args.freeze))
    print_model(model, names)
    ready_to_train(model, args)

    # The first batch, and its step on this machine's device; what is made in it is counted while it lives.
    texts = first_texts(args, config, len(model.embedding_layer.weight))
    length = max(len(text["lang_x"]) for text in texts)
    answers = max(1, sum(label != -100 for text in texts for label in text["labels"]))
    there = torch.accelerator.is_available()
    device = torch.accelerator.current_accelerator() if there else torch.device("cpu")
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)
    with FakeTensorMode():
        fake(model.train(), device)
        vision_x = torch.empty(len(texts), 1, 3, *config["grid"]["size"], device=device)
        with LiveBytes([vision_x, *model.parameters(), *model.buffers()]) as live:
            with torch.autocast(device.type, kind, enabled=kind is not None):
                plan_step(model, vision_x, length, answers)

    # What is there before the first step, and what the step adds at its peak.
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    stored = "frozen ones of the language model bf16, all others " if args.precision == "bf16" else ""
    print(f"  weights ({stored}float32): {weights:.2f} GiB")
    print(f"  a step has {len(texts)} samples of up to {length} tokens, {answers} of them in the reports")
    print("\n".join(lines_of(table_of(model, live.peak, 8))))
    print("  a plan from one step without values; a run on a GPU prints its real peak")


def frozen_dtype(args) -> torch.dtype:
    """Return the number format of the language model's weights: frozen ones are stored as they are used."""
    return torch.bfloat16 if args.precision == "bf16" else torch.float32


def ready_to_train(model, args):
    """Switch checkpointing on where it is asked for, and store what trains in float32."""
    # Reentrant checkpointing would lose the gradient, because the inputs of the first layer need none.
    if args.gradient_checkpointing:
        model.lang_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # AdamW steps of 1e-5 vanish in bf16


def make_model(args, config):
    """Return the model with its start weights, its prompt writer, and the names of what trains."""
    folders = args.lang_encoder_path, args.tokenizer_path
    model, text = build_model(config, *folders, args.trust_remote_code, args.attn, frozen_dtype(args))
    text.key_weight = args.key_weight

    # Start weights; by default of the vision part alone, because Llama's layers have the names of Pangu's.
    taken = [key for folder in args.start for key in load_start(model, folder, args.take)]
    if args.places and not any("evidence_head." in key for key in taken):
        raise UserError(
            f"--places {args.places} needs the evidence head of the same run; name its folder in --start"
        )

    # What trains is chosen by parts of parameter names; three choices that are surely mistakes are refused.
    names = model.set_trained(args.train or TRAINED[args.stage], (*NEVER_TRAINED, *args.freeze))
    if args.stage == "ft" and not args.train and not any("lora_" in name for name in names):
        raise UserError(
            f"--freeze {' '.join(args.freeze)}: no LoRA is left to train; if it was proj., which q_proj. and "
            "its like contain too, write embedding_layer.proj., else name in --train what is to train"
        )
    check_preparation(config, args.start, names)
    if args.places and any("vision_encoder." in name for name in names):
        raise UserError(
            "--places: the file says what the evidence head sees behind this ViT; add --freeze vision_encoder"
        )
    if all(name.startswith("embedding_layer.") for name in names):
        refuse(args, ["llm_lr_scale"], "while nothing of the language model trains")
    ready_to_train(model, args)
    return model, text, names


def make_optimizer(model, args):
    """Return AdamW over what trains; the language model has its own learning rate."""
    # Two modules, four groups at most: vectors and learned tables of each are not decayed.
    groups = parameter_groups(model.embedding_layer, args.lr, args.weight_decay, PLAIN)
    groups += parameter_groups(model.lang_model, args.lr * args.llm_lr_scale, args.weight_decay, PLAIN)
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.adam_beta2))


def make_sets(args, config, text):
    """Return the training and the validation set; only the training prompts get flips and hidden places."""
    # What both sets share: how volumes are prepared and prompts are written.
    options = {
        "grid": make_grid(config),
        "language": config["language"],
        "cache": args.cache,
        "text": text,
        "limit": args.limit,
        "seed": args.seed,
        "places": read_places(args.places) if args.places else None,
    }
    train_set = CTRGDataset(args.data, "train", flip=args.flip, hide_places=args.hide_places, **options)
    val_set = CTRGDataset(args.data, "val", **options)

    # A missing file shows before the first step, not in the middle of an epoch.
    for data in (train_set, val_set):
        if args.skip_bad:
            data.drop_bad(args.workers)
        else:
            data.check()

    # Upstream's Chinese annotation is what is read where no English one lies beside it.
    told = language_of(train_set.report(train_set.items[0]))
    if told != config["language"]:
        tell(f"{train_set.annotation}: reports in {told}, prompts in {config['language']}; see --language")
    return train_set, val_set


def loss_counts(batch) -> torch.Tensor:
    """Count what the two losses of a batch are means over: label tokens and samples."""
    raise_bad(batch)  # here, because this is the first that looks into a batch
    labels = label_count(batch["labels"])
    return torch.stack([labels, labels.new_tensor(len(batch["id"]))])


@torch.no_grad()
def evaluate(model, loader, accelerator) -> tuple[dict, np.ndarray, np.ndarray]:
    """Return the validation losses with the findings' F1 at threshold 0.5, and their probabilities and
    labels, both (N, 14)."""
    # One forward pass gives losses and diagnosis, so that a sharded model is gathered once.
    model.eval()
    probabilities, labels = [], []
    sums = torch.zeros(2, 2, device=accelerator.device)  # of the two losses, and what they are means over
    for batch in loader:
        counts = loss_counts(batch).float()
        out = model(**{key: batch[key] for key in BATCH_KEYS}, all_logits=False)
        losses = torch.stack([out["lm_loss"], out["ctr_loss"]]).float()
        sums += torch.stack([losses * counts, counts])  # every token and every sample weighs 1

        # The last batch of several processes is filled up with the first volumes: gather_for_metrics drops
        # these from the findings; in the losses they count twice.
        probability, truth = accelerator.gather_for_metrics((out["probability"], batch["cls_labels"]))
        probabilities.append(probability.float().cpu())
        labels.append(truth.cpu())
    model.train()

    # Means over all processes, and the findings at the threshold that no data have moved.
    sums = accelerator.reduce(sums, "sum")
    lm_loss, ctr_loss = (sums[0] / sums[1].clamp(min=1)).tolist()
    probability, labels = torch.cat(probabilities).numpy(), torch.cat(labels).numpy()
    found = finding_scores(labels, probability >= 0.5)
    scores = {"lm_loss": lm_loss, "ctr_loss": ctr_loss}
    scores |= {"micro_f1": found["micro"]["F1"], "macro_f1": found["macro"]["F1"]}
    return scores, probability, labels


def evaluate_and_save(model, loader, accelerator, folder, config, names) -> dict:
    """Write the model folder, and return the validation scores. names: of what has trained."""
    # The validation volumes also give the thresholds that test.py uses.
    scores, probability, labels = evaluate(model, loader, accelerator)
    config["thresholds"] = calibrate(probability, labels)
    calibrated = finding_scores(labels, probability >= np.array(config["thresholds"]))
    micro = scores["micro_f1"], calibrated["micro"]["F1"]
    accelerator.print("validation micro-F1 {:.3f} at threshold 0.5, {:.3f} calibrated on it".format(*micro))

    # Upstream's file name and keys. metrics.json comes last: with it a folder is complete.
    weights = export_state(accelerator, model)  # all processes take part, in case the model is sharded
    if accelerator.is_main_process:
        save_model(weights, folder, config)
        metrics = {"validation": scores, "validation_calibrated": calibrated, "trained": names}
        atomic_json(folder / "metrics.json", metrics)
    return scores


def main(args):
    # Flags that contradict each other end the run before anything is loaded.
    check_flags(args)
    config = model_config(args)
    if args.dry_run:
        return dry_run(args, config)
    config = settle_preparation(config, args, args.start)

    # Model and data: LLM and tokenizer from their folder, start weights, the CTRG partitions train and val.
    accelerator = make_accelerator(args)
    seed_everything(args.seed)
    model, text, names = make_model(args, config)  # text writes the prompts
    if accelerator.is_main_process:
        print_model(model, names)
    train_set, val_set = make_sets(args, config, text)

    # What one optimizer step sees is printed before step 0; then the run folder is made and locked.
    effective = args.batch_size * args.accum * accelerator.num_processes
    accelerator.print(
        f"{len(train_set)} training and {len(val_set)} validation volumes; {effective} samples in an "
        "optimizer step"
    )
    folder = open_run(args.out, args, accelerator, args.resume, args.overwrite)

    # Two losses, and an optimizer for what trains of the two modules.
    optimizer = make_optimizer(model, args)
    lambda_ctr = model.lambda_ctr  # weight of the contrastive loss, upstream's 4

    # Accelerate wraps all of it for one device, several processes, or shards.
    if args.compile:
        model.compile()
    loader = make_loader(train_set, args, collate_fn=collate)
    val_loader = make_loader(val_set, args, train=False, collate_fn=collate)
    model, optimizer, loader, val_loader = prepare(accelerator, model, optimizer, loader, val_loader)
    keep_trained(accelerator)  # frozen weights come back with --lang-encoder-path and --start
    steps, schedule = plan_steps(args, loader), SCHEDULES[args.lr_scheduler_type]

    def eval_scores():
        found = evaluate(model, watched(run, val_loader), accelerator)[0]
        return {f"eval_{key}": value for key, value in found.items()}

    # The two losses are means over different things, so each has its own share of the optimizer step.
    run = start(accelerator, args, steps, [optimizer], eval_scores)
    model.train()
    for batch, (label_share, sample_share) in batches(run, loader, loss_counts):
        with accelerator.accumulate(model):
            # Forward: the diagnosis against the labels, and the report after the prompt.
            out = model(**{key: batch[key] for key in (*BATCH_KEYS, "loss_reweight") if key in batch})
            lm_loss, ctr_loss = out["lm_loss"] * label_share, out["ctr_loss"] * sample_share
            loss = lm_loss + lambda_ctr * ctr_loss

            # A loss that is nan or inf ends the run before it reaches the weights.
            check_finite(run, batch["id"], loss=loss, lm_loss=lm_loss, ctr_loss=ctr_loss)
            accelerator.backward(loss)
            grad = update(run, model, [optimizer], lr_at(run.state["step"], steps, args.warmup, schedule))

        # Once per optimizer step: evaluate where it is due, log, save, stop when asked to.
        if accelerator.sync_gradients:
            finish_step(run, grad=grad)

    # A cut report was learned without its end; --config with a larger max_length keeps it.
    if text.cut:
        accelerator.print(f"{text.cut} times a report was longer than max_length tokens and was cut")

    # The end: thresholds, weights and scores of the last step.
    scores = evaluate_and_save(model, val_loader, accelerator, folder, config, names)
    if accelerator.device.type != "cpu":
        accelerator.print(f"peak memory {torch.accelerator.max_memory_allocated() / 2**30:.1f} GiB")
    finish(run, **{f"eval_{key}": value for key, value in scores.items()})


def add_data_arguments(parser):
    """Add the flags of volumes, reports and prompts."""
    # Which volumes, and how they are read.
    fraction = number(float, 0, 1)
    add = parser.add_argument_group("data").add_argument
    add("--data", required=True, help="folder in the CTRG format")
    add("--cache", help="folder for prepared volumes, which makes the second epoch fast")
    add("--limit", type=number(int, 0), default=0, help="use only the first samples of each split; 0: all")
    add("--skip-bad", action="store_true", help="read all samples first, leave out those that cannot be used")

    # What the prompt says of each finding, beside its status. At test time both come from the model and are
    # sometimes wrong; hidden places and inverted statuses teach it to look at the image tokens too.
    add(
        "--places",
        help="places.json beside the evidence head of --start; prompts then say where a finding is",
    )
    hide = "share of the findings whose place the training prompt hides, to be taken from the image tokens"
    add("--hide-places", type=fraction, default=0.0, help=hide)
    weight = "weight in the loss of the words that name side and place; upstream intends 3"
    add("--key-weight", type=number(float, 0), default=1.0, help=weight)
    add("--flip", type=fraction, default=0.0, help="share of the statuses that training prompts invert")


def add_training_arguments(parser):
    """Add the flags that say what trains and from what it starts."""
    # Stages are upstream's two scripts, train_pre.py and train_ft.py.
    fraction = number(float, 0, 1)
    add = parser.add_argument_group("what trains").add_argument
    stages = "pre: the Perceiver; ft: LoRA and the embedding layer"
    add("--stage", choices=TRAINED, default="pre", help=stages)

    # Upstream names one Dia-LLaMA file in its code; RadFM keeps ViT and Perceiver in two.
    files = "files or folders with start weights of the vision part: Dia-LLaMA, Dia-Pangu or RadFM"
    add("--start", nargs="*", default=[], help=files)
    take = "what to take from --start; all: also language model and LoRA, of a checkpoint with the same model"
    add("--take", choices=("vision", "all"), default="vision", help=take)
    usual = "; ".join(f"{stage}: {' '.join(parts)}" for stage, parts in TRAINED.items())
    add("--train", nargs="+", help=f"parts of parameter names to train instead of the stage's own ({usual})")
    add("--freeze", nargs="+", default=[], help="parts of parameter names to leave out, as vision_encoder")

    # LoRA of the language model, with upstream's values.
    add("--lora-r", type=number(int, 1), default=LORA["r"], help="rank of LoRA")
    add(
        "--lora-alpha", type=number(int, 1), default=LORA["alpha"], help="alpha of LoRA, scale = alpha / rank"
    )
    add("--lora-dropout", type=fraction, default=LORA["dropout"], help="dropout in front of LoRA")
    add("--lora-targets", nargs="+", default=LORA["targets"], help="linear layers that get LoRA")

    # AdamW beyond the shared run flags, and what fits a large model into memory.
    scale = "learning rate of the language model's trained part as a multiple of --lr"
    add("--llm-lr-scale", type=number(float, 0), default=1.0, help=scale)
    schedule = "learning rate schedule"
    add("--lr-scheduler-type", choices=SCHEDULES, default="constant_with_warmup", help=schedule)
    add("--adam-beta2", type=fraction, default=0.999, help="beta 2 of AdamW")
    saving = "recompute the language model's layers in the backward pass, which saves memory"
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False, help=saving)
    add("--dry-run", action="store_true", help="print the parameters and a memory plan, load nothing")


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_data_arguments(parser)
    add_model(parser)
    add_training_arguments(parser)
    # Upstream's values, so that its recipes need the same words here as there.
    add_run_arguments(parser, lr=5e-5, weight_decay=0.0, warmup=20, epochs=3.0, accum=8, seed=42)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse_args())
