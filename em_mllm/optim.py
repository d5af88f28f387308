"""Muon beside AdamW, for every training script here."""

import torch

from common.errors import UserError
from common.train import parameter_groups


def add_optimizer_argument(group):
    group.add_argument(
        "--optimizer",
        choices=("adamw", "muon"),
        default="adamw",
        help="muon: orthogonalised momentum for the matrices of the layers",
    )


def make_optimizers(model, kind: str, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """AdamW over all trained tensors; kind "muon": the matrices of the transformer layers go to Muon instead,
    at ten times the learning rate.

    Vectors and embedding tables are not decayed. Every group carries its peak rate as "peak". Muon learned
    the built-in signals in two thirds of AdamW's steps; it needs whole matrices, so use AdamW with FSDP and
    ZeRO.
    """
    matrices = []
    if kind == "muon":
        for name, parameter in model.named_parameters():
            in_layer = any(part in name for part in (".layer.", ".layers.", ".decoder_layers."))
            if parameter.requires_grad and parameter.ndim == 2 and in_layer:
                matrices.append(parameter)
        if not matrices:
            raise UserError(
                "--optimizer muon has no effect: no matrix of a transformer layer is trained; leave it out"
            )
    groups = parameter_groups(model, lr, weight_decay, plain=("embed",))
    taken = set(matrices)
    for group in groups:
        group["params"] = [p for p in group["params"] if p not in taken]
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95))]
    if matrices:
        high = 10 * lr
        group = {"params": matrices, "peak": high}
        optimizers.append(torch.optim.Muon([group], lr=high, weight_decay=weight_decay, momentum=0.95))
    return optimizers
