r"""Train a causal language model on report text alone, before it sees a volume.

    python studies/dia_pangu/warm_llm.py --data data/dia_pangu --make 4 --out runs/llm
    python studies/dia_pangu/warm_llm.py --reports ct_reports_train.json --eval-reports ct_reports_val.json \
        --make 4 --out runs/llm_real

--make N builds a small model of openPangu's class (N layers, bias on q, k, v and o) with its own tokenizer,
in which each status sentence of a prompt is one token: a large model reads "is positive", a small one need
not spend its training on that. Without it, --lang-encoder-path names the model to train on: LoRA on all its
linear layers, merged into the weights at the end, or with --full all weights. The text is the
finding sentences, the guide and the report; plain report files ({"cases": [{"id": ..., "report": ...}]}) have
the guide alone. Writes a model folder that --lang-encoder-path takes.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
from torch.utils.data import Dataset

from common.arguments import Parser, add_run_arguments, number, refuse
from common.checkpoint import atomic_dir, atomic_json
from common.errors import UserError
from common.errors import run as run_script
from common.files import read_json
from common.llm import add_lora, add_trust_argument, linear_names, load_llm
from common.run import describe, open_run, seed_everything
from common.tiny_llm import make_llm, make_tokenizer
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
    watched,
)
from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset, collate, raise_bad, read_places
from dia_pangu.src.Dataset.preprocess import Grid
from dia_pangu.src.Dataset.prompt import GUIDES, LANGUAGES, ReportText, prompt_phrases, status_text
from dia_pangu.src.Model.multimodality_model import label_count, token_loss
from dia_pangu.src.Model.pangu import load_tokenizer


class StatusOnly(ReportText):
    """The layout of a report model's text without the image tokens."""

    def prompt(self, statuses, places=None) -> str:
        return status_text(statuses, self.language, places)


class GuideOnly(ReportText):
    """The guide alone in front of the report, for reports without labels."""

    def prompt(self, statuses, places=None) -> str:
        return GUIDES[self.language]


class Reports(Dataset):
    """Plain reports of a JSON file. text: writes the ids; it is set when the tokenizer is known."""

    def __init__(self, path, limit: int = 0):
        cases = read_json(path, {"cases": [{"id": (str, int), "report": str}]})["cases"][: limit or None]
        if not cases:
            raise UserError(f"{path}: field cases is empty; it needs at least one report")
        self.reports = [(str(case["id"]), case["report"]) for case in cases]
        self.text = None

    def __len__(self):
        return len(self.reports)

    def __getitem__(self, index):
        name, report = self.reports[index]
        return {"id": name, "report": report, "text": self.text.sample([], report, name)}


def make_sets(args):
    """Return training set, validation set, the class that writes their text, and the phrases that stay one
    token."""
    # Plain reports have no labels, so that the guide is their whole prompt.
    if args.reports:
        sets = Reports(args.reports, args.limit), Reports(args.eval_reports, args.limit)
        return *sets, GuideOnly, [GUIDES[args.language]]
    # Labelled reports get the prompt of a report model, without image tokens.
    options = {
        "grid": Grid(),
        "language": args.language,
        "vision": False,
        "limit": args.limit,
        "places": read_places(args.places) if args.places else None,
    }
    sets = CTRGDataset(args.data, "train", **options), CTRGDataset(args.data, "val", **options)
    return *sets, StatusOnly, prompt_phrases(args.language)


def make_small(folder, args, reports, phrases):
    """Write a small model of openPangu's class with random weights, and a tokenizer trained on `reports`,
    to `folder`."""
    make_llm(
        folder,
        make_tokenizer(reports, args.vocab_size, phrases),
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


def count_labels(batch) -> torch.Tensor:
    """Count the labels that the mean loss of a batch is over."""
    raise_bad(batch)
    return label_count(batch["labels"])


def mean_loss(model, batch) -> torch.Tensor:
    """Return the mean loss over the labels of a batch, each times its weight where weights are given."""
    inputs = {"input_ids": batch["lang_x"], "attention_mask": batch["attention_mask"]}
    # Through the model's own forward pass, which several processes and autocast have wrapped: logits where
    # any row has a label.
    keep = (batch["labels"][:, 1:] != -100).any(0).nonzero()[:, 0]
    logits, labels = model(**inputs, logits_to_keep=keep).logits, batch["labels"][:, keep + 1]
    weights = batch["loss_reweight"][:, keep + 1] if "loss_reweight" in batch else None
    return token_loss(logits, labels, weights) / count_labels(batch).clamp(min=1)


@torch.no_grad()
def evaluate(model, loader, accelerator) -> dict:
    """Return the mean loss per report token, its perplexity, and the number of tokens; every token weighs 1.

    Several processes show the first reports twice where their last batches would be unequal.
    """
    model.eval()
    sums = torch.zeros(2, device=accelerator.device)
    for batch in loader:
        batch.pop("loss_reweight", None)  # a perplexity counts every token alike
        sums += torch.stack([mean_loss(model, batch) * count_labels(batch), count_labels(batch)]).float()
    model.train()
    total, tokens = accelerator.reduce(sums, "sum").tolist()
    return {"loss": total / tokens, "perplexity": math.exp(min(total / tokens, 50)), "tokens": tokens}


def check_flags(args):
    """Refuse flags that contradict each other, and flags that have no effect in the given mode."""
    # One source of text, one source of the model.
    if bool(args.data) == bool(args.reports):
        raise UserError("give either --data (a folder in the CTRG format) or --reports (a JSON file)")
    if bool(args.make) == bool(args.lang_encoder_path):
        raise UserError(
            "give either --make LAYERS (a new small model) or --lang-encoder-path (one to train on)"
        )
    if bool(args.reports) != bool(args.eval_reports):
        raise UserError("--reports and --eval-reports go together: the perplexity is that of other reports")
    # Flags of the other source.
    if args.reports:
        refuse(args, ["places"], "with --reports, whose prompts name no place")
    if args.make:
        refuse(args, ["trust_remote_code", "full", "lora_r"], "with --make")
    else:
        refuse(args, ["width", "vocab_size"], "without --make")
    if args.full:
        refuse(args, ["lora_r"], "with --full")
    # Random weights learn fast; trained ones are lost at such a rate.
    if "lr" not in args._given:
        args.lr = 3e-3 if args.make else 2e-5 if args.full else 5e-4


def main(args):
    # Text first: an unreadable file ends the run before a folder is made.
    check_flags(args)
    accelerator = make_accelerator(args)
    seed_everything(args.seed)
    train_set, val_set, writer, phrases = make_sets(args)
    out = open_run(args.out, args, accelerator, args.resume, args.overwrite)

    # The model: a folder that is there, of which LoRA alone trains unless --full asks for all of it, or a
    # small new one, whose tokenizer is trained on the training reports alone.
    folder = out / "checkpoints" / "start" if args.make else Path(args.lang_encoder_path)
    if args.make and not folder.is_dir():
        if accelerator.is_main_process:
            make_small(folder, args, training_reports(train_set), phrases)
        meet()
    model = load_llm(folder, torch.float32, args.trust_remote_code)
    if not args.make and not args.full:
        model = add_lora(model, args.lora_r, 2 * args.lora_r, targets=linear_names(model))
    tokenizer, rows = (
        load_tokenizer(folder, args.trust_remote_code),
        model.get_input_embeddings().num_embeddings,
    )
    # The writers of the text: no image tokens, one volume.
    for data in (train_set, val_set):
        data.text = writer(tokenizer, rows, 0, 1, args.language, args.max_length, key_weight=args.key_weight)
    accelerator.print(f"{describe(model)} | {len(train_set)} training and {len(val_set)} held-out reports")

    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.lr, args.weight_decay), lr=args.lr, betas=(0.9, args.adam_beta2)
    )
    if args.compile:
        model.compile()
    loader = make_loader(train_set, args, collate_fn=collate)
    val_loader = make_loader(val_set, args, train=False, collate_fn=collate)
    model, optimizer, loader, val_loader = accelerator.prepare(model, optimizer, loader, val_loader)
    steps = plan_steps(args, loader)

    def eval_scores():
        found = evaluate(model, watched(run, val_loader), accelerator)
        return {f"eval_{key}": value for key, value in found.items()}

    # The loop: a batch's share is its number of labels.
    run = start(accelerator, args, steps, [optimizer], eval_scores)
    model.train()
    for batch, share in batches(run, loader, count_labels):
        with accelerator.accumulate(model):
            loss = mean_loss(model, batch) * share
            check_finite(run, batch["id"], loss=loss)
            accelerator.backward(loss)
            grad = update(run, model, [optimizer], lr_at(run.state["step"], steps, args.warmup))
        if accelerator.sync_gradients:
            finish_step(run, grad=grad)

    # The model folder gets the tokenizer as it was, without image tokens; metrics.json comes last.
    scores = evaluate(model, val_loader, accelerator)
    accelerator.print(
        f"perplexity {scores['perplexity']:.2f} over {scores['tokens']:.0f} held-out tokens; "
        f"{train_set.text.cut + val_set.text.cut} times a text was cut at --max-length"
    )
    if accelerator.is_main_process:
        with atomic_dir(out / "model") as temporary:
            whole = accelerator.unwrap_model(model)
            whole = whole.merge_and_unload() if hasattr(whole, "merge_and_unload") else whole
            whole.save_pretrained(temporary)
            load_tokenizer(folder, args.trust_remote_code).save_pretrained(temporary)
        atomic_json(out / "metrics.json", scores)
    finish(run, **{f"eval_{key}": value for key, value in scores.items()})


def training_reports(train_set) -> list[str]:
    """Return the report texts of a training set of either kind."""
    if isinstance(train_set, Reports):
        return [report for _, report in train_set.reports]
    return [item["finding"] for item in train_set.items]


def parse_args(argv=None):
    parser = Parser(__doc__)

    add = parser.add_argument_group("text").add_argument
    add("--data", help="folder in the CTRG format")
    add("--places", help="with --data: places.json, for prompts that name side and place")
    add("--reports", help="JSON file of plain reports to train on, in place of --data")
    add("--eval-reports", help="JSON file of other plain reports, for the perplexity")
    add("--limit", type=number(int, 0), default=0, help="use only the first reports; 0: all")
    add("--language", choices=LANGUAGES, default="en", help="language of prompts and reports")
    add("--max-length", type=number(int, 8), default=512, help="tokens of a text; longer ones are cut")
    add(
        "--key-weight",
        type=number(float, 0),
        default=1.0,
        help="weight in the loss of the words that name side and place; upstream intends 3",
    )

    # Either an existing model or a new small one.
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--lang-encoder-path", help="folder of the model to train on")
    add(
        "--make",
        type=number(int, 0),
        default=0,
        metavar="LAYERS",
        help="build a new small model with this many layers",
    )
    add("--width", type=number(int, 4), default=128, help="hidden width of the new model")
    add("--vocab-size", type=number(int, 1), default=700, help="tokens of the new tokenizer")
    add(
        "--lora-r",
        type=number(int, 1),
        default=16,
        help="rank of LoRA, which trains of a model that is given",
    )
    add("--full", action="store_true", help="train every weight of a model that is given")
    add_trust_argument(group)
    add("--adam-beta2", type=number(float, 0, 1), default=0.98, help="beta 2 of AdamW")
    add_run_arguments(
        parser, lr=3e-3, weight_decay=0.0, max_steps=350, batch_size=16, accum=1, warmup=20, seed=42
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse_args())
