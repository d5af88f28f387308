"""The texts of the real study: CT reports, and prose on a language that every Python brings."""

import pydoc_data.topics
import re

import torch

from common.files import read_json


def reports(path) -> list[str]:
    """The reports of one split."""
    return [case["report"] for case in read_json(path, {"cases": [{"report": str}]})["cases"]]


def english() -> tuple[list[str], list[str]]:
    """(training, test) paragraphs of Python's help topics: disjoint topics, prose alone, deterministic."""
    parts = ([], [])
    for i, name in enumerate(sorted(pydoc_data.topics.topics)):
        paragraphs = re.split(r"\n\s*\n", pydoc_data.topics.topics[name])
        prose = [" ".join(text.split()) for text in paragraphs]
        parts[i % 4 == 0].extend(t for t in prose if len(t) > 200 and t[0].isupper() and ">>>" not in t)
    training, held_out = (list(dict.fromkeys(part)) for part in parts)
    known = set(held_out)  # topics quote each other
    return [text for text in training if text not in known], held_out


def stream(texts, tokenizer, tokens: int) -> list[str]:
    """As many of the first texts as make a stream of at least `tokens` tokens."""
    chosen, length = [], 0
    for text in texts:
        if length >= tokens:
            break
        chosen.append(text)
        length += len(tokenizer(text).input_ids)
    return chosen


def pieces(kinds, tokenizer, tokens: int, count: int) -> list[torch.Tensor]:
    """`count` pieces of `tokens` token ids, one of each kind of texts in turn.

    The texts of a kind are one stream with empty lines between, as in the test; kinds: lists of texts.
    """
    each = -(-count // len(kinds))
    streams = []
    for texts in kinds:
        some = stream(texts, tokenizer, tokens * each)
        streams.append(torch.tensor(tokenizer("\n\n".join(some)).input_ids).split(tokens)[:each])
    return [piece for turn in zip(*streams) for piece in turn][:count]
