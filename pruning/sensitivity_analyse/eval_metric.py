"""How far the next-token distributions of two models lie apart, and perplexity.

Upstream names this file, but never published it. All distances are 0 for equal logits and do not change when
a constant is added to a row. l1, l2 and rms average over the whole vocabulary, so that rare tokens dominate;
kl and top1 go by what is likely. Which ranks layers better is decided on a trained model:
studies/pruning/RESULTS.md.
"""

import math

import torch

DISTANCES = ("l1_mean", "l2_mean", "rms", "kl", "l1_last", "top1")


def position_distances(base_logprobs: torch.Tensor, logprobs: torch.Tensor, kind: str) -> torch.Tensor:
    """One value for each position, (..., N), of log-probabilities (..., N, V); see `combine`."""
    difference = base_logprobs - logprobs
    if kind in ("l1_mean", "l1_last"):
        return difference.abs().mean(-1)
    if kind == "l2_mean":
        return difference.norm(dim=-1)
    if kind == "rms":
        return difference.square().mean(-1)
    if kind == "kl":
        # sum p (log p - log q) plus sum (q - p) = 0: every term is >= 0, so float32 keeps small values exact
        return (base_logprobs.exp() * (difference + torch.expm1(-difference))).sum(-1)
    if kind == "top1":
        best = base_logprobs.argmax(-1, keepdim=True).expand(*difference.shape[:-1], 1)
        return difference.gather(-1, best).squeeze(-1).abs()
    raise ValueError(f"{kind}: choose from {', '.join(DISTANCES)}")


def combine(values: torch.Tensor, kind: str) -> torch.Tensor:
    """The score from the values (..., N) of all positions of a prompt."""
    if kind == "l1_last":
        return values[..., -1]
    return values.mean(-1).sqrt() if kind == "rms" else values.mean(-1)


def logprob_distance(base_logits: torch.Tensor, masked_logits: torch.Tensor, kind: str = "l1_mean") -> float:
    """Distance between two sets of logits (N, V) of one prompt."""
    base, masked = base_logits.double().log_softmax(-1), masked_logits.double().log_softmax(-1)
    return combine(position_distances(base, masked, kind), kind).item()


def perplexity(losses: torch.Tensor) -> float:
    """exp of the mean loss per token, at most e^50. losses: (N, 2), summed loss and number of tokens."""
    total, tokens = losses.sum(0).tolist()
    return math.exp(min(total / tokens, 50))
