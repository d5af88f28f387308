"""The decoder layers of a causal language model of transformers: finding them, and taking some out in memory.

Works for Llama, Pangu, Qwen, Mistral, Mixtral, Gemma, Phi, GPT-2, GPT-NeoX, OPT and whatever else keeps its
blocks in one ModuleList of `config.num_hidden_layers` entries, also under a PEFT adapter.
"""

import contextlib
import sys
from pathlib import Path

from torch import nn

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.errors import UserError

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2")
OUTPUT = ("o_proj", "out_proj", "dense", "c_proj", "wo")
# As GPT-2 calls them.
CONFIG_NAMES = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "hidden_size": "n_embd"}


def plain(model):
    """The transformers model under a PEFT adapter, or the model itself; its LoRA layers stay in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_layers(model) -> tuple[nn.Module, str]:
    """(holder, name) such that getattr(holder, name) is the ModuleList of decoder layers."""
    model = plain(model)
    count = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and child(module[0], ATTENTION) is not None
        ):
            holder, _, name = path.rpartition(".")
            return model.get_submodule(holder), name
    raise UserError(
        f"{type(model).__name__}: no list of {count} decoder layers with attention found; only decoders "
        f"can be pruned"
    )


def decoder_layers(model) -> nn.ModuleList:
    """The decoder layers of a causal language model; UserError where it has none."""
    holder, name = find_layers(model)
    return getattr(holder, name)


def child(module, names):
    """The first of `names` that `module` has, or None."""
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def config_key(config: dict, name: str) -> str:
    """The key under which a config.json holds the number that most models call `name`."""
    return name if name in config else CONFIG_NAMES[name] if CONFIG_NAMES[name] in config else name


def config_head_counts(config: dict) -> tuple[int, int, int]:
    """(query heads, key-value heads, width of a head). UserError if the config does not say them."""
    heads, hidden = (config.get(config_key(config, name)) for name in ("num_attention_heads", "hidden_size"))
    if not heads or not hidden:
        raise UserError(
            "config.json has no num_attention_heads or no hidden_size; only decoders can be pruned"
        )
    return heads, config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads


def head_counts(model) -> tuple[int, int, int]:
    """`config_head_counts` of a model: attention modules no longer carry them."""
    return config_head_counts(plain(model).config.get_text_config().to_dict())


def check_drop(drop_layers, count: int) -> list[int]:
    """Sorted unique ids; UserError for an id outside 0..count-1, or when no layer would be left."""
    drop = sorted(set(drop_layers))
    if drop and not 0 <= drop[0] <= drop[-1] < count:
        raise UserError(f"--drop-layers {drop}: the model has layers 0-{count - 1}; correct the list")
    if len(drop) == count:
        raise UserError(f"--drop-layers names all {count} layers; keep at least one")
    return drop


def shorter_config(config: dict, keep: list[int]) -> dict:
    """A config dictionary for the layers `keep`: their count, and every list with one entry per layer."""
    name = config_key(config, "num_hidden_layers")
    count = config.get(name)
    per_layer = {
        k: [v[i] for i in keep]
        for k, v in config.items()
        if isinstance(v, list) and len(v) == count and "layer" in k
    }
    return {**config, **per_layer, name: len(keep)}


def remove_layers(model, drop_layers):
    """Take layers out of `model` in place and return a function that puts them back.

    The kept layers are renumbered: the KV cache is addressed by `layer_idx`, and a gap there breaks
    generation without a word. Nothing is copied.
    """
    holder, name = find_layers(model)
    config, layers = plain(model).config.get_text_config(), getattr(holder, name)
    drop = check_drop(drop_layers, len(layers))
    keep = [i for i in range(len(layers)) if i not in drop]
    before = config.to_dict()
    after = shorter_config(before, keep)
    changed = [k for k in after if after[k] != before[k]]
    numbered = [
        (module, module.layer_idx, new)
        for new, old in enumerate(keep)
        for module in layers[old].modules()
        if getattr(module, "layer_idx", None) is not None
    ]

    setattr(holder, name, nn.ModuleList(layers[i] for i in keep))
    for key in changed:
        setattr(config, key, after[key])
    for module, _, new in numbered:
        module.layer_idx = new

    def restore():
        setattr(holder, name, layers)
        for key in changed:
            setattr(config, key, before[key])
        for module, old, _ in numbered:
            module.layer_idx = old

    return restore


@contextlib.contextmanager
def without_layers(model, drop_layers):
    """`remove_layers` for the length of a with block, also when the block raises."""
    restore = remove_layers(model, drop_layers)
    try:
        yield model
    finally:
        restore()
