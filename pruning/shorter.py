"""A configuration for fewer layers: every field that counts, lists or numbers layers follows the kept ones.

    shorter_config(config, keep)        the dictionary of a config.json, plain or multimodal

A decoder's configuration numbers its layers in many ways: lists with one entry a layer, lists of layer
numbers (some count from 1), "the first k", "the last k", periods, dictionaries by number, names of modules
that a quantization leaves alone. What a class derives and its file leaves out (a default period of layer
types, say) is written down, because the derived value would be another one for the new numbers. read_back.py
then compares the layers that come out with those that went in: an unknown field is refused there.
"""

import json
import math
import re
import tempfile
from pathlib import Path

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from common.errors import UserError
from common.files import first_line

# Under which names a configuration holds a number that most call by the first of them; a class that
# transformers knows says its own too.
NAMES = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "hidden_size": ("n_embd", "d_model"),
}
# Where a configuration counts the experts of a mixture, and those that a token is sent to.
EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts", "moe_top_k")
# Where a multimodal configuration keeps its decoder's own.
NESTED = ("text_config", "llm_config", "language_config", "thinker_config", "language_model_config")
NESTED += ("vlm_config",)  # of what embeds pages (ColPali)
INDEX_LIST = re.compile(
    r"(^|_)(only_layers|layer_ids|layer_indices|layer_idxs|layers_idx|attn_idxs|moe_layers|kda_layers"
    r"|full_attn_layers|cross_attention_layers|rope_scaling_layers|global_layers|local_layers)$"
)
ONE_BASED = ("kda_layers", "full_attn_layers", "ple_layer_ids")
NO_LAYERS = re.compile("token|architectures|label|language|vision|audio|image|dtype")
FIRST = (
    "first_k_dense_replace",
    "max_window_layers",
    "num_dense_layers",
    "dense_mlp_idx",
    "moe_layer_start_index",
    "num_first_full_attention_layers",
)
LAST = ("num_kv_shared_layers", "num_last_full_attention_layers")
PREDICTION = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
PERIODS = {"attn_layer_period": "attn_layer_offset", "expert_layer_period": "expert_layer_offset"}
# A module's layer number, or what a regular expression has in its place: [23], (2|3), \d+ or [0-9]{1,2}.
# A name that ends with a number and a star is one of ModelOpt's: all of that layer. GPTQModel's expressions
# have .*\. alone before the number.
LAYER_NAME = re.compile(
    r"((?:(?:layers|layer|\bh|blocks)\\?|\.\*\\)\.)"
    r"(\d+(?=\*$)|(?:\d|\\d|\[[^\]]+\]|\((?:[^()]|\([^()]*\))*\)|\{[\d,]+\}|[+*?])+(?=\\?\.|$))"
)
# Before a number, what says that it is no decoder layer's: those of an encoder of pictures, say.
OTHER_LAYERS = re.compile(r"vision|visual|audio|image|perceiver|encoder|\bmtp")
# Granite 4 Vision's, outside the decoder's own part: layers, and pairs of an encoder's and a decoder's.
PICTURES = ("spatial_target_layers", "deepstack_layer_map")
QUANTIZATION = ("quantization_config", "compression_config")
# Files beside config.json in which quantizers say the same again.
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


def keys_of(config: dict, name: str) -> tuple:
    """All keys under which a configuration may hold the number that most models call `name`."""
    kind = config.get("model_type")
    own = CONFIG_MAPPING[kind].attribute_map.get(name, name) if kind in CONFIG_MAPPING else name
    return name, *NAMES[name], own


def config_key(config: dict, name: str) -> str:
    """The key under which a configuration holds the number that most models call `name`."""
    return next((key for key in keys_of(config, name) if config.get(key) is not None), name)


def text_part(config: dict) -> dict:
    """The decoder's own part of a config.json, which may be all of it."""
    for name in NESTED:
        if isinstance(config.get(name), dict):
            return text_part(config[name])
    return config


def unquantized(config: dict) -> dict:
    """A config.json without what it says of a quantization, for all or in the decoder's own part."""
    return {
        name: unquantized(value) if name in NESTED and isinstance(value, dict) else value
        for name, value in config.items()
        if name not in QUANTIZATION or value is None
    }


def config_object(config: dict, strict: bool = False):
    """The configuration of transformers that a config.json stands for, read as from_pretrained reads it.

    None where transformers knows no such model, or (strict: UserError) where its class refuses the fields.
    """
    if config.get("model_type") not in CONFIG_MAPPING:
        return None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config, default=str))
        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            if strict:
                raise UserError(f"config.json: its class refuses it: {first_line(error)}") from error
            return None


def layer_count(config: dict) -> int | None:
    """How many decoder layers a config.json counts, None where it does not say."""
    whole, text = config_object(config), text_part(config)
    count = text.get(config_key(text, "num_hidden_layers"))
    if count is None and whole is not None:
        count = getattr(whole.get_text_config(decoder=True), "num_hidden_layers", None)
    if count is not None and not isinstance(count, int):
        raise UserError(f"config.json: num_hidden_layers is {count!r}, expected a whole number")
    return count


def prediction_layers(config: dict) -> int:
    """Layers for the prediction of further tokens, which stand behind the last decoder layer."""
    text = text_part(config)
    return next((text[name] for name in PREDICTION if isinstance(text.get(name), int)), 0)


def config_head_counts(config: dict) -> tuple[int, int, int]:
    """(query heads, key-value heads, width of a head). UserError if the config does not say them."""
    text = text_part(config)
    heads, hidden = (text.get(config_key(text, name)) for name in ("num_attention_heads", "hidden_size"))
    if not isinstance(heads, int) or not hidden:
        raise UserError(
            "config.json has no num_attention_heads or no hidden_size; only decoders can be pruned"
        )
    kv_heads = text.get("num_key_value_heads") or text.get("num_kv_heads")
    if text.get("multi_query") and not text.get("new_decoder_architecture"):
        kv_heads = 1
    return heads, kv_heads if isinstance(kv_heads, int) else heads, text.get("head_dim") or hidden // heads


def shorter_config(config: dict, keep: list[int]) -> dict:
    """A config dictionary for the decoder layers `keep` (old numbers, ascending). UserError where it cannot
    say what these layers are."""
    whole = config_object(config)
    if whole is not None:
        check_sources(whole.get_text_config(decoder=True), keep)
    derived = {} if whole is None else whole.get_text_config(decoder=True).to_dict()
    count = layer_count(config)
    pictures = picture_layers({**config, **(whole.to_dict() if whole else {})}, keep, count)
    return {**shorter(config, keep, derived, count), **pictures}


def shorter(config: dict, keep, derived: dict, count: int) -> dict:
    """`shorter_config` of a dictionary and of the nested one that holds the decoder's fields.

    derived: what its class makes of these. count: layers before.
    """
    nested = next((name for name in NESTED if isinstance(config.get(name), dict)), None)
    ahead = prediction_layers(config)
    names = {
        key: quantized_names(config[key], keep, count, ahead)
        for key in QUANTIZATION
        if isinstance(config.get(key), dict)
    }
    if nested:
        inner = shorter(config[nested], keep, derived, count)
        total = config_key(config, "num_hidden_layers")  # some repeat the number outside
        outer = {total: len(keep)} if total in config else {}
        return {**config, **names, **outer, nested: inner}
    fields = {
        **needed(derived, count),
        **{k: v for k, v in config.items() if v is not None or k not in derived},
    }
    fixed = fixed_lengths(config)
    new = {name: renumbered(name, value, keep, count, ahead, fixed) for name, value in fields.items()}
    new |= periods(fields, keep, count)
    for name in keys_of(config, "num_hidden_layers"):
        if fields.get(name) == count and (name in config or name in derived):
            new[name] = len(keep)
    written = {name: value for name, value in new.items() if name in config or value != derived.get(name)}
    return {**config, **written, **names}


def fixed_lengths(config: dict) -> dict:
    """{list: its length} of those that a class has by default with another number of layers: as long as that,
    they say nothing of layers (two ends of a time step, multipliers of the five parts of a Mamba)."""
    try:
        default = CONFIG_MAPPING[config["model_type"]]().to_dict()
    except Exception:  # a class that is not known, or has no default
        return {}
    layers = default.get(config_key(default, "num_hidden_layers"))
    lists = {name: value for name, value in default.items() if isinstance(value, (list, tuple))}
    return {name: len(value) for name, value in lists.items() if len(value) != layers}


def needed(derived: dict, count: int) -> dict:
    """The fields that number layers among those that a class derives or takes as defaults."""
    return {
        name: value
        for name, value in derived.items()
        if name in (*FIRST, *LAST, *PERIODS, *PERIODS.values(), "decoder_sparse_step", "scale_depth")
        or name.startswith("moe_layer_")
        or name == "block_types"
        or INDEX_LIST.search(name)
        or isinstance(value, (list, dict))
        and not NO_LAYERS.search(name)
        and ("layer" in name or len(value) == count)
    }


def renumbered(name: str, value, keep, count: int, extra: int = 0, fixed=None):
    """The value of one field after all layers but `keep` are gone; the same value where it numbers none.

    extra: layers behind the last, which predict further tokens. fixed: `fixed_lengths`.
    """
    new_of = {old: new for new, old in enumerate([*keep, *range(count, count + extra)])}
    if NO_LAYERS.search(name) or value is None or isinstance(value, bool):
        return value
    if name == "block_types" and isinstance(value, (list, tuple)):  # Griffin's: repeated up to the last layer
        return [value[i % len(value)] for i in keep]
    if name == "kv_source_layers":
        return [new_of[value[old]] for old in keep]
    if name == "scale_depth":  # of a residual: scale_depth / sqrt(layers)
        return value * math.sqrt(len(keep) / count)
    if name in FIRST and isinstance(value, int):
        return sum(old < value for old in keep)
    if name in LAST and isinstance(value, int):
        return sum(old >= count - value for old in keep)
    if isinstance(value, (list, tuple)):
        base = int(name in ONE_BASED)
        if lists_numbers(name, value, count):
            return [new_of[i - base] + base for i in value if i - base in new_of]
        # some lists go on behind the last layer: for layers that predict further tokens, or for nothing
        long = len(value) in (count, count + extra) and len(value) != (fixed or {}).get(name)
        if long or "layer" in name and len(value) >= count:
            return [value[i] for i in keep] + list(value[count:])
    if isinstance(value, str) and "pattern" in name and len(value) == count:
        return "".join(value[i] for i in keep)
    if isinstance(value, str) and "layers" in name and re.fullmatch(r"[\d, ]+", value):  # Step's: "3,4,5"
        return ",".join(str(new_of[i]) for i in map(int, re.findall(r"\d+", value)) if i in new_of)
    if isinstance(value, dict):
        numbers = [key for key in value if str(key).isdigit()]
        if numbers and ("layer" in name or len(numbers) == count):
            moved = {new_of[int(key)]: value[key] for key in numbers if int(key) in new_of}
            words = {key: part for key, part in value.items() if key not in numbers}
            return {**words, **{type(numbers[0])(key): part for key, part in moved.items()}}
        if re.search("attn|attention|moe|mamba|ssm|linear", name):
            return {key: renumbered(key, part, keep, count, extra) for key, part in value.items()}
    return value


def lists_numbers(name: str, value, count: int) -> bool:
    """Whether a list holds numbers of layers: by its name, or because it can hardly be anything else."""
    if INDEX_LIST.search(name):
        return not (len(value) == count > 2 and set(value) <= {0, 1})
    plain = all(type(i) is int and i < count for i in value) and [*value] == sorted(set(value))
    return plain and "layer" in name and 0 < len(value) < count


def periods(fields: dict, keep, count: int) -> dict:
    """The fields of a pattern that repeats, for the kept layers: an explicit list where the class has one."""
    new = {}
    step = fields.get("decoder_sparse_step")
    if isinstance(step, int) and step > 1:  # Qwen's mixtures: every step-th layer, less a list
        dense = set(fields.get("mlp_only_layers") or [])
        dense |= {i for i in range(count) if (i + 1) % step}
        new |= {"decoder_sparse_step": 1}
        new["mlp_only_layers"] = [i for i, old in enumerate(keep) if old in dense]
    n = len(keep)
    for period, offset in PERIODS.items():
        if isinstance(fields.get(period), int) and isinstance(fields.get(offset), int):
            wanted = [old % fields[period] == fields[offset] for old in keep]
            every = ((p, o) for p in range(1, n + 2) for o in range(p))
            new |= fitted((period, offset), every, wanted, lambda i, p, o: i % p == o)
    interval = fields.get("moe_layer_interval")
    if isinstance(interval, int):  # ERNIE's: every interval-th layer of a stretch
        start, end = fields.get("moe_layer_start_index", 0), fields.get("moe_layer_end_index", -1)
        end = count - 1 if end in (-1, None) else end
        wanted = [(old + 1) % interval == 0 and start <= old <= end for old in keep]
        marked = [i for i, yes in enumerate(wanted) if yes] or [n]
        every = ((step, marked[0], marked[-1]) for step in range(1, n + 1))
        names = ("moe_layer_interval", "moe_layer_start_index", "moe_layer_end_index")
        new |= fitted(names, every, wanted, lambda i, step, a, b: (i + 1) % step == 0 and a <= i <= b)
    if isinstance(fields.get("attention_types"), list) and isinstance(fields.get("attention_layers"), list):
        new["attention_types"] = [[[fields["attention_layers"][old]], 1] for old in keep]  # GPT-Neo's
    return new


def fitted(names, every, wanted: list[bool], rule) -> dict:
    """The first values among `every` for which rule(layer, *values) marks the layers `wanted`, by name;
    UserError where there are none."""
    for values in every:
        if [rule(i, *values) for i in range(len(wanted))] == wanted:
            return dict(zip(names, values))
    marked = [i for i, yes in enumerate(wanted) if yes]
    raise UserError(
        f"config.json: the kept layers would need {' and '.join(names)} for the new numbers {marked} of "
        f"{len(wanted)}, which no values give; choose --drop-layers that keep the rhythm of the model"
    )


def quantized_names(value, keep, count: int, ahead: int = 0):
    """A quantization's settings with the numbers of layers inside module names replaced.

    Names of dropped layers vanish; a regular expression that chooses between numbers gets the new ones.
    ahead: layers behind the `count` of the decoder, which predict further tokens and stay.
    """
    if isinstance(value, str):
        names = value.split(",") if re.fullmatch(r"[\w., -]+", value) else [value]  # AutoRound joins names
        moved = (moved_name(name, [*keep, *range(count, count + ahead)], count + ahead) for name in names)
        return ",".join(kept) if (kept := [name for name in moved if name is not None]) else None
    if isinstance(value, list):
        moved = (quantized_names(part, keep, count, ahead) for part in value)
        return [new for new in moved if new is not None]
    if isinstance(value, dict):
        moved = (tuple(quantized_names(part, keep, count, ahead) for part in pair) for pair in value.items())
        return {key: part for key, part in moved if key is not None}
    return value


def moved_name(name: str, keep, count: int) -> str | None:
    """A module's name, or a regular expression of names, for the new layer numbers; None where all are
    gone. Where an expression chooses between names, one that is gone matches nothing."""
    ends, gone = [0], []

    def moved(found):
        before, first = name[ends[-1] : found.start()], len(ends) == 1
        ends.append(found.end())
        own = (first or "|" in before) and re.search(r"\d", found[2])
        if not own or OTHER_LAYERS.search(before.rpartition("|")[2]):
            return found[0]
        try:
            tries = [re.match(rf"(?:{found[2]})(?=\.)", f"{old}.") for old in range(count)]  # (?!3\.)\d+ too
        except re.error:
            return found[0]
        meant = [old for old, match in enumerate(tries) if match and match.end() == len(str(old))]
        if len(meant) == count > 1:
            return found[0]
        new = [str(i) for i, old in enumerate(keep) if old in meant]
        gone.append(not new)
        return found[1] + (new[0] if len(new) == 1 else f"({'|'.join(new)})" if new else "(?!)")

    new = LAYER_NAME.sub(moved, name)
    return None if any(gone) and "|" not in LAYER_NAME.sub("", name) else new


def check_sources(config, keep):
    """UserError where a kept layer works with what a dropped one computed.

    config: of the decoder, before pruning.
    """
    kept = set(keep)
    kinds = getattr(config, "layer_types", None) or []
    attending = [i for i, kind in enumerate(kinds) if "attention" in str(kind) and "linear" not in str(kind)]
    if attending and not kept & {*attending}:
        raise UserError(
            f"attention stands in layer {', '.join(map(str, attending))} alone; keep at least one of these"
        )
    if getattr(config, "num_mem_blocks", None):
        raise UserError("the layers share blocks that are told apart by layer numbers; they cannot be pruned")
    keys, needs = "works with the keys and values of layer {}", []
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    own = max(len(kinds) - shared, 0)  # the layers behind these work with the last own keys of their kind
    for user in range(own, len(kinds)):
        needs.append((user, max((i for i in range(own) if kinds[i] == kinds[user]), default=user), keys))
    needs += [(user, i, keys) for user, i in enumerate(getattr(config, "kv_source_layers", None) or [])]
    chosen, source = "attends to the tokens that the indexer of layer {} chose", None
    for user, kind in enumerate(getattr(config, "indexer_types", None) or []):
        source = user if kind == "full" else source
        needs.append((user, source if kind == "shared" else user, chosen))
    for user, source, how in needs:
        if user in kept and source not in kept:
            raise UserError(f"layer {user} {how.format(source)}; drop both or keep layer {source}")


def picture_layers(config: dict, keep, count: int) -> dict:
    """The fields that say which layers features of pictures are added to, for the kept ones. UserError where
    one of these is to go."""
    vision = config.get("vision_config") or {}
    stacked = vision.get("deepstack_visual_indexes") if isinstance(vision, dict) else None
    places = {"deepstack_visual_indexes": list(range(len(stacked or [])))}  # behind the first so many
    places |= {name: config[name] for name in PICTURES if isinstance(config.get(name), (list, tuple))}
    new_of = {old: new for new, old in enumerate(keep)}
    for name, some in places.items():
        layers = [place[1] if isinstance(place, (list, tuple)) else place for place in some]
        if gone := [layer for layer in layers if layer < count and layer not in new_of]:
            raise UserError(
                f"layer {gone[0]}: features of pictures are added to layers "
                f"{', '.join(map(str, sorted(layers)))} ({name}); keep these"
            )
        places[name] = [
            [place[0], new_of.get(layer, layer)] if layer != place else new_of.get(layer, layer)
            for place, layer in zip(some, layers)
        ]
    return {name: places[name] for name in PICTURES if name in places}


def shorter_generation(config: dict, keep: list[int]) -> dict:
    """A generation_config.json for the layers `keep`: early exits count layers, DoLa lists states before."""
    new, new_of = dict(config), {old: new for new, old in enumerate(keep)}
    if isinstance(early := config.get("assistant_early_exit"), int):
        new["assistant_early_exit"] = sum(old < early for old in keep)
    if isinstance(states := config.get("dola_layers"), list):
        new["dola_layers"] = [0 if i == 0 else new_of[i - 1] + 1 for i in states if i == 0 or i - 1 in new_of]
    return {name: value for name, value in new.items() if value not in (0, []) or value == config[name]}
