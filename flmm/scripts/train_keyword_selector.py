"""Train the paper's keyword selector: which words of a caption deserve a mask.

    python flmm/scripts/train_keyword_selector.py --config CONFIG --data DATA --out runs/flmm/selector

It learns from the captions of the configuration's train split, where the words inside a phrase count as
keywords. It is scored on the val split by F1, precision and recall over tokens, beside the noun phrases of
spaCy or of a rule and beside "every word". Writes OUT/model.safetensors, which --selector of the demo takes,
and OUT/metrics.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from common.arguments import Parser, add_run_arguments, number
from common.checkpoint import atomic_json, atomic_path
from common.errors import run
from common.run import describe, open_run, seed_everything
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
from flmm.build import add_config_arguments, build_base, build_dataset, read_config
from flmm.conversation import KeywordSelector, noun_spans
from flmm.data.samples import SampleBuilder
from flmm.data.text import encode_text


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        "--records", type=number(int, 1), default=150, help="number of captions to learn from, the first ones"
    )
    parser.add_argument(
        "--val-records", type=number(int, 1), default=100, help="number of captions to score, the first ones"
    )
    add_run_arguments(parser, lr=1e-2, batch_size=1, max_steps=300, warmup=0.0, save_every=0, log_every=50)
    return parser.parse_args(argv)


@torch.no_grad()
def caption_states(base, record):
    """What a record's caption looks like to the selector.

    Returns {"hidden_states" (L, T, d) of the caption's T tokens, "wanted" (T,) bool: the token lies in a
    phrase, "nouns" (T,) bool: it lies in a noun phrase by spaCy or by rule, "name": of the picture}.
    """
    sample = SampleBuilder.of(base)({k: record[k] for k in ("image", "pieces", "file_name")})
    caption = sample["labels"] != -100
    wanted = sample["mask_ids"][caption] >= 0
    # Every token becomes a phrase of its own, so that the base gives the state of each.
    sample["mask_ids"] = torch.where(caption, caption.cumsum(0) - 1, -1)
    hidden_states = base([sample])[0]["hidden_states"].cpu()

    # A piece of the caption counts as a noun phrase when it lies inside one.
    spans = noun_spans(" ".join(text.strip() for text, _ in record["pieces"]))
    nouns, at, start = torch.zeros_like(wanted), 0, 0
    for text, _ in record["pieces"]:
        length, end = len(encode_text(base.tokenizer, text)), start + len(text.strip())
        nouns[at : at + length] = any(first <= start < end <= last for first, last in spans)
        at, start = at + length, end + 1
    return {"hidden_states": hidden_states, "wanted": wanted, "nouns": nouns, "name": record["file_name"]}


def keyword_loss(selector, captions, device):
    """Binary cross-entropy of a list of captions, a mean over their tokens."""
    logits = torch.cat([selector(caption["hidden_states"].to(device)) for caption in captions])
    wanted = torch.cat([caption["wanted"] for caption in captions]).float().to(device)
    return F.binary_cross_entropy_with_logits(logits, wanted)


def f1(pairs):
    """F1, precision and recall over all tokens of `pairs`, each (predicted, wanted) of two bool tensors
    (T,)."""
    predicted, wanted = (torch.cat(part) for part in zip(*pairs))
    hit = (predicted & wanted).sum().item()
    precision, recall = hit / max(1, predicted.sum().item()), hit / max(1, wanted.sum().item())
    both = 2 * precision * recall / max(1e-9, precision + recall)
    return {"F1": both, "precision": precision, "recall": recall}


@torch.no_grad()
def score(selector, captions, device):
    """Scores over the caption tokens: of the selector, of noun phrases, and of taking every word."""
    pairs = {"selector": [], "noun phrases": [], "every word": []}
    for caption in captions:
        wanted = caption["wanted"]
        chosen = selector(caption["hidden_states"].to(device)).sigmoid().cpu() > KeywordSelector.threshold
        pairs["selector"].append((chosen, wanted))
        pairs["noun phrases"].append((caption["nouns"], wanted))
        pairs["every word"].append((torch.ones_like(wanted), wanted))
    return {name: f1(part) for name, part in pairs.items()}


def main(args):
    # The data are checked before the base is loaded. It runs once over each caption; the selector then learns
    # from the states that it left.
    config = read_config(args.config, args.set)
    accelerator = make_accelerator(args)
    limits = {"train": args.records, "val": args.val_records}
    sets = {split: build_dataset(config, split, args.data) for split in limits}
    base, captions = build_base(config).to(accelerator.device), {}
    for split, limit in limits.items():
        records = (sets[split].record(i) for i in range(min(limit, len(sets[split]))))
        captions[split] = [caption_states(base, record) for record in records]

    # A linear map and one weight a layer; no warm-up and a constant rate are enough for it.
    seed_everything(args.seed)
    selector = KeywordSelector(base.num_layers, base.hidden_size)
    if args.compile:
        selector.compile()
    group = {"params": list(selector.parameters()), "lr": args.lr, "peak": args.lr}
    optimizer = torch.optim.AdamW([group], weight_decay=args.weight_decay)
    # Captions differ in length, so a batch stays a list.
    loader = make_loader(captions["train"], args, collate_fn=list)
    model, optimizer, loader = accelerator.prepare(selector, optimizer, loader)
    steps = plan_steps(args, loader)
    out = open_run(args.out, args, accelerator, args.resume, args.overwrite)
    accelerator.print(f"selector: {describe(selector)}; {len(captions['train'])} captions, {steps} steps")

    def found():
        return {"val_F1": score(selector, captions["val"], accelerator.device)["selector"]["F1"]}

    # The loop. The loss of a batch is a mean over its tokens, so its share is counted in tokens.
    training = start(accelerator, args, steps, [optimizer], found)
    for batch, share in batches(training, loader, lambda batch: sum(len(c["wanted"]) for c in batch)):
        with accelerator.accumulate(model):
            loss = keyword_loss(model, batch, accelerator.device) * share
            check_finite(training, [caption["name"] for caption in batch], loss=loss)
            accelerator.backward(loss)
            factor = lr_at(training.state["step"], steps, args.warmup, "constant")
            grad = update(training, model, [optimizer], factor)
        # After an optimizer step: score where it is due, log, save, stop.
        if accelerator.sync_gradients:
            finish_step(training, grad=grad)

    # The weights, and their scores beside those of two rules that have learned nothing.
    scores = score(selector, captions["val"], accelerator.device)
    if accelerator.is_main_process:
        with atomic_path(out / "model.safetensors") as temporary:
            save_file({k: v.cpu().contiguous() for k, v in selector.state_dict().items()}, temporary)
        atomic_json(out / "metrics.json", scores)
        for name, values in scores.items():
            print(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items()))
        print(f"wrote {out / 'model.safetensors'}")
    finish(training, val_F1=scores["selector"]["F1"])


if __name__ == "__main__":
    run(main, parse_args())
