"""From a configuration file to base, SAM, head and data; used by train.py, test.py and the demo.

A configuration is a YAML file with the parts base, sam, unet, optim, data; `include` names another one beside it whose
values it overrides. Every value can be overridden on the command line: --set base.path=/models/llava optim.lr=2e-4.
"""

from pathlib import Path

import yaml

from common.errors import UserError
from common.files import inside, reading
from common.weights import read_weights
from flmm.data.phrases import PhraseDataset, ReasonSegDataset, Together
from flmm.data.png import PNGDataset
from flmm.data.refcoco import RefCOCODataset
from flmm.models.flmm import FLMM
from flmm.models.frozen_deepseek_vl import FrozenDeepseekVL, FrozenDeepseekVLHybrid
from flmm.models.frozen_llava import FrozenLlava
from flmm.models.frozen_llava_next import FrozenLlavaNext
from flmm.models.frozen_qwen import FrozenQwen
from flmm.models.mask_head.mask_refiner import SAMImageEncoder, load_sam

FAMILIES = {"llava": FrozenLlava, "llava_next": FrozenLlavaNext, "deepseek_vl": FrozenDeepseekVL,
            "deepseek_vl_hybrid": FrozenDeepseekVLHybrid, "qwen": FrozenQwen}
DATASETS = {"png": PNGDataset, "refcoco": RefCOCODataset, "phrases": PhraseDataset, "reasonseg": ReasonSegDataset}
PARTS = {"base", "sam", "unet", "optim", "data"}


def read_config(path, overrides=()):
    """Configuration as a dictionary. overrides: "part.name=value" strings, values in YAML."""
    path = Path(path)
    with reading(path, "configuration"):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected the parts {', '.join(sorted(PARTS))}")
    if "include" in config:
        parent = read_config(path.parent / config.pop("include"))
        config = {part: {**parent.get(part, {}), **config.get(part, {})} for part in PARTS}
    if unknown := set(config) - PARTS:
        raise UserError(f"{path}: unknown part {sorted(unknown)[0]!r}; expected {', '.join(sorted(PARTS))}")
    for override in overrides:
        name, equals, value = override.partition("=")
        part, dot, key = name.partition(".")
        if not equals or not dot or part not in PARTS:
            raise UserError(f"--set {override}: write part.name=value with one of the parts {', '.join(sorted(PARTS))}")
        config.setdefault(part, {})[key] = yaml.safe_load(value)
    return config


def build_base(config, **options):
    """Frozen base of config["base"]: family, path, and options of FrozenBase.load."""
    base = {**config["base"], **{k: v for k, v in options.items() if v is not None}}
    family = base.pop("family", None)
    if family in ("hpt", "mgm"):
        raise UserError(f"base.family {family}: transformers has no class for this base, so it cannot run; see flmm/README.md")
    if family not in FAMILIES:
        raise UserError(f"base.family is {family!r}, expected one of {', '.join(FAMILIES)}")
    if not base.get("path"):
        raise UserError("base.path is missing; give a model folder or hub name with --set base.path=...")
    return FAMILIES[family].load(base.pop("path"), **base)


def build_sam(config):
    """SamModel of config["sam"]["path"], or None when the path is null (coarse masks only)."""
    path = config.get("sam", {}).get("path")
    if path is None:
        return None
    if not Path(path).exists():
        raise UserError(f"sam.path {path}: no such file; download sam_vit_l_0b3195.pth, or --set sam.path=null for coarse masks")
    return load_sam(path, read_weights)


def build_head(config, dims, sam):
    """FLMM for a base with dims = (channels, layers, hidden size), and the frozen SAM image encoder (or None)."""
    options = {k: v for k, v in config.get("sam", {}).items() if k != "path"}
    head = FLMM(*dims, sam=sam, unet=config.get("unet"), sam_options=options)
    return head, SAMImageEncoder(sam) if sam is not None else None


def build_dataset(config, split, root, build, seed=0):
    """Data sets of config["data"][split] put together; every entry has a type and its class's arguments.

    Relative paths are relative to root; a path that leads out of root is refused.
    """
    entries = config.get("data", {}).get(split)
    if not entries:
        raise UserError(f"the configuration names no data for {split!r}; it has {', '.join(config.get('data', {})) or 'none'}")
    parts = []
    for entry in entries:
        entry = dict(entry)
        kind = entry.pop("type", None)
        if kind not in DATASETS:
            raise UserError(f"data.{split}: type is {kind!r}, expected one of {', '.join(DATASETS)}")
        for key, value in entry.items():
            if key in ("json_file", "panoptic_json_file", "panoptic_png_path", "image_path", "ann_file", "split_file", "folder"):
                entry[key] = inside(root, value)
        if kind == "refcoco":
            entry.setdefault("seed", seed)
        try:
            parts.append(DATASETS[kind](**entry, build=build))
        except TypeError as error:
            raise UserError(f"data.{split}: {error}") from error
    return parts[0] if len(parts) == 1 else Together(parts)
