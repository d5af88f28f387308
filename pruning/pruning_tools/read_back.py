"""Reads a written folder back before a tool says that it is done, without its values.

check_layers(before, after, keep)     the classes of both configurations are built: each kept layer must be,
                                      by its modules, shapes and settings, the layer that it was
check_folder(folder)                  from_pretrained on the meta device: no tensor may be missing, left
                                      over or of another shape, but for what the source lacked or brought
                                      already: codes and scales of a quantization
"""

import contextlib
import math
import re

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from common.errors import UserError
from common.files import first_line, read_json
from pruning.layers import find_layers
from pruning.shorter import config_object, unquantized

# Auto classes of transformers that a decoder may be in, the first where it is in none.
KINDS = ("CausalLM", "ImageTextToText", "SpeechSeq2Seq")
STRANGER = "has no place in it"  # of a tensor that the class does not know
# What tells layers apart, and nothing more.
NUMBER = re.compile(r"^((layer|block)_?(idx|id|index|number|num)|num_hidden_layers)$")


def model_class(config: dict):
    """The class that config.json names, or else the general one that takes its configuration."""
    for name in config.get("architectures") or []:
        if isinstance(getattr(transformers, name, None), type):
            return getattr(transformers, name)
    return general_class(config)


def general_class(config: dict):
    """The auto class that takes a configuration: of language models, or of those that also see or hear."""
    kinds = [getattr(transformers, f"AutoModelFor{kind}") for kind in KINDS]
    known = type(config_object(config))
    return next((kind for kind in kinds if known in kind._model_mapping), kinds[0])


def build(config: dict):
    """The model of a config.json, its weights on the meta device and its buffers real; None where
    transformers does not know the model, UserError where the configuration contradicts itself."""
    known = config_object(unquantized(config), strict=True)
    if known is None:
        return None
    kind = model_class(config)
    with init_empty_weights(include_buffers=False), quiet():
        return kind._from_config(known) if hasattr(kind, "_from_config") else kind.from_config(known)


@contextlib.contextmanager
def quiet():
    """Without the warnings of transformers: it names at length what is compared here anyway."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def settings(layer: nn.Module) -> dict:
    """What a layer is, but for values and number: {name: class, shape, buffer, or plain attribute}."""
    found = {}
    for path, module in layer.named_modules():
        dot = f"{path}." if path else ""
        found[path or "class"] = type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            found[dot + name] = tuple(parameter.shape)
        for name, buffer in module.named_buffers(recurse=False):
            # a buffer that the file holds is read from there
            stored = name not in module._non_persistent_buffers_set
            found[dot + name] = tuple(buffer.shape) if stored else buffer
        for name, value in vars(module).items():
            if not name.startswith("_") and name != "training" and not NUMBER.match(name) and simple(value):
                found[dot + name] = value
    return found


def simple(value) -> bool:
    """Whether an attribute is a number, a word, or a list of such."""
    if isinstance(value, (list, tuple)):
        return all(simple(part) for part in value)
    return value is None or isinstance(value, (bool, int, float, str))


def differs(name: str, before, after, keep: list[int], count: int) -> bool:
    """Whether one setting of a layer is another one.

    A list with one entry for each of all layers follows `keep`; a layer that stores more is the same.
    """
    if torch.is_tensor(before) and torch.is_tensor(after):
        return before.shape != after.shape or not torch.equal(before.nan_to_num(), after.nan_to_num())
    if name.endswith("store_full_length_kv"):
        return before and not after
    if isinstance(before, float) and isinstance(after, float):
        return not math.isclose(before, after, rel_tol=1e-6)
    if isinstance(before, list) and len(before) == count and before != after:
        before = [before[i] for i in keep]
    return type(before) is not type(after) or before != after


def check_layers(before: dict, after: dict, keep: list[int]) -> bool:
    """Compare the layers of two config.json; UserError unless each new layer i is the old layer keep[i].

    Returns whether it could be looked at: transformers knows the model.
    """
    built, which = [], "config.json"
    for config in (before, after):
        try:
            built.append(build(config))
        except Exception as error:
            why = first_line(error.__cause__ or error)
            raise UserError(f"{which} is refused by its class: {why}") from error
        which = f"the configuration for layers {keep}"
    old, new = built
    if old is None or new is None:
        return False
    layers = [getattr(*find_layers(model)) for model in (old, new)]
    if len(layers[1]) != len(keep):
        raise UserError(
            f"config.json: {len(keep)} layers are kept and {len(layers[1])} come out; nothing is written"
        )
    for i, source in enumerate(keep):
        a, b = settings(layers[0][source]), settings(layers[1][i])
        wrong = [
            name
            for name in {**a, **b}
            if name not in a or name not in b or differs(name, a[name], b[name], keep, len(layers[0]))
        ]
        if wrong:
            name = wrong[0]
            raise UserError(
                f"layer {source} would be number {i}, where {type(new).__name__} gives {name} as "
                f"{shown(b.get(name))} instead of {shown(a.get(name))}, by the number of a layer or of all; "
                "no field of config.json keeps it: choose --drop-layers that leave this layer's number"
            )
    return True


def shown(value) -> str:
    return f"a table of {tuple(value.shape)}" if torch.is_tensor(value) else str(value)


def complaints(folder) -> tuple[type, dict]:
    """(class, {tensor: what is wrong with it}) of a folder, loaded on the meta device.

    Codes are taken for values: that needs no quantizer's package, and only names and shapes are looked at.
    """
    config = unquantized(read_json(folder / "config.json", dict))
    options = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    with quiet():
        model, info = model_class(config).from_pretrained(
            folder, config=config_object(config), local_files_only=True, **options
        )
    found = {key: "is missing" for key in info["missing_keys"]}
    found |= {key: f"is {tuple(a)}, not {tuple(b)}" for key, a, b in info["mismatched_keys"]}
    return type(model), found | dict.fromkeys(info["unexpected_keys"], STRANGER)


def check_folder(folder, source=None, follow=list):
    """Build the model of a written folder on the meta device; UserError unless every tensor has its place.

    source: the folder that was read. It may bring tensors that its class does not know, and a quantized one
    holds others than its class: these must be here too, and of the latter none may be lost. follow: turns a
    list of the source's names into those of the kept layers. A model that transformers does not know passes.
    """
    config = read_json(folder / "config.json", dict)
    if config_object(config) is None:
        return
    try:
        kind, wrong = complaints(folder)
    except Exception as error:
        raise UserError(f"what was written does not load: {first_line(error)}; nothing is kept") from error
    quantized = unquantized(config) != config
    allowed = {key for key, why in wrong.items() if quantized or source and why == STRANGER}
    if source and (allowed or quantized):
        with contextlib.suppress(Exception):  # a source with the configuration alone does not load
            known = {*follow([*complaints(source)[1]])}
            allowed &= known
            wrong |= dict.fromkeys(known - {*wrong} if quantized else (), "of the source is lost")
    if left := sorted(wrong.keys() - allowed):
        more = f", and {len(left) - 1} more" if left[1:] else ""
        raise UserError(
            f"{kind.__name__} does not fit what is written: {left[0]} {wrong[left[0]]}{more}; nothing is kept"
        )
