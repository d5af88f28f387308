"""The decoder layers of a causal language model: how they are written, found, and taken out in memory.

Works for every decoder of transformers that keeps its blocks in one ModuleList of
`config.num_hidden_layers` entries, also under a PEFT adapter and inside a model that sees pictures.
"""

import contextlib
import re

import torch
from torch import nn

from common.errors import UserError
from pruning.shorter import OTHER_LAYERS, check_sources, config_head_counts, shorter

ATTENTION = ("self_attn", "attn", "attention", "self_attention", "multi_head_attention")
# What mixes tokens: attention, and what stands in its place or beside it in hybrids.
MIXERS = (*ATTENTION, "cross_attn", "linear_attn", "mamba", "mixer", "temporal_block", "conv", "mlstm_layer")
# What tells a decoder layer from other numbered modules.
MARKS = (*MIXERS, "norm_attn_norm", "shared_transf", "shared_transformer", "mamba_decoder")
MLP = ("mlp", "mlp_block", "feed_forward", "ffn", "block_sparse_moe", "shared_mlp", "moe", "fc2", "experts")
DOWN = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "fc_out", "w2", "wo", "proj_2")
OUTPUT = ("o_proj", "out_proj", "dense", "c_proj", "wo", "resid_out")

# Tensors outside the layers with one part for each, along this axis (Gemma 3n and 4).
PER_LAYER = {"embed_tokens_per_layer.weight": 1, "per_layer_model_projection.weight": 0}
# Tensors outside the layers of which each belongs to one, and that layer's number less their own (Inkling 2).
OF_LAYER = {r"attn_res\.attn_queries\.(\d+)$": 1, r"attn_res\.mlp_queries\.(\d+)$": 0}


# ---------------------------------------- lists of layers in words


def parse_drop_layers(spec: str, option: str = "--drop-layers") -> list[int]:
    """Sorted unique layer numbers of a list such as "23-28" or "0-2, 5 7-9", with commas or blanks between.

    UserError, which names `option`, for anything else, such as a descending range.
    """
    layers = set()
    for part in re.split(r"[,\s]+", spec.strip()):
        if not part:
            continue
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise UserError(
                f"{option} {spec!r}: {part!r} is neither a layer number nor a range such as 23-28"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise UserError(f"{option} {spec!r}: the range {part} descends; write {last}-{first}")
        if last >= 100_000:  # a slip of the keyboard should not fill the memory
            raise UserError(f"{option} {spec!r}: no model has a layer {last}")
        layers.update(range(first, last + 1))
    return sorted(layers)


def spec_of(drop_layers) -> str:
    """The shortest --drop-layers text of a set: [1, 2, 3, 5] -> "1-3,5"."""
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in gaps(sorted(drop_layers)))


def gaps(drop: list[int]) -> list[tuple[int, int]]:
    """(first, last) of each stretch of neighbouring layers in an ascending list."""
    found = []
    for layer in drop:
        if found and layer == found[-1][1] + 1:
            found[-1] = (found[-1][0], layer)
        else:
            found.append((layer, layer))
    return found


def make_tag(drop_layers: list[int]) -> str:
    """Upstream's name of a drop set: drop23_28 when contiguous, drop0_2_5 otherwise, dropNone when empty."""
    if not drop_layers:
        return "dropNone"
    first, last = drop_layers[0], drop_layers[-1]
    contiguous = last - first + 1 == len(drop_layers)
    return "drop" + "_".join(map(str, (first, last) if contiguous else drop_layers))


def plain_tag(drop_layers: list[int]) -> str:
    """A name that only one set has: drop5to7 and drop5_7, which upstream both calls drop5_7."""
    return "drop" + spec_of(drop_layers).replace("-", "to").replace(",", "_")


def check_drop(drop_layers, count: int, option: str = "--drop-layers") -> list[int]:
    """Sorted unique ids; UserError for an id outside 0..count-1, or when no layer would be left."""
    drop = sorted(set(drop_layers))
    if drop and not 0 <= drop[0] <= drop[-1] < count:
        raise UserError(f"{option} {spec_of(drop)}: the model has layers 0-{count - 1}; correct the list")
    if len(drop) == count and option == "--drop-layers":
        raise UserError(f"--drop-layers names all {count} layers; keep at least one")
    return drop


# ---------------------------------------- finding them in a model


def plain(model):
    """The transformers model under a PEFT adapter, or the model itself; its LoRA layers stay in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def refuse_quantized(model, what: str):
    """UserError for a model whose matrices hold codes instead of values."""
    if getattr(plain(model).config, "quantization_config", None) is not None:
        raise UserError(f"{what}: this model is quantized, its matrices hold codes; give it unquantized")


def text_config(model):
    """The configuration of the decoder, which a multimodal model keeps inside its own."""
    return plain(model).config.get_text_config(decoder=True)


def decoder_paths(paths) -> list[str]:
    """Those of the paths of numbered layers that are a language model's: by its name, or by no tower's name;
    all of them where each has one (encoder.layer, of a BERT that is a decoder)."""
    named = [path for path in paths if re.search(r"(^|\.)(lang|language)_model\.", path)]
    return named or [path for path in paths if not OTHER_LAYERS.search(path)] or [*paths]


def find_layers(model) -> tuple[nn.Module, str]:
    """(holder, name) such that getattr(holder, name) is the ModuleList of decoder layers."""
    model = plain(model)
    count = getattr(text_config(model), "num_hidden_layers", None)
    lists = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and any(child(layer, MARKS) is not None for layer in module)
    ]
    if not lists or getattr(model.config, "is_encoder_decoder", False):
        raise UserError(
            f"{type(model).__name__}: found no list of {count} decoder layers as they are known here; only "
            "decoders can be pruned"
        )
    holder, _, name = min(decoder_paths(lists), key=lambda path: path.count(".")).rpartition(".")
    return model.get_submodule(holder), name


def decoder(model) -> nn.Module:
    """The module from token ids to final hidden states: the one around the layers that embeds tokens too."""
    model = plain(model)
    holder = find_layers(model)[0]
    around = [module for module in model.modules() if any(part is holder for part in module.modules())]
    embeds = [m for m in around if any(isinstance(part, nn.Embedding) for part in m.modules())]
    return embeds[-1]


def decoder_layers(model) -> nn.ModuleList:
    """The decoder layers of a causal language model; UserError where it has none."""
    holder, name = find_layers(model)
    return getattr(holder, name)


def child(module, names):
    """The first of `names` that `module` has, or None."""
    return next((getattr(module, name) for name in names if getattr(module, name, None) is not None), None)


def children(module, names) -> list:
    """All of `names` that `module` has: a mixture of experts may stand beside a shared MLP."""
    return [getattr(module, name) for name in names if getattr(module, name, None) is not None]


def head_counts(model) -> tuple[int, int, int]:
    """`config_head_counts` of a model's decoder."""
    return config_head_counts(text_config(model).to_dict())


def query_heads(model, layer: int) -> tuple[int, int]:
    """(query heads of one layer, the width that each has before the output projection).

    UserError where that layer has no attention with heads side by side.
    """
    output = child(child(decoder_layers(model)[layer], ATTENTION), OUTPUT)
    heads = getattr(text_config(model), "num_attention_heads", None)
    heads = heads[layer] if isinstance(heads, (list, tuple)) else heads
    width = input_width(output) if output is not None else 0
    if not isinstance(heads, int) or not width or width % heads:
        raise UserError(f"layer {layer} has no attention whose heads stand side by side before a projection")
    return heads, width // heads


def input_width(module) -> int:
    """Input features of a Linear, LoRA Linear or Conv1D."""
    return getattr(module, "in_features", None) or module.weight.shape[0]


def longest(model, args, option: str) -> int:
    """The tokens of --max-tokens and its like, for a model that may have a table of positions: a default
    gives way to its length, a number that was asked for is refused. Where positions go on without a table,
    windows beyond those of config.json are told."""
    asked, most = getattr(args, option), getattr(text_config(model), "max_position_embeddings", None)
    tables = [*model.named_parameters(), *model.named_buffers()]
    sizes = [len(table) for name, table in tables if table.dim() == 2 and re.search("wpe|pos(?!t)", name)]
    if most is None or asked <= most:
        return asked
    if not any(most <= size <= most + 2 for size in sizes):
        if option == "window":
            print(
                f"windows of {asked} are beyond the {most} positions of config.json; the perplexity includes "
                f"places that the model may not have learnt, compare with --window {most}"
            )
        return asked
    if option in args._given:
        name = option.replace("_", "-")
        raise UserError(f"--{name} {asked}: this model has positions for {most} tokens; give at most {most}")
    return most


# ---------------------------------------- taking some out in memory


def remove_layers(model, drop_layers):
    """Take layers out of `model` in place and return a function that puts them back.

    The kept layers are renumbered: the KV cache is addressed by `layer_idx`, and a gap there breaks
    generation without a word. Nothing is copied but Gemma's tables with a part for each layer.
    """
    holder, name = find_layers(model)
    config, layers = text_config(model), getattr(holder, name)
    drop = check_drop(drop_layers, len(layers))
    keep = [i for i in range(len(layers)) if i not in drop]

    # every change as (owner, field, value before, value after): the layers, and what the configuration says
    changes = [(holder, name, layers, nn.ModuleList(layers[i] for i in keep))]
    before = config.to_dict()
    check_sources(config, keep)
    after = shorter(before, keep, before, len(layers))
    changes += [(config, key, before.get(key), new) for key, new in after.items() if new != before.get(key)]

    # lists and tables of the decoder with a part for each layer
    for key, value in vars(holder).items():
        if isinstance(value, (list, tuple)) and len(value) == len(layers):
            changes.append((holder, key, value, type(value)(value[i] for i in keep)))
    for key, axis in PER_LAYER.items():
        table = getattr(holder, key.removesuffix(".weight"), None)
        if table is not None:
            part = parts_of(table.weight.detach(), axis, keep, len(layers))
            new = nn.Parameter(part, requires_grad=table.weight.requires_grad)
            changes.append((table, "weight", table.weight, new))

    # the numbers that layers know themselves by
    for new, old in enumerate(keep):
        for module in layers[old].modules():
            for field in ("layer_idx", "layer_id"):
                if isinstance(getattr(module, field, None), int):
                    changes.append((module, field, getattr(module, field), new))

    for owner, field, _, new in changes:
        set_field(owner, field, new)

    def restore():
        for owner, field, old, _ in changes:
            set_field(owner, field, old)

    return restore


def parts_of(tensor, axis: int, keep: list[int], layers: int):
    """The parts of the layers `keep` of a tensor with one part a layer, one after the other along `axis`."""
    parts = tensor.unflatten(axis, (layers, -1)).index_select(axis, torch.tensor(keep, device=tensor.device))
    return parts.flatten(axis, axis + 1)


def set_field(owner, field: str, value):
    """Set one field of a module or configuration, also where a class compares fields with each other."""
    try:
        setattr(owner, field, value)
    except Exception:
        object.__setattr__(owner, field, value)


@contextlib.contextmanager
def without_layers(model, drop_layers):
    """`remove_layers` for the length of a with block, also when the block raises."""
    restore = remove_layers(model, drop_layers)
    try:
        yield model
    finally:
        restore()
