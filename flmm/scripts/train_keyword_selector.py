"""Train the paper's keyword selector: which words of a caption deserve a mask.

    python flmm/scripts/train_keyword_selector.py --config CONFIG --data DATA --out selector.safetensors

It learns from the captions of the configuration's train split (words inside a phrase count) and is scored on its val split:
F1, precision and recall over words, beside noun phrases by spaCy or rule and beside "every word".
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root: every way of starting this file finds it

import torch
from safetensors.torch import save_file

from common.checkpoint import atomic_path, atomic_write
from common.errors import run
from flmm.build import build_base, build_dataset, read_config
from flmm.conversation import KeywordSelector, noun_phrases, train_selector
from flmm.data.samples import SampleBuilder


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of flmm/configs")
    parser.add_argument("--set", nargs="*", default=[], metavar="PART.NAME=VALUE", help="override values of the configuration")
    parser.add_argument("--data", type=Path, required=True, help="root of the data paths of the configuration")
    parser.add_argument("--records", type=int, default=150, help="captions to learn from (default 150)")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps, one caption each (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="weights (default 0)")
    parser.add_argument("--out", type=Path, required=True, help=".safetensors to write; scores go beside it as .json")
    return parser.parse_args()


def f1(pairs):
    """pairs of (predicted, wanted) bool tensors -> F1, precision, recall over all of them."""
    predicted, wanted = (torch.cat(part) for part in zip(*pairs))
    hit = (predicted & wanted).sum().item()
    precision, recall = hit / max(1, predicted.sum().item()), hit / max(1, wanted.sum().item())
    return {"F1": 2 * precision * recall / max(1e-9, precision + recall), "precision": precision, "recall": recall}


@torch.no_grad()
def score(base, selector: KeywordSelector, records):
    """Scores over the caption tokens of the selector, of noun phrases and of every word."""
    builder, pairs = SampleBuilder.of(base), {"selector": [], "noun phrases": [], "every word": []}
    for record in records:
        sample = builder({k: record[k] for k in ("image", "pieces", "file_name")})
        caption = sample["labels"] != -100
        wanted = sample["mask_ids"][caption] >= 0
        sample["mask_ids"] = torch.where(caption, caption.cumsum(0) - 1, -1)
        chosen = selector(base([sample])[0]["hidden_states"]).sigmoid().cpu() > selector.threshold
        pairs["selector"].append((chosen, wanted))
        pairs["every word"].append((torch.ones_like(wanted), wanted))
        words = noun_phrases(" ".join(text.strip() for text, _ in record["pieces"]))
        nouns = torch.zeros_like(wanted)
        at = 0
        for text, _ in record["pieces"]:   # a piece counts when it lies inside a noun phrase
            n = len(base.tokenizer(text, add_special_tokens=False).input_ids)
            nouns[at: at + n] = any(text.strip() and text.strip() in phrase for phrase in words)
            at += n
        pairs["noun phrases"].append((nouns, wanted))
    return {name: f1(part) for name, part in pairs.items()}


def main(args):
    config = read_config(args.config, args.set)
    base = build_base(config)
    train = build_dataset(config, "train", args.data, None)
    val = build_dataset(config, "val", args.data, None)
    selector, loss = train_selector(base, [train.record(i) for i in range(min(args.records, len(train)))], args.steps, seed=args.seed)
    scores = score(base, selector, [val.record(i) for i in range(min(100, len(val)))])
    for name, values in scores.items():
        print(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items()))
    with atomic_path(args.out) as temporary:
        save_file({k: v.contiguous() for k, v in selector.state_dict().items()}, temporary)
    atomic_write(args.out.with_suffix(".json"), json.dumps({"loss": loss, **scores}, indent=1))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main, parse_args())
