"""Reads a written folder back before a tool says that it is done, without its values.

check_layers(before, after, keep)     the classes of both configurations are built: each kept layer must be,
                                      by its modules, shapes and settings, the layer that it was
check_folder(folder)                  from_pretrained on the meta device: no tensor may be missing, left
                                      over or of another shape
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
from pruning.shorter import config_object

# Auto classes of transformers that a decoder may be in, the first where it is in none.
KINDS = ("CausalLM", "ImageTextToText", "SpeechSeq2Seq")
# What tells layers apart, and nothing more.
NUMBER = re.compile(r"^((layer|block)_?(idx|id|index|number|num)|num_hidden_layers)$")


def model_class(config: dict):
    """The class that config.json names, or else the general one that takes its configuration: of language
    models, or of those that also see or hear."""
    for name in config.get("architectures") or []:
        if isinstance(getattr(transformers, name, None), type):
            return getattr(transformers, name)
    kinds = [getattr(transformers, f"AutoModelFor{kind}") for kind in KINDS]
    known = type(config_object(config))
    return next((kind for kind in kinds if known in kind._model_mapping), kinds[0])


def build(config: dict):
    """The model of a config.json, its weights on the meta device and its buffers real; None where
    transformers does not know the model, UserError where the configuration contradicts itself."""
    known = config_object(
        {name: value for name, value in config.items() if name != "quantization_config"}, strict=True
    )
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
    """What a layer is, but for its values and its number: {name: class, shape, buffer, or plain
    attribute}."""
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
    if isinstance(before, list) and len(before) == count and isinstance(after, list):
        before = [before[i] for i in keep]
    return type(before) is not type(after) or before != after


def check_layers(before: dict, after: dict, keep: list[int]) -> bool:
    """Compare the layers of two config.json: new layer i must be old layer keep[i]. UserError where it is
    not.

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


def load_meta(folder, config: dict) -> tuple:
    """(model on the meta device, what did not fit) of a folder."""
    options = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    with quiet():
        return model_class(config).from_pretrained(folder, local_files_only=True, **options)


def strangers(folder) -> set | None:
    """Tensors of a source that its own class has no place for, without their numbers; None where it does not
    load, as a folder with the configuration alone."""
    try:
        _, info = load_meta(folder, read_json(folder / "config.json", dict))
    except Exception:
        return None
    return {re.sub(r"\d+", "#", key) for key in info["unexpected_keys"]}


def check_folder(folder, source=None) -> bool:
    """Build the model of a written folder on the meta device; UserError unless every tensor has its place.

    source: the folder that was read, which may bring tensors that its class does not know; a tool makes none.
    Returns whether it could be looked at: transformers knows the model, and needs no further package for it.
    """
    config = read_json(folder / "config.json", dict)
    if config_object(config) is None or "quantization_config" in config:
        return False
    try:
        model, info = load_meta(folder, config)
    except Exception as error:
        raise UserError(f"what was written does not load: {first_line(error)}; nothing is kept") from error
    wrong = [f"{key} is missing" for key in sorted(info["missing_keys"])]
    wrong += [f"{key} is {tuple(a)}, not {tuple(b)}" for key, a, b in sorted(info["mismatched_keys"])]
    left_over = sorted(info["unexpected_keys"])
    known = strangers(source) if left_over and source else set()
    if known is not None:
        wrong += [f"{key} has no place in it" for key in left_over if re.sub(r"\d+", "#", key) not in known]
    if wrong:
        more = f", and {len(wrong) - 1} more" if wrong[1:] else ""
        raise UserError(
            f"{type(model).__name__} does not fit what is written: {wrong[0]}{more}; nothing is kept"
        )
    return True
