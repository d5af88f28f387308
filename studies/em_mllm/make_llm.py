"""Make a tiny language model that can answer multiple-choice questions, so that everything runs without a
download.

It is trained on text alone, never on a signal: where the signal vectors will stand, the name of a class
stands, with some wrong names as an unsure signal would say them, and the model learns to find it among the
options and to answer with its letter. What is left for the joint training is to turn signals into something
that reads like a name.

    python studies/em_mllm/make_llm.py --out data/em_mllm_llm --steps 500
"""

import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from common.arguments import Parser
from common.checkpoint import atomic_dir
from common.errors import UserError, run
from common.run import progress, seed_everything
from common.tiny_llm import make_llm, make_tokenizer
from common.train import lr_at
from em_mllm.dataset import collate_text
from em_mllm.make_data import LETTERS, NOUN, four_choice, open_question
from em_mllm.model import IQ_END, IQ_START
from em_mllm.optim import make_optimizers
from em_mllm.options import parse_options
from em_mllm.signals import TASKS
from studies.em_mllm import short


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    parser.add_argument("--batch-size", type=int, default=64, help="texts per step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--hidden-size", type=int, default=96, help="width of the model")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model")
    parser.add_argument(
        "--slots",
        type=int,
        default=9,
        help="places that the class name fills where signal vectors will stand",
    )
    parser.add_argument(
        "--tasks",
        type=Path,
        help="JSON of other tasks to ask about, instead of the built-in ones: "
        '{"device": {"noun": ["设备型号", "device"], "names": ["a", "b"]}}',
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in --out")
    return parser.parse_args(argv)


def read_tasks(path) -> list[tuple[list[str], tuple[str, str]]]:
    """[(class names, what they are called in Chinese and English)] of --tasks, or of the built-in data."""
    if path is None:
        return [(list(names), NOUN[task]) for task, names in TASKS.items()]
    try:
        return [(t["names"], tuple(t["noun"])) for t in json.loads(path.read_text(encoding="utf-8")).values()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--tasks {path}: not of the form shown in --help ({error})") from error


def build_tokenizer(tasks):
    """Byte-level BPE on the templates; a letter in brackets and a class name are one token each, so that one
    can be bound to the other."""
    rng = np.random.default_rng(0)
    texts = [
        text
        for names, noun in tasks
        for name in names
        for _ in range(8)
        for item in (four_choice(names, name, noun, rng), open_question(name, noun, rng))
        for text in (item["question"], item["answer"])
    ]
    tokenizer = make_tokenizer(texts, vocab_size=900, special_tokens=(IQ_START, IQ_END))
    tokenizer.add_tokens(
        [f"({letter}) " for letter in LETTERS] + [name for names, _ in tasks for name in names]
    )
    return tokenizer


def sample_text(tokenizer, tasks, rng, slots, recite):
    """One training text: (token ids, how many are prompt; negative when it recites).

    A share `recite` recites the options; of the rest three in four choose, one names.
    """
    names, noun = tasks[rng.integers(len(tasks))]
    name = names[rng.integers(len(names))]
    item = four_choice(names, name, noun, rng)
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    if rng.uniform() < recite:  # options, then "name letter" or "letter name" pairs in random order
        pairs = [
            f"({a}) {n}" if rng.uniform() < 0.5 else f"{n}({a}) " for a, n in parse_options(item).items()
        ]
        prompt = encode(item["question"]) + [tokenizer.eos_token_id]
        return prompt + encode("".join(pairs[i] for i in rng.permutation(len(pairs)))), -len(prompt)
    if rng.uniform() < 0.25:
        item = open_question(name, noun, rng)
    sure = rng.uniform(
        0.4, 1
    )  # a signal is not always certain: some slots say another name, an option or not
    shown = "".join(name if rng.uniform() < sure else names[rng.integers(len(names))] for _ in range(slots))
    prompt = encode(f"{IQ_START}{shown}{IQ_END}" + item["question"]) + [tokenizer.eos_token_id]
    return prompt + encode(item["answer"]) + [tokenizer.eos_token_id], len(prompt)


def batch_of(tokenizer, tasks, rng, size, slots, recite):
    texts, prompts = zip(*[sample_text(tokenizer, tasks, rng, slots, recite) for _ in range(size)])
    ids, mask, labels = collate_text(texts, [abs(n) for n in prompts], tokenizer.pad_token_id)
    for row, n in enumerate(prompts):  # recited pairs: only the partner can be known
        if n < 0:
            labels[row, -n : len(texts[row]) : 2] = -100
    return ids, mask, labels


@torch.no_grad()
def letter_accuracy(llm, tokenizer, tasks, rng, slots, count=200):
    """Share of four-choice texts whose letter gets the highest probability of the four."""
    letters = tokenizer.convert_tokens_to_ids([f"({a}) " for a in LETTERS])
    hits, seen = 0, 0
    while seen < count:
        ids, mask, labels = batch_of(tokenizer, tasks, rng, 50, slots, 0.0)
        logits = llm(input_ids=ids, attention_mask=mask).logits
        for row in range(len(ids)):
            where = [
                int(w) for w in torch.nonzero(labels[row] >= 0).flatten() if int(labels[row, w]) in letters
            ]
            if len(where) == 1:  # not an open question
                hits += letters[int(logits[row, where[0] - 1, letters].argmax())] == int(
                    labels[row, where[0]]
                )
                seen += 1
    return hits / seen


def main(args):
    if args.out.exists() and any(args.out.iterdir()) and not args.overwrite:
        raise UserError(f"{args.out} is not empty; choose another --out or add --overwrite")
    seed_everything(args.seed)
    tasks = read_tasks(args.tasks)
    tokenizer = build_tokenizer(tasks)
    rng, start = np.random.default_rng(args.seed + 1), time.process_time()
    with atomic_dir(args.out) as out:
        make_llm(
            out / "start",
            tokenizer,
            seed=args.seed,
            hidden_size=args.hidden_size,
            intermediate_size=256 * args.hidden_size // 96,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            initializer_range=0.06,
        )
        llm = AutoModelForCausalLM.from_pretrained(out / "start").train()
        for layer in (
            llm.model.layers
        ):  # start by attending to equal tokens and copying them: binding is learned sooner
            attention = layer.self_attn
            attention.q_proj.weight.data.copy_(attention.k_proj.weight)
            torch.nn.init.orthogonal_(attention.v_proj.weight)
            attention.o_proj.weight.data.copy_(attention.v_proj.weight.T)
        optimizers = make_optimizers(llm, "muon", args.lr, 0.05)
        for step in progress(range(args.steps), desc="warm-up on text", unit="step"):
            recite = (
                1.0 if step < 0.4 * args.steps else 0.3
            )  # recitation first: every pair in it is a lesson in binding
            ids, mask, labels = batch_of(tokenizer, tasks, rng, args.batch_size, args.slots, recite)
            hidden = llm.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
            learned = labels[:, 1:] >= 0
            loss = F.cross_entropy(llm.lm_head(hidden[learned]), labels[:, 1:][learned])
            short.step(llm, optimizers, loss, lr_at(step, args.steps, warmup=0.03), clip=1.0)
            if (step + 1) % 100 == 0:
                print(
                    f"step {step + 1}/{args.steps} | loss {loss.item():.3f} | letter accuracy "
                    f"{letter_accuracy(llm, tokenizer, tasks, np.random.default_rng(1), args.slots):.3f}"
                    f" | {time.process_time() - start:.0f} CPU s"
                )
        llm.eval().save_pretrained(out)
        tokenizer.save_pretrained(out)
        shutil.rmtree(out / "start")
    print(f"{args.out}: {sum(p.numel() for p in llm.parameters()):,} parameters, vocabulary {len(tokenizer)}")


if __name__ == "__main__":
    run(main, parse_args())
