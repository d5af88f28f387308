"""Switching off a part of one decoder layer, without changing a weight (upstream:
sensitivity-analyse/layer_mask.py).

mode        what is zero                              effect q, k, qk    output of the projection(s), after
bias   all scores equal: every position averages its past (q, k, qk agree) v, qv       output of v (and q),
after bias           attention returns o_proj(0), the o bias (v and qv agree: with
                                                      V = 0 the weights do not matter)
head        one query head before o_proj
attention   the attention branch, o bias included
mlp         the MLP branch
layer       both branches: the layer returns its input
Upstream's names v_only, q_only and k_only are accepted.
"""

import contextlib
import sys
from pathlib import Path

import torch
from torch import nn

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.errors import UserError
from pruning.layers import ATTENTION, MLP, OUTPUT, child, decoder_layers, head_counts

MODES = ("q", "k", "v", "qk", "qv", "head", "attention", "mlp", "layer")
FUSED = ("qkv_proj", "c_attn")  # one projection whose output is q, k, v one after the other


class ProjHeadMaskWrapper(nn.Module):
    """A projection whose output heads can be switched off.

    base_linear: Linear, LoRA Linear or Conv1D with output (..., heads * head_dim). num_out_heads: counted
    from the weight when None (upstream counted in the first forward, which forgot a mask set before it).
    forward returns the projection bit for bit while every head is on; else each head times its mask, after
    the bias, so that a head that is off is exactly 0.
    """

    def __init__(self, base_linear: nn.Module, head_dim: int, num_out_heads: int | None = None):
        super().__init__()
        self.base_linear, self.head_dim = base_linear, head_dim
        width = getattr(base_linear, "out_features", None) or base_linear.nf
        self.num_out_heads = num_out_heads or width // head_dim
        if self.num_out_heads * head_dim != width:
            raise ValueError(f"projection of width {width} is not {self.num_out_heads} heads of {head_dim}")
        weight = base_linear.weight
        self.register_buffer(
            "head_mask",
            torch.ones(self.num_out_heads, dtype=weight.dtype, device=weight.device),
            persistent=False,
        )

    def set_mask(self, head_mask):
        """head_mask: (heads,) of 0 and 1."""
        self.head_mask.copy_(torch.as_tensor(head_mask))

    def set_all_zero(self):
        self.head_mask.zero_()

    def set_all_one(self):
        self.head_mask.fill_(1)

    def forward(self, hidden_states):
        y = self.base_linear(hidden_states)
        if bool((self.head_mask == 1).all()):
            return y
        heads = y.unflatten(-1, (self.num_out_heads, self.head_dim))
        return torch.where(self.head_mask[:, None] == 0, 0, heads * self.head_mask[:, None]).flatten(
            -2
        )  # where: inf * 0 is nan


def plain_mode(mode: str) -> str:
    """`v` for upstream's `v_only`, and so on; UserError for a mode that does not exist."""
    mode = mode.removesuffix("_only")
    if mode not in MODES:
        raise UserError(f"--mode {mode}: choose from {', '.join(MODES)}")
    return mode


def mask_attention_layer(model, layer_idx: int, mode: str = "v_only"):
    """Wrap the projections named in `mode` (q, k, v, qk, qv) of one layer; returns (enable_mask,
    disable_mask, restore).

    enable_mask zeroes them, disable_mask makes the layer bit-equal to the original, restore puts the modules
    back. Prefer `masked`, which restores also when something raises.
    """
    attention = child(decoder_layers(model)[layer_idx], ATTENTION)
    query_heads, kv_heads, head_dim = head_counts(model)
    mode = plain_mode(mode)
    parts = {"q": query_heads, "k": kv_heads, "v": kv_heads}
    if not set(mode) <= set(parts):
        raise ValueError(f"{mode}: mask_attention_layer masks q, k, v, qk or qv; use masked() for the rest")
    if fused := next((name for name in FUSED if hasattr(attention, name)), None):
        originals = {fused: getattr(attention, fused)}
        masks = {fused: torch.cat([torch.full((n,), float(part not in mode)) for part, n in parts.items()])}
    elif all(hasattr(attention, f"{part}_proj") for part in parts):
        originals = {f"{part}_proj": getattr(attention, f"{part}_proj") for part in mode}
        masks = {name: torch.tensor(0.0) for name in originals}  # every head
    else:
        raise UserError(
            f"{type(attention).__name__} mixes q, k and v in one projection; use --mode attention, head, mlp "
            "or layer"
        )
    wrappers = {
        name: ProjHeadMaskWrapper(module, head_dim).train(module.training)
        for name, module in originals.items()
    }
    for name, wrapper in wrappers.items():
        setattr(attention, name, wrapper)

    def enable_mask():
        for name, wrapper in wrappers.items():
            wrapper.set_mask(masks[name])

    def disable_mask():
        for wrapper in wrappers.values():
            wrapper.set_all_one()

    def restore():
        for name, module in originals.items():
            setattr(attention, name, module)

    return enable_mask, disable_mask, restore


@contextlib.contextmanager
def masked(model, layer_idx: int, mode: str = "v_only", head: int | None = None):
    """Inside the with block, layer `layer_idx` runs with `mode` switched off.

    It is whole again afterwards, also when the block raises. head: which query head, for mode "head".
    """
    mode = plain_mode(mode)
    layer = decoder_layers(model)[layer_idx]
    if set(mode) <= set("qkv"):
        enable, _, restore = mask_attention_layer(model, layer_idx, mode)
        enable()
    elif mode == "layer":
        restore = layer.register_forward_hook(lambda module, args, output: args[0]).remove
    elif mode == "head":
        query_heads, _, head_dim = head_counts(model)
        if head is None or not 0 <= head < query_heads:
            raise ValueError(f"head {head}: the model has query heads 0-{query_heads - 1}")
        keep = torch.arange(query_heads * head_dim) // head_dim != head

        def drop_head(module, args):
            return (args[0] * keep.to(args[0]), *args[1:])

        restore = child(child(layer, ATTENTION), OUTPUT).register_forward_pre_hook(drop_head).remove
    else:

        def nothing(module, args, output):
            if isinstance(output, tuple):
                return (torch.zeros_like(output[0]), *output[1:])
            return torch.zeros_like(output)

        branch = child(layer, ATTENTION if mode == "attention" else MLP)
        restore = branch.register_forward_hook(nothing).remove
    try:
        yield
    finally:
        restore()
