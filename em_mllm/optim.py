"""Optimizers and learning rate of every training script here."""

import math

import torch


def lr_at(step: int, steps: int, warmup: float, kind: str = "cosine") -> float:
    """Factor on the peak rate at `step`: linear rise over warmup * steps, then a cosine or a straight line to zero."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return 0.5 * (1 + math.cos(math.pi * done)) if kind == "cosine" else 1 - done


def make_optimizers(
    model, kind: str, lr: float, weight_decay: float, betas=(0.9, 0.95)
) -> list[torch.optim.Optimizer]:
    """AdamW over all trained tensors; kind "muon": the matrices of the transformer layers go to Muon instead, at ten times the rate.

    Vectors and embedding tables are not decayed. Every group carries its peak rate as "peak". Muon learned the built-in signals in two
    thirds of AdamW's steps; it needs whole matrices, so use AdamW with FSDP and ZeRO.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    is_matrix = lambda n, p: (
        kind == "muon"
        and p.ndim == 2
        and any(part in n for part in (".layer.", ".layers.", ".decoder_layers."))
    )
    matrices = [p for n, p in named if is_matrix(n, p)]
    rest = [(n, p) for n, p in named if not is_matrix(n, p)]
    decayed = [p for n, p in rest if p.ndim >= 2 and "embed" not in n]
    plain = [p for n, p in rest if not (p.ndim >= 2 and "embed" not in n)]
    groups = [
        {"params": p, "weight_decay": w, "peak": lr} for p, w in ((decayed, weight_decay), (plain, 0.0)) if p
    ]
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=betas)]
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                [{"params": matrices, "peak": 10 * lr}], lr=10 * lr, weight_decay=weight_decay, momentum=0.95
            )
        )
    return optimizers


def set_lr(optimizers, factor: float) -> float:
    """Set every group to its peak rate times `factor`; returns the first group's rate, for the log."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
    return optimizers[0].param_groups[0]["lr"]
