"""What training on signals leaves of a language model: perplexity of plain English before and after, and
whether the model without its adapters is the base to the bit.

    python studies/em_mllm/language.py --model runs/em_mllm/smollm2/model --out runs/em_mllm/smollm2_language

The text is Python's own language reference (the topics of `help()`), which every installation holds and no
signal question resembles.
"""

import math
import sys
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
import torch.nn.functional as F

from common.arguments import Parser, number
from common.checkpoint import atomic_json
from common.errors import UserError, run
from em_mllm.model import base_folder, load_llm, load_model, read_notes

TOPICS = ("naming", "import", "execmodel", "objects", "exceptions", "numeric-types", "typesseq", "class")


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the model/ folder that train.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for metrics.json")
    parser.add_argument("--tokens", type=number(int, 64), default=4096, help="tokens of text to read")
    parser.add_argument("--window", type=number(int, 16), default=512, help="tokens read at a time")
    return parser.parse_args(argv)


def plain_english() -> str:
    """Prose of the language reference, one paragraph a line, without code."""
    paragraphs = [p for name in TOPICS for p in topics.get(name, "").split("\n\n")]
    prose = [" ".join(p.split()) for p in paragraphs if not p.startswith(" ") and len(p) > 120]
    return "\n".join(prose)


@torch.no_grad()
def losses(llm, ids, window: int) -> tuple[float, torch.Tensor]:
    """Mean loss per token of `ids`, read in windows, and the logits of the first window."""
    total, first = 0.0, None
    for part in ids.split(window):
        logits = llm(input_ids=part[None]).logits[0].float()
        first = logits if first is None else first
        total += float(F.cross_entropy(logits[:-1], part[1:], reduction="sum"))
    return total / sum(len(part) - 1 for part in ids.split(window)), first


def main(args):
    notes = read_notes(args.model)
    if notes["llm"] != "adapter":
        raise UserError(f"{args.model} holds no adapters; its language model is {notes['llm']}")
    model, tokenizer = load_model(args.model)
    ids = tokenizer(plain_english(), return_tensors="pt")["input_ids"][0][: args.tokens]
    base = load_llm(base_folder(args.model, notes), notes["dtype"]).eval()
    before, plain = losses(base, ids, args.window)
    after, _ = losses(model.llm, ids, args.window)
    with model.llm.disable_adapter():
        _, off = losses(model.llm, ids[: args.window], args.window)
    metrics = {
        "tokens": len(ids),
        "perplexity_before": math.exp(before),
        "perplexity_after": math.exp(after),
        "adapters_off_equals_base": bool(torch.equal(plain, off)),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_json(args.out / "metrics.json", metrics)
    print("\n".join(f"{k}: {v}" for k, v in metrics.items()))


if __name__ == "__main__":
    run(main, parse_args())
