"""Make a tiny language model that can answer multiple-choice questions, so that everything runs without a download.

It is trained on text alone, never on a signal: where the signal vectors will stand, the name of a class stands, and the model learns to find it
among the options and to answer with its letter. What is left for the joint training is to turn signals into something that reads like a name.

    python em_mllm/make_llm.py --out data/em_mllm_llm --steps 1400
"""
import argparse
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root: every way of starting this file finds it

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from common.checkpoint import atomic_dir
from common.errors import UserError, run
from common.run import progress, seed_everything
from common.tiny_llm import make_llm, make_tokenizer
from em_mllm.dataset import collate_text, parse_options
from em_mllm.make_data import LETTERS, four_choice, open_question
from em_mllm.model import IQ_END, IQ_START
from em_mllm.optim import lr_at, make_optimizers, set_lr
from em_mllm.signals import TASKS


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, default=1400, help="training steps (default 1400)")
    parser.add_argument("--batch-size", type=int, default=32, help="texts per step (default 32)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default 2e-3)")
    parser.add_argument("--hidden-size", type=int, default=96)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--slots", type=int, default=9, help="places that the class name fills where signal vectors will stand (default 9)")
    parser.add_argument("--extra-names", nargs="*", default=[], help="more class names to know (each one token)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args()


def build_tokenizer(extra_names=()):
    """Byte-level BPE on the templates; a letter in brackets and a class name are one token each, which makes binding one to the other learnable."""
    rng = np.random.default_rng(0)
    texts = []
    for task, names in TASKS.items():
        for name in names:
            for item in [four_choice(task, name, rng) for _ in range(8)] + [open_question(task, name, rng) for _ in range(2)]:
                texts += [item["question"], item["answer"]]
    tokenizer = make_tokenizer(texts, vocab_size=900, special_tokens=(IQ_START, IQ_END))
    tokenizer.add_tokens([f"({letter}) " for letter in LETTERS] + [name for names in TASKS.values() for name in names] + list(extra_names))
    return tokenizer


def sample_text(tokenizer, rng, slots):
    """One training text: (token ids, how many are prompt). 40 % recite the options, 45 % answer a question, 15 % name the class."""
    task = list(TASKS)[rng.integers(len(TASKS))]
    name = TASKS[task][rng.integers(len(TASKS[task]))]
    item = four_choice(task, name, rng)
    kind = rng.uniform()
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    signal = encode(f"{IQ_START}{name * slots}{IQ_END}")
    if kind < 0.4:                                               # options, then "name letter" or "letter name" pairs in random order
        options = parse_options(item)
        pairs = [f"({a}) {n}" if rng.uniform() < 0.5 else f"{n}({a}) " for a, n in options.items()]
        prompt = encode(item["question"]) + [tokenizer.eos_token_id]
        return prompt + encode("".join(pairs[i] for i in rng.permutation(4))), -len(prompt)
    if kind > 0.85:
        item = open_question(task, name, rng)
    prompt = signal + encode(item["question"]) + [tokenizer.eos_token_id]
    return prompt + encode(item["answer"]) + [tokenizer.eos_token_id], len(prompt)


def batch_of(tokenizer, rng, size, slots):
    texts, prompts = zip(*[sample_text(tokenizer, rng, slots) for _ in range(size)])
    ids, mask, labels = collate_text(texts, [abs(n) for n in prompts], tokenizer.pad_token_id)
    for row, n in enumerate(prompts):                            # recited pairs: only the partner can be known
        if n < 0:
            labels[row, -n : len(texts[row]) : 2] = -100
    return ids, mask, labels


@torch.no_grad()
def letter_accuracy(llm, tokenizer, rng, slots, count=200):
    """Share of four-choice texts whose letter gets the highest probability of the four."""
    letters = tokenizer.convert_tokens_to_ids([f"({a}) " for a in LETTERS])
    hits, seen = 0, 0
    while seen < count:
        ids, mask, labels = batch_of(tokenizer, rng, 50, slots)
        logits = llm(input_ids=ids, attention_mask=mask).logits
        for row in range(len(ids)):
            where = [int(w) for w in torch.nonzero(labels[row] >= 0).flatten() if int(labels[row, w]) in letters]
            if len(where) == 1:                                  # a question, not a recitation
                hits += letters[int(logits[row, where[0] - 1, letters].argmax())] == int(labels[row, where[0]])
                seen += 1
    return hits / seen


def main(args):
    if args.out.exists() and any(args.out.iterdir()) and not args.overwrite:
        raise UserError(f"{args.out} is not empty; choose another --out or add --overwrite")
    seed_everything(args.seed)
    tokenizer = build_tokenizer(args.extra_names)
    rng, start = np.random.default_rng(args.seed + 1), time.process_time()
    with atomic_dir(args.out) as out:
        make_llm(out / "start", tokenizer, seed=args.seed, hidden_size=args.hidden_size, intermediate_size=256 * args.hidden_size // 96,
                 num_hidden_layers=args.layers, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True, initializer_range=0.06)
        llm = AutoModelForCausalLM.from_pretrained(out / "start").train()
        optimizers = make_optimizers(llm, "muon", args.lr, 0.05)
        for step in progress(range(args.steps), desc="warm-up on text", unit="step"):
            set_lr(optimizers, lr_at(step, args.steps, warmup=0.03))
            ids, mask, labels = batch_of(tokenizer, rng, args.batch_size, args.slots)
            hidden = llm.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
            learned = labels[:, 1:] >= 0
            loss = F.cross_entropy(llm.lm_head(hidden[learned]), labels[:, 1:][learned])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(llm.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if (step + 1) % 200 == 0:
                print(f"step {step + 1}/{args.steps} | loss {loss.item():.3f} | letter accuracy {letter_accuracy(llm, tokenizer, np.random.default_rng(1), args.slots):.3f}"
                      f" | {time.process_time() - start:.0f} CPU s")
        llm.eval().save_pretrained(out)
        tokenizer.save_pretrained(out)
        shutil.rmtree(out / "start")
    print(f"{args.out}: {sum(p.numel() for p in llm.parameters()):,} parameters, vocabulary {len(tokenizer)}")


if __name__ == "__main__":
    run(main, parse_args())
