"""Train a causal language model on report text alone, before it sees a volume.

    python dia_pangu/warm_llm.py --data data/dia_pangu --make 4 --out runs/dia_pangu/llm
    python dia_pangu/warm_llm.py --reports ct_reports_train.json --eval-reports ct_reports_val.json --make 4 --out runs/dia_pangu/llm_real

--make N builds a small model of openPangu's class (N layers, bias on q, k, v and o) with its own tokenizer, in which each status
sentence of a prompt is one token: a large model reads "is positive", a small one need not spend its training on that. Without it,
--lang-encoder-path names the model to train on. The text is the finding sentences, the guide and the report; plain report
files ({"cases": [{"report": ...}]}) have the guide alone. Writes a model folder that --lang-encoder-path takes.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import Dataset

from common.checkpoint import atomic_dir, atomic_write
from common.errors import UserError, run
from common.run import describe, open_run, seed_everything
from common.tiny_llm import make_llm, make_tokenizer
from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset, collate, read_places
from dia_pangu.src.Dataset.preprocess import Grid
from dia_pangu.src.Dataset.prompt import GUIDES, LANGUAGES, ReportText, prompt_phrases, status_text
from dia_pangu.src.Model.multimodality_model import load_language_model, token_loss
from dia_pangu.src.Model.pangu import load_tokenizer
from dia_pangu.src.My_Trainer.trainer import Trainer, add_optimization, with_dashes


class TextOnly(ReportText):
    """The same layout without image tokens."""

    def prompt(self, statuses, places=None) -> str:
        return status_text(statuses, self.language, places)


class Reports(Dataset):
    """Plain reports: the guide, then the text."""

    def __init__(self, path, language: str, limit: int = 0):
        try:
            cases = json.loads(Path(path).read_text(encoding="utf-8"))["cases"][: limit or None]
            self.reports = [(str(case["id"]), case["report"]) for case in cases]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{path}: expected {{"cases": [{{"id": ..., "report": ...}}]}} ({error})'
            ) from error
        self.language, self.text = language, None

    def set_epoch(self, epoch):
        pass

    def __len__(self):
        return len(self.reports)

    def __getitem__(self, index):
        name, report = self.reports[index]
        return {"id": name, "report": report, "text": self.text.sample([], report, name)}


class GuideOnly(TextOnly):
    def prompt(self, statuses, places=None) -> str:
        return GUIDES[self.language]


class TextModel(nn.Module):
    """A language model whose loss is this batch's share of the mean over the label tokens of the global batch."""

    def __init__(self, lang_model):
        super().__init__()
        self.lang_model = lang_model

    def forward(self, lang_x, attention_mask, labels, loss_reweight=None, num_tokens=None, num_samples=None):
        logits = self.lang_model(input_ids=lang_x, attention_mask=attention_mask).logits
        return {
            "loss": token_loss(logits, labels, loss_reweight) / (num_tokens or (labels[:, 1:] != -100).sum())
        }


def evaluate(model, loader, accelerator) -> dict:
    """Mean loss per report token and its perplexity."""
    sums = torch.zeros(2, device=accelerator.device, dtype=torch.float64)
    for batch in loader:
        count = (batch["labels"][:, 1:] != -100).sum()
        loss = model(batch["lang_x"], batch["attention_mask"], batch["labels"])["loss"]
        sums += torch.stack([loss * count, count]).double()
    sums = accelerator.reduce(sums, reduction="sum")
    loss = (sums[0] / sums[1]).item()
    return {"loss": loss, "perplexity": math.exp(min(loss, 50)), "tokens": sums[1].item()}


def main(args):
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    seed_everything(args.seed)
    if bool(args.data) == bool(args.reports):
        raise UserError("give either --data (a folder in the CTRG format) or --reports (a json file)")
    if bool(args.make) == bool(args.lang_encoder_path):
        raise UserError(
            "give either --make LAYERS (a new small model) or --lang-encoder-path (one to train on)"
        )
    if args.data:
        options = {
            "grid": Grid(),
            "language": args.language,
            "vision": False,
            "limit": args.limit,
            "places": read_places(args.places) if args.places else None,
        }
        train_set, val_set = (
            CTRGDataset(args.data, "train", **options),
            CTRGDataset(args.data, "val", **options),
        )
        reports = [item["finding"] for item in train_set.items]
        kind, phrases = TextOnly, prompt_phrases(args.language)
    else:
        train_set = Reports(args.reports, args.language, args.limit)
        val_set = Reports(args.eval_reports or args.reports, args.language, args.limit)
        reports, kind, phrases = (
            [report for _, report in train_set.reports],
            GuideOnly,
            [GUIDES[args.language]],
        )

    out = open_run(args.output_dir, args, accelerator, args.resume, args.overwrite)
    folder = out / "checkpoints" / "start" if args.make else Path(args.lang_encoder_path)
    if args.make and not folder.is_dir():
        if accelerator.is_main_process:
            tokenizer = make_tokenizer(reports, args.vocab_size, phrases)
            make_llm(
                folder,
                tokenizer,
                "PanguEmbedded",
                args.seed,
                hidden_size=args.width,
                intermediate_size=2 * args.width,
                num_hidden_layers=args.make,
                num_attention_heads=4,
                num_key_value_heads=2,
                bias=True,
                rope_theta=16000000.0,
                max_position_embeddings=max(1024, args.max_length),
            )
        accelerator.wait_for_everyone()
    model = TextModel(
        load_language_model(folder, args.trust_remote_code, torch.float32 if args.make else "auto")
    )
    tokenizer = load_tokenizer(folder, args.trust_remote_code)
    for data in (train_set, val_set):
        data.text = kind(
            tokenizer,
            model.lang_model.get_input_embeddings().num_embeddings,
            0,
            1,
            args.language,
            args.max_length,
            key_weight=args.key_weight,
        )
    accelerator.print(describe(model), "| reports", len(train_set))
    trainer = Trainer(
        model,
        args,
        accelerator,
        train_set,
        collate,
        ("lang_x", "attention_mask", "labels", "loss_reweight"),
        None,
        val_set,
        evaluate,
    )
    scores = trainer.train()
    accelerator.print(
        f"perplexity {scores['perplexity']:.2f} over {scores['tokens']:.0f} held-out tokens; "
        f"{train_set.text.cut + val_set.text.cut} times a text was cut at --max-length"
    )
    if accelerator.is_main_process:
        tokenizer = load_tokenizer(folder, args.trust_remote_code)  # as it was, without image tokens
        with atomic_dir(out / "model") as temporary:
            accelerator.unwrap_model(trainer.model).lang_model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        atomic_write(out / "metrics.json", json.dumps(scores, indent=1))
    accelerator.end_training()


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder in the CTRG format")
    parser.add_argument(
        "--places", help="with --data: places.json of pretrain_vit.py, for prompts that name side and place"
    )
    parser.add_argument(
        "--key-weight",
        type=float,
        default=1.0,
        help="weight in the loss of the words that name side and place (default %(default)s; upstream foresees 3)",
    )
    parser.add_argument("--reports", help="json file of plain reports to train on")
    parser.add_argument("--eval-reports", help="json file of plain reports for the perplexity")
    parser.add_argument("--limit", type=int, default=0, help="use only the first reports; 0: all")
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="(default %(default)s)")
    parser.add_argument(
        "--make", type=int, default=0, metavar="LAYERS", help="build a new small model with so many layers"
    )
    parser.add_argument("--width", type=int, default=128, help="hidden width of --make (default %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=700, help="tokens of --make (default %(default)s)")
    parser.add_argument(
        "--max-length",
        type=int,
        default=512,
        help="tokens of a text; longer ones are cut (default %(default)s)",
    )
    parser.add_argument("--lang-encoder-path", help="folder of the model to train on")
    parser.add_argument("--trust-remote-code", action="store_true")
    add_optimization(
        parser,
        learning_rate=3e-3,
        max_steps=350,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        adam_beta2=0.98,
    )
    return parser.parse_args(with_dashes(sys.argv[1:]))


if __name__ == "__main__":
    run(main, parse_args())
