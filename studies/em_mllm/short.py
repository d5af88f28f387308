"""One step of the short trainings of this study, which take seconds and so are neither saved nor resumed."""

import torch


def step(model, optimizers, loss, factor: float, clip: float = 0.0):
    """Make one optimizer step on `loss`, with every group's learning rate at its "peak" times `factor`.

    clip: largest norm of the gradient; 0: no clipping. Raises FloatingPointError when the loss is nan or inf.
    """
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss.item()}; lower the learning rate")
    loss.backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
        optimizer.zero_grad()
