"""Learning rate of F-LMM: linear warm-up, then cosine to zero. Upstream: mmengine LinearLR + CosineAnnealingLR by iteration."""

import math


def lr_at(step, lr, total_steps, warmup_ratio=0.03, start_factor=1e-5, upstream_one_step_warmup=False):
    """Learning rate of optimizer step `step` (0-based) of `total_steps`; W = int(warmup_ratio * total_steps).

    A warm-up of one step leaves upstream's learning rate at `start_factor` of its value for the whole run; here a short
    run starts at the peak. `upstream_one_step_warmup=True` reproduces the published behaviour.
    """
    warmup = int(warmup_ratio * total_steps)
    if warmup == 1 and upstream_one_step_warmup:
        return (
            lr
            * start_factor
            * (0.5 * (1 + math.cos(math.pi * (step - 1) / (total_steps - 1))) if step >= 1 else 1)
        )
    if warmup > 1 and step < warmup:
        return lr * (start_factor + (1 - start_factor) * step / (warmup - 1))
    warmup = warmup if warmup > 1 else 0
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))
