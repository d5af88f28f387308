"""Train the paper's keyword selector: which words of a caption deserve a mask.

    python flmm/scripts/train_keyword_selector.py --config CONFIG --data DATA --out selector.safetensors

It learns from the captions of the configuration's train split (words inside a phrase count) and is scored on its val split:
F1, precision and recall over words, beside noun phrases by spaCy or rule and beside "every word".
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # repository root: every way of starting this file finds it

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file

from common.checkpoint import atomic_path, atomic_write
from common.errors import run
from flmm.build import add_config_arguments, build_base, build_dataset, read_config
from flmm.conversation import KeywordSelector, noun_phrases
from flmm.data.samples import SampleBuilder


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument("--records", type=int, default=150, help="captions to learn from (default 150)")
    parser.add_argument(
        "--steps", type=int, default=300, help="optimizer steps, one caption each (default 300)"
    )
    parser.add_argument("--seed", type=int, default=0, help="weights (default 0)")
    parser.add_argument(
        "--out", type=Path, required=True, help=".safetensors to write; scores go beside it as .json"
    )
    return parser.parse_args()


def caption_states(base, record):
    """Hidden states (L, T, d) of the T tokens of a record's caption, and which of them lie in a phrase (T,) bool."""
    sample = SampleBuilder.of(base)({k: record[k] for k in ("image", "pieces", "file_name")})
    caption = sample["labels"] != -100
    wanted = sample["mask_ids"][caption] >= 0
    sample["mask_ids"] = torch.where(
        caption, caption.cumsum(0) - 1, -1
    )  # every token its own phrase, so that none is left out
    return base([sample])[0]["hidden_states"], wanted


def train_selector(base, records, steps=200, lr=1e-2, seed=0):
    """Fit a KeywordSelector: every caption token inside a phrase counts as a keyword. BCE, AdamW, one record a step."""
    torch.manual_seed(seed)
    selector = KeywordSelector(base.num_layers, base.hidden_size).to(base.device)
    optimizer, captions = (
        torch.optim.AdamW(selector.parameters(), lr=lr),
        [caption_states(base, record) for record in records],
    )
    for step in range(steps):
        hidden, wanted = captions[step % len(captions)]
        F.binary_cross_entropy_with_logits(selector(hidden), wanted.float().to(hidden.device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return selector.eval()


def f1(pairs):
    """pairs of (predicted, wanted) bool tensors -> F1, precision, recall over all of them."""
    predicted, wanted = (torch.cat(part) for part in zip(*pairs))
    hit = (predicted & wanted).sum().item()
    precision, recall = hit / max(1, predicted.sum().item()), hit / max(1, wanted.sum().item())
    return {
        "F1": 2 * precision * recall / max(1e-9, precision + recall),
        "precision": precision,
        "recall": recall,
    }


@torch.no_grad()
def score(base, selector: KeywordSelector, records):
    """Scores over the caption tokens of the selector, of noun phrases and of every word."""
    pairs = {"selector": [], "noun phrases": [], "every word": []}
    for record in records:
        hidden, wanted = caption_states(base, record)
        chosen = selector(hidden).sigmoid().cpu() > selector.threshold
        pairs["selector"].append((chosen, wanted))
        pairs["every word"].append((torch.ones_like(wanted), wanted))
        words = noun_phrases(" ".join(text.strip() for text, _ in record["pieces"]))
        nouns, at = torch.zeros_like(wanted), 0
        for text, _ in record["pieces"]:  # a piece counts when it lies inside a noun phrase
            n = len(base.tokenizer(text, add_special_tokens=False).input_ids)
            nouns[at : at + n] = any(text.strip() and text.strip() in phrase for phrase in words)
            at += n
        pairs["noun phrases"].append((nouns, wanted))
    return {name: f1(part) for name, part in pairs.items()}


def main(args):
    config = read_config(args.config, args.set)
    base = build_base(config).to(Accelerator().device)
    train = build_dataset(config, "train", args.data, None)
    val = build_dataset(config, "val", args.data, None)
    selector = train_selector(
        base, [train.record(i) for i in range(min(args.records, len(train)))], args.steps, seed=args.seed
    )
    scores = score(base, selector, [val.record(i) for i in range(min(100, len(val)))])
    for name, values in scores.items():
        print(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items()))
    with atomic_path(args.out) as temporary:
        save_file({k: v.cpu().contiguous() for k, v in selector.state_dict().items()}, temporary)
    atomic_write(args.out.with_suffix(".json"), json.dumps(scores, indent=1))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main, parse_args())
