"""Heal a pruned model: train LoRA, or everything, for a short while (upstream: after-pruning-tools/train_pruned_{CN,EN}_cli.py).

    python pruning/train.py --pruned_model_path pruned/pytorch_model_pruned_drop23_28_merged_clean_v0112_en_cpu.bin \\
        --prune_map_path pruned/prune_layer_map_drop23_28_v0112_en_cpu.json --lang-model-path path/to/llm --data data/dia_pangu --out healed
    python pruning/train.py --pruned_model_path pruned/hf_drop23_28 --texts reports.txt --out healed
    torchrun --nproc_per_node 8 pruning/train.py ...

A report model trains on volumes and reports, a plain language-model folder on texts. With --distill the loss is mixed with the
distance to the unpruned model's distributions. Upstream's two scripts could not start (each imports from the other's file).
"""

import argparse
import json
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers.pytorch_utils import Conv1D

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it
from common.checkpoint import atomic_dir, atomic_write
from common.errors import UserError, run
from common.run import describe, open_run, seed_everything
from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset, collate, read_places
from dia_pangu.src.Model.build import make_grid, save_model
from dia_pangu.src.Model.multimodality_model import add_lora
from dia_pangu.src.My_Trainer.trainer import Trainer, add_optimization, with_dashes
from pruning.layers import decoder_layers
from pruning.pruning_tools.prune_llm import parse_drop_layers
from pruning.report_model import load_report_model, read_map
from pruning.sensitivity_analyse.layer_mask import FUSED
from pruning.sensitivity_analyse.load_model import load_model, read_prompts

INPUTS = ("lang_x", "vision_x", "tokens", "attention_mask", "labels")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--pruned_model_path",
        "--pruned_merged_ckpt",
        type=Path,
        required=True,
        help="merged checkpoint of prune_llm.py, or its hf_<tag> folder",
    )
    p.add_argument(
        "--prune_map_path",
        "--prune_map",
        type=Path,
        help="prune_layer_map_*.json; needed when --lang-model-path is the unpruned model",
    )
    p.add_argument("--drop_layers", help="only checked against the map")
    p.add_argument(
        "--lang-model-path", type=Path, help="folder with config and tokenizer of the language model"
    )
    p.add_argument("--data", type=Path, help="CTRG folder: heal a report model")
    p.add_argument(
        "--texts",
        type=Path,
        help="texts, one a line, or .jsonl with the field text: heal a plain language model",
    )
    p.add_argument("--limit", type=int, default=0, help="use only the first samples; 0: all")
    p.add_argument("--cache", help="folder for prepared volumes")
    p.add_argument(
        "--flip",
        type=float,
        default=0.02,
        help="share of true statuses turned over in training prompts (default 0.02)",
    )
    p.add_argument(
        "--places",
        type=Path,
        help="with --data: places.json of dia_pangu/pretrain_vit.py, for a model whose prompts name "
        "side and place",
    )
    p.add_argument(
        "--max-length", type=int, default=512, help="tokens of a text; longer ones are cut (default 512)"
    )
    group = p.add_argument_group("healing")
    group.add_argument(
        "--full", action="store_true", help="train every weight of the language model instead of LoRA"
    )
    group.add_argument(
        "--lora_target_modules",
        help="for a checkpoint without LoRA, comma separated (default q_proj,v_proj, or the "
        "projection that holds both)",
    )
    group.add_argument("--lora_r", type=int, default=4, help="for a checkpoint without LoRA (default 4)")
    group.add_argument(
        "--lora_alpha",
        "--lora-alpha",
        type=float,
        help="of the checkpoint's LoRA if nothing else says it; of a new one 4 r unless given",
    )
    group.add_argument(
        "--lora_dropout", type=float, default=0.0, help="of a new LoRA (default 0; upstream 0.1 and 0.2)"
    )
    group.add_argument(
        "--distill",
        type=float,
        default=0.0,
        help="weight of the distance to the teacher, in [0, 1]; 0: none (default)",
    )
    group.add_argument("--teacher", type=Path, help="the unpruned checkpoint or folder, for --distill")
    group.add_argument(
        "--teacher-lang-model-path", type=Path, help="the teacher's language model, if not --lang-model-path"
    )
    add_optimization(
        p,
        learning_rate=5e-5,
        num_train_epochs=5.0,
        gradient_accumulation_steps=8,
        lr_scheduler_type="constant_with_warmup",
    )
    # upstream writes --save_steps, the loop --save-steps: both are understood
    known = p._option_string_actions
    argv = sys.argv[1:] if argv is None else argv
    return p.parse_args([with_dashes([a])[0] if a.split("=")[0] not in known else a for a in argv])


class Texts(Dataset):
    """Texts as ids with eos; every token is scored. epoch changes nothing."""

    def __init__(self, path, tokenizer, max_length: int, limit: int = 0):
        self.rows = []
        for i, text in enumerate(read_prompts(path)[: limit or None]):
            ids = (tokenizer(text).input_ids + [tokenizer.eos_token_id])[:max_length]
            self.rows.append(
                {
                    "id": f"{Path(path).name}:{i + 1}",
                    "report": text,
                    "text": {"lang_x": ids, "attention_mask": [1] * len(ids), "labels": ids},
                }
            )

    def set_epoch(self, epoch: int):
        pass

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


class Healing(nn.Module):
    """The student's loss, mixed with the distance to a teacher.

    loss = (1 - distill) * cross entropy + distill * KL(teacher || student), per scored token of the global batch. student and
    teacher: report models (embedding_layer and lang_model) or plain causal LMs. The teacher is no part of the module, so that
    checkpoints do not hold it.
    """

    def __init__(self, student, teacher=None, distill: float = 0.0):
        super().__init__()
        self.student, self.teachers, self.distill = student, [teacher] if teacher is not None else [], distill

    @staticmethod
    def logits(model, lang_x, attention_mask, vision_x, tokens):
        if not hasattr(model, "embedding_layer"):
            return model(input_ids=lang_x, attention_mask=attention_mask).logits
        with torch.no_grad():  # the vision part is frozen
            tokens = model.encode(vision_x) if tokens is None else tokens
            embeds = model.embedding_layer(text_input=lang_x, tokens=tokens)
        return model.lang_model(
            inputs_embeds=embeds.to(model.lang_model.dtype), attention_mask=attention_mask
        ).logits

    def forward(
        self, lang_x, attention_mask, labels, vision_x=None, tokens=None, num_tokens=None, num_samples=None
    ):
        wanted = labels[:, 1:] != -100
        num_tokens = num_tokens or wanted.sum()
        logits = self.logits(self.student, lang_x, attention_mask, vision_x, tokens)[:, :-1][wanted].float()
        lm_loss = F.cross_entropy(logits, labels[:, 1:][wanted], reduction="sum") / num_tokens
        if not self.distill:
            return {"loss": lm_loss}
        with torch.no_grad():
            target = self.logits(self.teachers[0], lang_x, attention_mask, vision_x, tokens)
            target = target[:, :-1][wanted].float().log_softmax(-1)
        distance = F.kl_div(logits.log_softmax(-1), target, reduction="sum", log_target=True) / num_tokens
        return {
            "loss": (1 - self.distill) * lm_loss + self.distill * distance,
            "lm_loss": lm_loss,
            "distance": distance,
        }


def set_trained(model, full: bool) -> list[str]:
    """LoRA alone, or all decoder layers; embeddings, head and vision part stay frozen. Returns the names."""
    layers = set(decoder_layers(getattr(model, "lang_model", model)).parameters())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter in layers if full else "lora_" in name)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def heal(model, train_set, collate_fn, args, accelerator, teacher=None, distill: float = 0.0):
    """Train what requires a gradient in `model`, with dia_pangu's loop; returns the `Healing` module as it was trained,
    perhaps sharded."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    trainer = Trainer(Healing(model, teacher, distill), args, accelerator, train_set, collate_fn, INPUTS)
    trainer.train()
    for number, handler in handlers.items():  # the loop's "save, then stop" ends with the loop
        signal.signal(number, handler)
    trainer.model.eval()
    return trainer.model


def new_lora(
    model, r: int = 4, alpha: float | None = None, dropout: float = 0.0, targets: str | None = None
) -> tuple:
    """(`model` with a new LoRA, its settings). targets: names of linear modules, comma separated; default as the help says."""
    names = {
        name.rpartition(".")[2]
        for name, m in decoder_layers(model)[0].named_modules()
        if isinstance(m, (nn.Linear, Conv1D))
    }
    if targets is None:
        fused = [name for name in (*FUSED, "query_key_value") if name in names]
        targets = "q_proj,v_proj" if {"q_proj", "v_proj"} <= names else ",".join(fused)
    lora = {
        "r": r,
        "alpha": 4 * r if alpha is None else alpha,
        "dropout": dropout,
        "targets": targets.split(","),
    }
    if missing := sorted(set(lora["targets"]) - names):
        raise UserError(
            f"--lora_target_modules {targets}: a decoder layer has no {missing[0]!r}; it has {', '.join(sorted(names))}"
        )
    return add_lora(model, lora["r"], lora["alpha"], lora["dropout"], lora["targets"]), lora


def check(args):
    if bool(args.data) == bool(args.texts):
        raise UserError(
            "give either --data (a report model on a CTRG folder) or --texts (a plain language model)"
        )
    if args.data and not args.lang_model_path:
        raise UserError(
            "--lang-model-path is needed with --data: the folder with the language model's config and tokenizer"
        )
    if not 0 <= args.distill <= 1 or (args.distill and not args.teacher):
        raise UserError("--distill takes a weight in [0, 1] and needs --teacher, the unpruned model")
    if args.drop_layers:
        if not args.prune_map_path:
            raise UserError("--drop_layers is checked against the map; name it with --prune_map_path")
        dropped = read_map(args.prune_map_path).get("drop_layers")
        if parse_drop_layers(args.drop_layers) != dropped:
            raise UserError(f"--drop_layers {args.drop_layers}: {args.prune_map_path} says {dropped}")


def main(args):
    check(args)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    seed_everything(args.seed)
    new = (args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_target_modules)
    teacher = config = tokenizer = None
    if args.data:
        model, text, config = load_report_model(
            args.pruned_model_path, args.lang_model_path, args.prune_map_path, args.lora_alpha
        )
        if args.distill:
            teacher = load_report_model(args.teacher, args.teacher_lang_model_path or args.lang_model_path)[0]
        if not config["lora"] and not args.full:
            model.lang_model, config["lora"] = new_lora(model.lang_model, *new)
        places = read_places(args.places) if args.places else None
        train_set = CTRGDataset(
            args.data,
            "train",
            make_grid(config),
            text,
            config["language"],
            args.cache,
            args.flip,
            args.seed,
            limit=args.limit,
            places=places,
        )
        if (model.embedding_layer.evidence_head is None) != (args.places is None):
            raise UserError(
                f"--places: the prompts of {args.pruned_model_path} "
                + (
                    "name no side and place; leave it out"
                    if args.places
                    else "name side and place; give the places.json of dia_pangu/pretrain_vit.py"
                )
            )
    else:
        model, tokenizer = load_model(args.pruned_model_path)
        if args.distill:
            teacher = load_model(args.teacher)[0]
        if not args.full:
            model, _ = new_lora(model, *new)
        train_set = Texts(args.texts, tokenizer, args.max_length, args.limit)
    names = set_trained(model, args.full)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # AdamW steps of 1e-5 vanish in half precision
    if teacher is not None:
        teacher = teacher.to(accelerator.device).requires_grad_(False)
    accelerator.print(f"{describe(model)} in {len(names)} tensors | {len(train_set)} samples")
    out, started = open_run(args.output_dir, args, accelerator, args.resume, args.overwrite), time.time()
    timing = {"status": "failed"}
    try:
        healing = heal(model, train_set, collate, args, accelerator, teacher, args.distill)
        timing["status"] = "finished"
    except BaseException as error:
        timing["status"] = (
            "interrupted" if type(error).__name__ in ("Interrupted", "KeyboardInterrupt") else "failed"
        )
        raise
    finally:
        if accelerator.is_main_process:
            atomic_write(
                out / "timing.json",
                json.dumps({**timing, "started": started, "wall_seconds": time.time() - started}, indent=1),
            )
    weights = accelerator.get_state_dict(healing)  # every process takes part, in case it is sharded
    if accelerator.is_main_process and args.data:
        save_model({key.removeprefix("student."): value for key, value in weights.items()}, out, config)
        print(f"wrote {out}/pytorch_model.bin; test it with pruning/test.py --pruned_model_path {out}")
    elif accelerator.is_main_process:
        model = accelerator.unwrap_model(healing).student
        with atomic_dir(out / "model") as temporary:
            (model if args.full else model.merge_and_unload()).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        print(f"wrote {out}/model, LoRA merged" if not args.full else f"wrote {out}/model")
    accelerator.end_training()


if __name__ == "__main__":
    run(main, parse_args())
