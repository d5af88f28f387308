"""Train Dia-Pangu. Upstream: src/train.py (train_pre.py) and train_ft.py.

    python dia_pangu/train.py --stage pre --data data/dia_pangu --lang-encoder-path LLM --start DIA_LLAMA --out runs/dia_pangu/pre
    python dia_pangu/train.py --stage ft  --data data/dia_pangu --lang-encoder-path LLM --start runs/dia_pangu/pre --out runs/dia_pangu/ft
    NPROC_PER_NODE=8 bash dia_pangu/scripts/train.sh --stage ft ...      ACCELERATE_CONFIG=fsdp2 for fully sharded training

Stage pre trains the Perceiver; stage ft LoRA on the language model and the whole embedding layer; --train and --freeze change
that by parts of parameter names. --dry-run prints parameters and memory without loading any weights.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # repository root: every way of starting this file finds it

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM

from common.checkpoint import atomic_write
from common.errors import UserError, run
from common.run import open_run, seed_everything
from dia_pangu.evaluate.findings import calibrate, finding_scores
from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset, collate, read_places
from dia_pangu.src.Model.build import (
    add_model,
    build_model,
    load_start,
    make_embedding,
    make_grid,
    print_model,
    read_config,
    save_model,
)
from dia_pangu.src.Model.multimodality_model import NEVER_TRAINED, TRAINED, MultiPanguForCausalLM, add_lora
from dia_pangu.src.My_Trainer.trainer import Trainer, add_optimization, with_dashes

BATCH_KEYS = ("lang_x", "vision_x", "cls_labels", "attention_mask", "labels")


@torch.no_grad()
def diagnose_all(model, loader, accelerator):
    """Probabilities and labels (N, 14) over a loader, and the mean losses per batch."""
    probabilities, labels, losses = [], [], []
    for batch in loader:
        if "error" in batch:
            raise UserError(batch["error"])
        out = model(**{key: batch[key] for key in BATCH_KEYS})
        probability, truth = accelerator.gather_for_metrics((out["probability"], batch["cls_labels"]))
        probabilities.append(probability.float().cpu())
        labels.append(truth.cpu())
        losses.append(torch.stack([out["lm_loss"], out["ctr_loss"]]).float())
    mean = accelerator.reduce(torch.stack(losses).mean(0), reduction="mean")
    return torch.cat(probabilities).numpy(), torch.cat(labels).numpy(), mean


def evaluate(model, loader, accelerator) -> dict:
    """Validation losses and the findings' F1 at threshold 0.5."""
    probability, labels, losses = diagnose_all(model, loader, accelerator)
    scores = finding_scores(labels, probability >= 0.5)
    return {
        "lm_loss": losses[0].item(),
        "ctr_loss": losses[1].item(),
        "micro_f1": scores["micro"]["F1"],
        "macro_f1": scores["macro"]["F1"],
    }


def dry_run(args, config):
    """Print parameters, what trains, and a memory estimate; nothing is loaded, every tensor is on the meta device."""
    llm_config = AutoConfig.from_pretrained(args.lang_encoder_path, trust_remote_code=args.trust_remote_code)
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(llm_config)
        if config["lora"]:
            llm = add_lora(
                llm,
                config["lora"]["r"],
                config["lora"]["alpha"],
                config["lora"]["dropout"],
                config["lora"]["targets"],
            )
        table = llm.get_input_embeddings().weight
        model = MultiPanguForCausalLM(llm, make_embedding(config, *table.shape))
    names = model.set_trained(args.train or TRAINED[args.stage], (*NEVER_TRAINED, *args.freeze))
    print_model(model, names)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    width, layers = llm_config.hidden_size, llm_config.num_hidden_layers
    tokens = args.per_device_train_batch_size * min(config["max_length"], 320)
    # bf16 activations: about 18 widths per token and layer, or one (the layer's input) with checkpointing plus one open layer
    kept = (layers + 18) if args.gradient_checkpointing else 18 * layers
    gib = 2**30
    plan = {
        "weights (bf16)": 2 * total,
        "gradients of what trains": 4 * trained,
        "AdamW state (two float32)": 8 * trained,
        "activations (bf16, typical 320 tokens a sample)": 2 * kept * width * tokens,
        "logits (float32)": 4 * 2 * llm_config.vocab_size * tokens,
    }
    for what, size in plan.items():
        print(f"  {what}: {size / gib:.2f} GiB")
    print(
        f"  together {sum(plan.values()) / gib:.2f} GiB per process without sharding; an estimate, a run on a GPU prints its real peak"
    )


def main(args):
    config = read_config(args)
    if args.stage == "ft":
        config["lora"] = {
            "r": args.lora_r,
            "alpha": args.lora_alpha,
            "dropout": args.lora_dropout,
            "targets": args.lora_targets,
        }
    if args.places:
        config["embedding"]["evidence_head"] = True
    if not args.lang_encoder_path:
        raise UserError("--lang-encoder-path is needed: the folder of the language model")
    if args.hide_places and not args.places:
        raise UserError("--hide-places needs --places: without it no prompt names a place")
    if args.dry_run:
        return dry_run(args, config)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    seed_everything(args.seed)
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    model, text = build_model(
        config, args.lang_encoder_path, args.tokenizer_path, args.trust_remote_code, args.attn, dtype
    )
    text.key_weight = args.key_weight
    taken = [key for start in args.start for key in load_start(model, start, args.take)]
    if args.places and not any("evidence_head." in key for key in taken):
        raise UserError(
            f"--places {args.places} needs the evidence head of the same run; name its folder in --start"
        )
    names = model.set_trained(args.train or TRAINED[args.stage], (*NEVER_TRAINED, *args.freeze))
    if args.stage == "ft" and not args.train and not any("lora_" in name for name in names):
        raise UserError(
            f"--freeze {' '.join(args.freeze)}: no LoRA is left to train (q_proj. and its like hold proj.; "
            "write embedding_layer.proj.)"
        )
    if args.places and any("vision_encoder." in name for name in names):
        raise UserError(
            "--places: the file says what the evidence head sees behind this ViT; add --freeze vision_encoder"
        )
    if args.gradient_checkpointing:
        model.lang_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # AdamW steps of 1e-5 vanish in bf16
    if accelerator.is_main_process:
        print_model(model, names)

    options = {
        "language": config["language"],
        "cache": args.cache,
        "text": text,
        "limit": args.limit,
        "seed": args.seed,
        "places": read_places(args.places) if args.places else None,
    }
    train_set = CTRGDataset(
        args.data, "train", make_grid(config), flip=args.flip, hide_places=args.hide_places, **options
    )
    val_set = CTRGDataset(args.data, "val", make_grid(config), **options)
    for data in (train_set, val_set):
        data.drop_bad(args.dataloader_num_workers) if args.skip_bad else data.check()
    effective = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    )
    accelerator.print(
        f"{len(train_set)} training and {len(val_set)} validation volumes; {effective} samples a step"
    )
    out = open_run(args.output_dir, args, accelerator, args.resume, args.overwrite)
    named = dict(model.named_parameters())
    lora = [named[name] for name in names if not name.startswith("embedding_layer.")]
    groups = [
        {"params": [named[name] for name in names if name.startswith("embedding_layer.")]},
        {"params": lora, "lr_scale": args.llm_lr_scale},
    ]
    trainer = Trainer(
        model,
        args,
        accelerator,
        train_set,
        collate,
        (*BATCH_KEYS, "loss_reweight"),
        [g for g in groups if g["params"]],
        val_set,
        evaluate,
    )
    scores = trainer.train()
    if text.cut:
        accelerator.print(f"{text.cut} times a report was longer than --max-length and was cut")

    trainer.model.eval()
    probability, labels, _ = diagnose_all(trainer.model, trainer.eval_loader, accelerator)
    config["thresholds"] = calibrate(probability, labels)
    calibrated = finding_scores(labels, probability >= torch.tensor(config["thresholds"]).numpy())
    accelerator.print(
        f"validation findings: micro-F1 {scores['micro_f1']:.3f} at 0.5, {calibrated['micro']['F1']:.3f} with thresholds "
        "calibrated on the same volumes"
    )
    weights = accelerator.get_state_dict(trainer.model)
    if accelerator.is_main_process:
        save_model(weights, out, config)
        metrics = {"validation": scores, "validation_calibrated": calibrated, "trained": names}
        atomic_write(out / "metrics.json", json.dumps(metrics, indent=1))
    if torch.cuda.is_available():
        accelerator.print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    accelerator.end_training()


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--stage",
        choices=TRAINED,
        default="pre",
        help="pre: Perceiver; ft: LoRA and embedding layer (default %(default)s)",
    )
    parser.add_argument("--data", required=True, help="folder in the CTRG format")
    parser.add_argument("--cache", help="folder for prepared volumes; makes the second epoch fast")
    parser.add_argument(
        "--limit", type=int, default=0, help="use only the first samples of each split; 0: all"
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="read every sample first and leave out those that cannot be used",
    )
    parser.add_argument(
        "--places",
        help="places.json of pretrain_vit.py, whose run belongs into --start: prompts name the side and "
        "place that the evidence head sees",
    )
    parser.add_argument(
        "--hide-places",
        type=float,
        default=0.0,
        help="share of findings whose side and place the training prompt leaves out, so that the report has to take them "
        "from the image tokens (default %(default)s)",
    )
    parser.add_argument(
        "--key-weight",
        type=float,
        default=1.0,
        help="weight in the loss of the words that name side and place (default %(default)s; upstream foresees 3)",
    )
    parser.add_argument(
        "--flip",
        type=float,
        default=0.0,
        help="share of true statuses turned over in training prompts (default %(default)s)",
    )
    add_model(parser)
    group = parser.add_argument_group("what trains")
    group.add_argument(
        "--start",
        nargs="*",
        default=[],
        help="start weights of the vision part: Dia-LLaMA, Dia-Pangu or RadFM files or folders",
    )
    group.add_argument(
        "--take",
        choices=("vision", "all"),
        default="vision",
        help="all: take the files' language model and LoRA too, which only a Dia-Pangu checkpoint of the same language "
        "model should give (default %(default)s)",
    )
    group.add_argument(
        "--train",
        nargs="+",
        help="parts of parameter names to train instead of the stage's: "
        + "; ".join(f"{stage}: {' '.join(parts)}" for stage, parts in TRAINED.items()),
    )
    group.add_argument(
        "--freeze",
        nargs="+",
        default=[],
        help="parts of parameter names to leave out, such as vision_encoder",
    )
    group.add_argument("--lora-r", type=int, default=4, help="(default %(default)s)")
    group.add_argument("--lora-alpha", type=int, default=16, help="(default %(default)s)")
    group.add_argument("--lora-dropout", type=float, default=0.1, help="(default %(default)s)")
    group.add_argument(
        "--lora-targets", nargs="+", default=["q_proj", "v_proj"], help="(default %(default)s)"
    )
    group.add_argument(
        "--llm-lr-scale",
        type=float,
        default=1.0,
        help="rate of the language model's trained part, as a multiple",
    )
    group.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute the language model's layers in the backward pass",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="print parameters and a memory plan, load nothing"
    )
    add_optimization(parser, learning_rate=5e-5, lr_scheduler_type="constant_with_warmup")
    return parser.parse_args(with_dashes(sys.argv[1:]))


if __name__ == "__main__":
    run(main, parse_args())
