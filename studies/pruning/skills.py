"""What perplexity hides: whether a language model still chooses, adds, closes brackets and copies.

Every item is a prompt and its candidates; the model chooses the one to which it gives the highest likelihood
per token (choice) or must continue the prompt with the answer, token by token (sums, brackets, copying). All
are made here from a seed. `pruning/test.py --tasks` runs published tasks (lm-eval) on a folder instead.
"""

import random

import torch

FACTS = (
    ("The capital of France is", ("Paris", "London", "Rome", "Madrid")),
    ("The opposite of hot is", ("cold", "tall", "green", "loud")),
    ("A dog is a kind of", ("animal", "fruit", "metal", "country")),
    ("The sun rises in the", ("east", "bag", "spoon", "evening meal")),
    ("Water freezes and becomes", ("ice", "sand", "wood", "music")),
    ("A week has seven", ("days", "dogs", "colours", "doors")),
    ("The heart pumps", ("blood", "air", "light", "sand")),
    ("We breathe with our", ("lungs", "knees", "hair", "shoes")),
    ("Bread is made from", ("flour", "glass", "iron", "paper")),
    ("A triangle has three", ("sides", "tails", "windows", "wheels")),
    ("Bees make", ("honey", "cheese", "steel", "bread")),
    ("The largest ocean is the", ("Pacific", "Sahara", "Amazon", "Everest")),
    ("To cut paper, use", ("scissors", "soup", "a pillow", "a cloud")),
    ("Fish live in", ("water", "fire", "trees", "books")),
    ("The colour of grass is", ("green", "purple", "pink", "black")),
    ("At night we see the", ("moon", "rainbow", "noon", "breakfast")),
    ("A doctor works in a", ("hospital", "submarine", "volcano", "nest")),
    ("Two plus two is", ("four", "nine", "zero", "eleven")),
    ("Snow is", ("white", "hot", "loud", "sour")),
    ("A car drives on a", ("road", "river", "roof", "cloud")),
)


def sums(rng) -> tuple[str, str]:
    """Three examples and a question: sums of two numbers below ten."""
    pairs = [(rng.randint(1, 9), rng.randint(1, 9)) for _ in range(4)]
    shown = "".join(f"{a} + {b} = {a + b}\n" for a, b in pairs[:3])
    a, b = pairs[3]
    return f"{shown}{a} + {b} =", f" {a + b}"


def brackets(rng) -> tuple[str, str]:
    """A list with nested brackets to close."""
    depth = rng.randint(1, 3)
    words = rng.sample(["a", "b", "c", "d", "e"], 3)
    inside = ", ".join(words)
    shown = "(" * depth + inside + ")" * depth
    return f"{shown}\n{shown}\n" + "(" * depth + inside, ")" * depth


def copying(rng) -> tuple[str, str]:
    """A line of words that stood before and has to be gone on with."""
    words = rng.sample("red house river seven cloud table green window paper stone".split(), 5)
    line = " ".join(words)
    return f"{line}\n{line}\n{' '.join(words[:2])}", f" {words[2]} {words[3]}"


GENERATED = {"sums": sums, "brackets": brackets, "copying": copying}


@torch.no_grad()
def likelihood(model, tokenizer, prompt: str, answer: str) -> tuple[float, bool]:
    """(mean log-likelihood of the answer's tokens, whether each is the model's first choice)."""
    head, whole = (tokenizer(text).input_ids for text in (prompt, prompt + answer))
    start = min(len(head), len(whole) - 1)
    ids = torch.tensor([whole], device=model.device)
    logprobs = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float().log_softmax(-1)
    target = ids[0, start:]
    first = bool((logprobs.argmax(-1) == target).all())
    return logprobs.gather(-1, target[:, None]).mean().item(), first


def score_skills(model, tokenizer, items: int = 20, seed: int = 0) -> dict:
    """{skill: share of right answers}; chance is .25 for choice and about 0 for the others."""
    right = []
    for prompt, candidates in FACTS[:items]:
        scores = [likelihood(model, tokenizer, prompt, f" {word}")[0] for word in candidates]
        right.append(scores.index(max(scores)) == 0)
    found = {"choice": sum(right) / len(right)}
    for name, make in GENERATED.items():
        rng = random.Random(f"{name} {seed}")
        answers = [likelihood(model, tokenizer, *make(rng))[1] for _ in range(items)]
        found[name] = sum(answers) / items
    return found
