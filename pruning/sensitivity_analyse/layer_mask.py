"""Switching off a part of one decoder layer, without changing a weight (upstream:
sensitivity-analyse/layer_mask.py).

mode        what is zero                              effect
q, k, qk    output of the projection(s), after bias   all scores equal: every position averages its past
                                                      (q, k and qk agree)
v, qv       output of v (and q), after bias           attention returns o_proj(0), the o bias (v and qv agree:
                                                      with V = 0 the weights do not matter)
head        one query head before o_proj
attention   the attention branch, o bias included; in a hybrid, whatever mixes tokens there
mlp         the MLP branch: experts and shared MLP too
layer       both branches: the layer returns its input

Upstream's names v_only, q_only and k_only are accepted. A layer that has no such part, as some layers of a
hybrid, has no such mode (`why_not`).
"""

import contextlib
import inspect
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
from torch import nn

from common.errors import UserError
from pruning.layers import (
    ATTENTION,
    MIXERS,
    MLP,
    OUTPUT,
    child,
    children,
    decoder_layers,
    query_heads,
    text_config,
)

MODES = ("q", "k", "v", "qk", "qv", "head", "attention", "mlp", "layer")
FUSED = ("qkv_proj", "c_attn")  # one projection whose output may be q, k, v one after the other


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
        width = output_width(base_linear)
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
        heads, mask = y.unflatten(-1, (self.num_out_heads, self.head_dim)), self.head_mask[:, None]
        return torch.where(mask == 0, 0, heads * mask).flatten(-2)  # where: inf * 0 is nan


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
    mode = plain_mode(mode)
    if not set(mode) <= set("qkv"):
        raise ValueError(f"{mode}: mask_attention_layer masks q, k, v, qk or qv; use masked() for the rest")
    if why := why_not(model, layer_idx, mode):
        raise UserError(why)
    if fused := fused_heads(model, layer_idx):
        # one mask entry for each head of q, k and v, one after the other
        name, width = fused["name"], fused["width"]
        originals = {name: getattr(attention, name)}
        masks = {name: torch.cat([torch.full((fused[part],), float(part not in mode)) for part in "qkv"])}
        wrappers = {name: ProjHeadMaskWrapper(originals[name], width)}
    else:
        # every head of a projection of its own
        originals = {f"{part}_proj": getattr(attention, f"{part}_proj") for part in mode}
        masks = {name: torch.tensor(0.0) for name in originals}
        wrappers = {name: ProjHeadMaskWrapper(m, output_width(m)) for name, m in originals.items()}
    for name, wrapper in wrappers.items():
        wrapper.train(originals[name].training)
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


def output_width(module) -> int | None:
    """Output features of a Linear, LoRA Linear or Conv1D; None for any other module."""
    return getattr(module, "out_features", None) or getattr(module, "nf", None)


def why_not(model, layer_idx: int, mode: str) -> str:
    """Why `mode` cannot be switched off in one layer, an empty text where it can."""
    layer = decoder_layers(model)[layer_idx]
    attention, lacks = child(layer, ATTENTION), f"layer {layer_idx}, a {type(layer).__name__}, has no "
    if mode == "layer":
        return ""
    if mode == "attention":
        return "" if mixers(layer) else lacks + "branch of its own that mixes tokens"
    if mode == "mlp":
        return "" if mlps(layer) else lacks + "MLP branch of its own"
    if attention is None:
        return lacks + "attention"
    if mode == "head":
        try:
            query_heads(model, layer_idx)
        except UserError as error:
            return str(error)
        return ""
    own = all(output_width(getattr(attention, f"{part}_proj", None)) for part in "qkv")
    if own or fused_heads(model, layer_idx):
        return ""
    return (
        f"layer {layer_idx}: {type(attention).__name__} has no projections of its own for q, k and v; use "
        "--mode attention, mlp or layer"
    )


def fused_heads(model, layer_idx: int) -> dict:
    """{"name": the one projection whose output is q, k and v one after the other, "q", "k", "v": heads of
    each, "width": of a head} of a layer; empty where it has none."""
    attention = child(decoder_layers(model)[layer_idx], ATTENTION)
    name = next((part for part in FUSED if hasattr(attention, part)), None)
    alternating = getattr(text_config(model), "multi_query", None) is False  # GPT-BigCode's other form
    plain = name is not None and output_width(getattr(attention, name))
    if not plain or alternating or child(attention, ("o_proj", "c_proj")) is None:
        return {}
    heads, width = query_heads(model, layer_idx)
    rest = output_width(getattr(attention, name)) - heads * width
    kv_heads = rest // (2 * width)
    if kv_heads < 1 or rest != 2 * kv_heads * width or heads % kv_heads:
        return {}
    return {"name": name, "q": heads, "k": kv_heads, "v": kv_heads, "width": width}


def mixers(layer) -> list:
    """The branches of a layer that mix tokens."""
    return [addend(part) for part in children(layer, MIXERS) if part not in mlps(layer)]


def mlps(layer) -> list:
    """The branches of a layer that work on each token alone; a `mixer` in Nemotron-H, no module in BERT."""
    mixer, own = getattr(layer, "mixer", None), addend(layer)
    alone = any(word in type(mixer).__name__ for word in ("MLP", "MoE"))
    return children(layer, MLP) + [mixer] * alone + [own] * (own is not layer)


def addend(branch):
    """What a branch adds to the state: its last projection, where it adds its input itself (BERT's)."""
    return getattr(getattr(branch, "output", None), "dense", branch)


def zeros(module, args, kwargs, output):
    """A forward hook that returns what a branch returns if it adds nothing: zeros, or the residual that it
    was given to add itself to (Bloom, MPT)."""
    states = states_of(output)
    residual = given(module, "residual", args, kwargs)
    return as_output(output, torch.zeros_like(states) if residual is None else residual)


def given(module, name: str, args, kwargs):
    """What `module` was called with under a parameter's name; None where there is no such."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    if name not in names or names.index(name) >= len(args):
        return kwargs.get(name)
    return args[names.index(name)]


def states_of(output):
    """The hidden states in a layer's output, which may be a tuple or a list (the first GPT)."""
    return output[0] if isinstance(output, (tuple, list)) else output


def as_output(output, hidden_states):
    """`hidden_states` in the form of a layer's output."""
    if not isinstance(output, (tuple, list)):
        return hidden_states
    make = getattr(output, "_make", type(output))  # of a tuple with names
    return make((hidden_states, *output[1:]))


def layer_input(args, kwargs):
    """The hidden states that a layer was called with."""
    return args[0] if args else kwargs["hidden_states"]


@contextlib.contextmanager
def masked(model, layer_idx: int, mode: str = "v_only", head: int | None = None):
    """Inside the with block, layer `layer_idx` runs with `mode` switched off.

    It is whole again afterwards, also when the block raises. head: which query head, for mode "head".
    """
    mode = plain_mode(mode)
    layer = decoder_layers(model)[layer_idx]
    if why := why_not(model, layer_idx, mode):
        raise UserError(why)
    if set(mode) <= set("qkv"):
        enable, _, restore = mask_attention_layer(model, layer_idx, mode)
        enable()
        restores = [restore]
    elif mode == "layer":

        def skip(module, args, kwargs, output):
            return as_output(output, layer_input(args, kwargs))

        restores = [layer.register_forward_hook(skip, with_kwargs=True).remove]
    elif mode == "head":
        heads, head_dim = query_heads(model, layer_idx)
        if head is None or not 0 <= head < heads:
            raise ValueError(f"head {head}: the layer has query heads 0-{heads - 1}")
        keep = torch.arange(heads * head_dim) // head_dim != head

        def drop_head(module, args):
            return (args[0] * keep.to(args[0]), *args[1:])

        restores = [child(child(layer, ATTENTION), OUTPUT).register_forward_pre_hook(drop_head).remove]
    else:
        branches = mixers(layer) if mode == "attention" else mlps(layer)
        restores = [branch.register_forward_hook(zeros, with_kwargs=True).remove for branch in branches]
    try:
        yield
    finally:
        for restore in restores:
            restore()
