"""Sizes of a model: read from a YAML file with upstream's sections, and single values changed by --set
NAME=VALUE."""

import inspect
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import yaml

from common.errors import UserError
from common.files import check, reading
from cwt_mae.model import CWT_Encoder, CWT_MAE_RoPE


def shape_of(*functions) -> dict:
    """{name: type} of the keyword arguments of `functions` that have a number, a truth value or text as
    default."""
    parameters = {
        name: parameter.default
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
    }
    return {name: type(v) for name, v in parameters.items() if isinstance(v, (bool, int, float, str))}


# Arguments of the model by name and type; `preprocess` is not among them, it follows from the data options.
SHAPE = shape_of(CWT_Encoder, CWT_MAE_RoPE) | {
    "padding": (str, type(None)),
    "rope_stride": (int, type(None)),
    "channel_weights": [float],
    "leads": (list, type(None)),
}


def read_config(path) -> dict:
    """Arguments of CWT_MAE_RoPE from the sections `model` and `data` of a YAML file.

    Names that other scripts' options stand for here (upstream's train.epochs, data.index_path, ...) are
    listed on stderr as not read. Raises UserError naming file and field for an unknown size or one of another
    type.
    """
    with reading(path, "YAML file"):
        sections = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    check(sections, {"model": dict, "data?": dict, "train?": dict}, path)
    sizes, data = dict(sections["model"]), sections.get("data") or {}
    if "signal_len" in data:
        sizes["signal_len"] = data["signal_len"]
    check_sizes(sizes, SHAPE, path)
    unread = [f"data.{name}" for name in data if name != "signal_len"]
    unread += [
        f"{section}.{name}"
        for section in sections
        for name in sections[section] or ()
        if section not in ("model", "data")
    ]
    if unread:
        print(f"{path}: not read, give them as options instead: {', '.join(unread)}", file=sys.stderr)
    return sizes


def check_sizes(sizes: dict, shape: dict, where):
    """Raise UserError unless every entry of `sizes` is a name of `shape` and of its type."""
    unknown = sorted(set(sizes) - set(shape))
    if unknown:
        raise UserError(f"{where}: unknown name {unknown[0]!r}; known names are {', '.join(sorted(shape))}")
    check(sizes, {name: kind for name, kind in shape.items() if name in sizes}, where)


def parse_changes(changes: list[str], shape: dict) -> dict:
    """["depth=3", "log_scales=true"] -> {"depth": 3, "log_scales": True}; values are read as YAML and checked
    by `shape`."""
    values = {}
    for change in changes:
        name, sign, text = change.partition("=")
        if not sign:
            raise UserError(f"--set {change}: expected NAME=VALUE, such as depth=3")
        with reading(f"--set {change}", "YAML value"):
            values[name] = yaml.safe_load(text)
    check_sizes(values, shape, "--set")
    return values
