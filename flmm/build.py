"""From a configuration file to base, SAM, head and data; used by train.py, test.py and the demo.

A configuration is a YAML file with the parts base, sam, unet, optim, data; `include` names another one beside
it whose values it overrides. Every value can be overridden on the command line: --set base.path=/models/llava
optim.lr=2e-4.
"""

import re
import sys
from pathlib import Path

import yaml

from common.arguments import number
from common.errors import UserError
from common.files import check, reading
from common.weights import read_weights
from flmm.data.phrases import MixedData, PhraseDataset, ReasonSegDataset
from flmm.data.png import PNGDataset
from flmm.data.refcoco import RefCOCODataset
from flmm.data.skip import Bad
from flmm.models.flmm import FLMM
from flmm.models.frozen_deepseek_vl import FrozenDeepseekVL, FrozenDeepseekVLHybrid
from flmm.models.frozen_efficientnet import FrozenEfficientNet
from flmm.models.frozen_gemma3 import FrozenGemma3
from flmm.models.frozen_internvl import FrozenInternVL
from flmm.models.frozen_llava import FrozenLlava
from flmm.models.frozen_llava_next import FrozenLlavaNext
from flmm.models.frozen_llava_onevision import FrozenLlavaOnevision
from flmm.models.frozen_mistral3 import FrozenMistral3
from flmm.models.frozen_qwen import FrozenQwen
from flmm.models.frozen_qwen3_vl import FrozenQwen3VL
from flmm.models.frozen_smolvlm import FrozenIdefics3, FrozenSmolVLM
from flmm.models.mask_head.mask_refiner import SAMImageEncoder, load_sam

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = {
    "llava": FrozenLlava,
    "llava_next": FrozenLlavaNext,
    "deepseek_vl": FrozenDeepseekVL,
    "deepseek_vl_hybrid": FrozenDeepseekVLHybrid,
    "qwen": FrozenQwen,
    "qwen3_vl": FrozenQwen3VL,
    "internvl": FrozenInternVL,
    "gemma3": FrozenGemma3,
    "smolvlm": FrozenSmolVLM,
    "idefics3": FrozenIdefics3,
    "llava_onevision": FrozenLlavaOnevision,
    "mistral3": FrozenMistral3,
    "efficientnet": FrozenEfficientNet,
}
DATASETS = {
    "png": PNGDataset,
    "refcoco": RefCOCODataset,
    "phrases": PhraseDataset,
    "reasonseg": ReasonSegDataset,
}
# all that a configuration may say, but for `include`; each of data's lists has dictionaries of a type and its
# class's arguments
CONFIG = {
    "base": {
        **dict.fromkeys(
            ("family?", "path?", "template?", "question?", "lead?", "merge?", "attention?", "dtype?"), str
        ),
        **{"load_in_4bit?": bool, "device_map?": (str, dict)},
    },
    "sam": {
        "path?": str,
        **dict.fromkeys(("use_text?", "use_mask?", "use_box?", "multimask_output?", "per_phrase_pad?"), bool),
    },
    "unet": {
        **dict.fromkeys(("upsample_input?", "base_channels?", "num_stages?", "num_groups?"), int),
        **dict.fromkeys(("strides?", "enc_num_convs?", "dec_num_convs?"), [int]),
        **dict.fromkeys(("enc_dilations?", "dec_dilations?"), [int]),
        **{"normalize_input?": bool, "log_maps?": bool, "downsamples?": [bool]},
    },
    "optim": {
        **dict.fromkeys(("lr?", "epochs?", "weight_decay?", "warmup?", "clip?", "mask_weight?"), float),
        **dict.fromkeys(("batch_size?", "accum?", "coarse_first?"), int),
    },
    "data": {},
}


class YAML(yaml.SafeLoader):
    """YAML in which 2e-4 is a number, as in version 1.2; PyYAML follows 1.1 and wants 2.0e-4."""


YAML.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?e[-+]?\d+", re.IGNORECASE), list("-+0123456789")
)


def read_config(path, overrides=(), base_path=None):
    """Configuration as a dictionary with all its parts. overrides: "part.name=value" strings, values in YAML.
    base_path: goes before base.path.

    Paths that the file names are relative to the repository, then to the file; those of an override to the
    folder one is in, then likewise. `path` itself may be relative to the folder one is in or the repository.
    """
    path = Path(locate(str(path), Path.cwd(), ROOT))
    config = read_parts(path)
    for override in overrides:
        name, equals, value = override.partition("=")
        part, dot, key = name.partition(".")
        if not equals or not dot or part not in CONFIG:
            raise UserError(
                f"--set {override}: write part.name=value with one of the parts {', '.join(CONFIG)}"
            )
        with reading(f"--set {override}", "value"):
            config[part][key] = yaml.load(value, YAML)
        if key == "path":
            config[part][key] = locate(config[part][key], Path.cwd(), ROOT, path.parent)
    if base_path:
        config["base"]["path"] = base_path
    for part, values in config.items():
        check(values, CONFIG[part], path, part)
        known = [name.removesuffix("?") for name in CONFIG[part]]
        if unknown := part != "data" and sorted(set(values) - set(known), key=str):
            raise UserError(f"{path}: {part} has no value {unknown[0]!r}; expected {', '.join(known)}")
        for name, value in values.items():
            least = 1 if part == "unet" or name in ("batch_size", "accum") else 0
            if type(value) in (int, float) and not value >= least:
                raise UserError(f"{path}: {part}.{name} is {value}, it must be at least {least}")
    return {
        part: {k: v for k, v in values.items() if v is not None} for part, values in config.items()
    }  # null: the default


def read_parts(path):
    """The parts of a configuration file over those of the file that it includes."""
    with reading(path, "configuration"):
        given, parent = yaml.load(path.read_text(encoding="utf-8"), YAML), {}
        check(given, {"include?": str, **{f"{part}?": dict for part in CONFIG}}, path)
        if include := given.pop("include", None):
            parent = read_parts(path.parent / include)
    if unknown := sorted(set(given) - set(CONFIG), key=str):
        raise UserError(f"{path}: unknown part {unknown[0]!r}; expected {', '.join(CONFIG)}")
    config = {part: {**parent.get(part, {}), **(given.get(part) or {})} for part in CONFIG}
    for values in config.values():
        if "path" in values:
            values["path"] = locate(values["path"], ROOT, path.parent, Path.cwd())
    return config


def locate(name, *folders):
    """The first of `folders` / name that exists, as text; else `name` as it is, such as one on the hub."""
    if not isinstance(name, str) or not name:
        return name
    found = (str(folder / name) for folder in folders if (folder / name).exists())
    return next(found, name)


def add_config_arguments(parser, data=True, required=True):
    """--config, --set and --data, alike in every script that builds a model."""
    parser.add_argument("--config", type=Path, required=required, help="YAML file of flmm/configs")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="PART.NAME=VALUE", help="override values of the configuration"
    )
    if data:
        parser.add_argument(
            "--data", type=Path, required=True, help="root of the data paths of the configuration"
        )


def add_base_arguments(parser):
    """--base-path, --random-base and --attention, alike in training and scoring."""
    parser.add_argument(
        "--base-path", help="folder or hub name of the base instead of the configuration's base.path"
    )
    parser.add_argument(
        "--random-base",
        type=number(int, 0),
        metavar="SEED",
        help="control: the base gets random weights of this seed instead of its own",
    )
    parser.add_argument(
        "--attention",
        choices=["rows", "eager"],
        help="how attention is read: only the rows that are needed (rows, which is what happens without this "
        "option), or full matrices (eager)",
    )


def add_skip_argument(parser):
    """--skip-bad, alike in training and scoring."""
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out faulty annotations, masks and pictures and say how many, instead of ending with the "
        "first",
    )


def family_of(config):
    """Class of the base that a configuration names; UserError before anything is loaded or asked for."""
    family = config["base"].get("family")
    if family in ("hpt", "mgm"):
        raise UserError(
            f"base.family {family}: transformers has no class for this base, so it cannot run; see "
            "flmm/README.md"
        )
    if family not in FAMILIES:
        raise UserError(f"base.family is {family!r}, expected one of {', '.join(FAMILIES)}")
    if not config["base"].get("path"):
        raise UserError(
            "base.path is missing; give a model folder or hub name with --set base.path=..., from Python "
            "with read_config(path, base_path=...)"
        )
    return FAMILIES[family]


def build_base(config, **options):
    """Frozen base of config["base"]: family, path, and options of FrozenBase.load."""
    kind = family_of(config)
    base = {**config["base"], **{k: v for k, v in options.items() if v is not None}}
    return kind.load(base.pop("path"), **{k: v for k, v in base.items() if k != "family"})


def build_sam(config):
    """SamModel of config["sam"]["path"], or None when the path is null (coarse masks only)."""
    path = config["sam"].get("path")
    if path is None:
        return None
    if not Path(path).exists():
        raise UserError(
            f"sam.path {path}: no such file in {ROOT} or beside the configuration; put "
            "sam_vit_l_0b3195.pth there, or --set sam.path=null for coarse masks"
        )
    return load_sam(path, read_weights)


def build_head(config, dims, sam):
    """FLMM for a base of these `dims`, with SAM or None."""
    options = {k: v for k, v in config["sam"].items() if k != "path"}
    return FLMM(*dims, sam=sam, unet=config["unet"], sam_options=options)


def load_trained(config, head_path, device, **options):
    """Base, trained head and SAM's image encoder (None without SAM) on `device`, ready to be asked, and one
    line on what was loaded. options: of FrozenBase.load. What costs little is read before the base."""
    weights, sam = read_weights(head_path), build_sam(config)
    base = build_base(config, **options).to(device)
    head = build_head(config, base.dims, sam)
    report = head.load_upstream(weights, head_path)
    encoder = SAMImageEncoder(sam).to(device) if sam is not None else None
    return base, head.to(device).eval(), encoder, report


# the arguments of a data set that are paths below --data
FOLDERS = ("panoptic_png_path", "image_path", "folder")
PATHS = (*FOLDERS, "json_file", "panoptic_json_file", "ann_file", "split_file")


def build_dataset(config, split, root, build=None, seed=0, protocol="upstream", skip_bad=False):
    """Data sets of config["data"][split] put together; every entry has a type and its class's arguments.

    Relative paths are relative to root, and any of them may be a link. build: what makes a sample of a record
    (SampleBuilder); `attach` gives it later, so that data are checked before a base is loaded. protocol: of
    the RefCOCO sets; "object" makes each object a record of its own, with its first expression, "sentence"
    each sentence; "upstream" leaves them as the configuration has them. skip_bad: faulty items are left out
    and counted.
    """
    entries = config["data"].get(split)
    if not entries:
        raise UserError(
            f"the configuration names no data for {split!r}; it has {', '.join(config['data']) or 'none'}"
        )
    check(entries, [{"type": str}], f"data.{split}")
    if protocol != "upstream" and not any(entry["type"] == "refcoco" for entry in entries):
        raise UserError(
            f"--protocol {protocol} has no effect on data.{split}, which has no RefCOCO; leave it out"
        )
    parts = []
    for entry in entries:
        entry = dict(entry)
        kind = entry.pop("type")
        if kind not in DATASETS:
            raise UserError(f"data.{split}: type is {kind!r}, expected one of {', '.join(DATASETS)}")
        for key in PATHS:
            if isinstance(entry.get(key), str):
                entry[key] = Path(root) / entry[key]
                if key in FOLDERS and not entry[key].is_dir():
                    raise UserError(f"{entry[key]}: no such folder; check {key} of data.{split} and --data")
        if kind == "refcoco":
            entry.setdefault("seed", seed)
            if protocol != "upstream":
                text_mode = "original" if protocol == "sentence" else "select_first"
                entry.update(one_per_object=True, text_mode=text_mode)
        try:
            parts.append(DATASETS[kind](**entry, build=build, bad=Bad(skip_bad)))
        except TypeError as error:
            raise UserError(f"data.{split}: {error}") from error
        tell_faults(parts[-1], split)
    return parts[0] if len(parts) == 1 else MixedData(parts)


def tell_faults(dataset, split):
    """One line on stderr about what was left out of a data set."""
    if dataset.bad.faults:
        print(
            f"data.{split}: {len(dataset.bad.faults)} bad items were left out, the first: "
            f"{dataset.bad.faults[0]}",
            file=sys.stderr,
        )
    if dropped := getattr(dataset, "dropped_parts", 0):
        print(
            f"data.{split}: {dropped} parts of polygons with fewer than three corners were left out",
            file=sys.stderr,
        )


def attach(dataset, build):
    """Give the data sets of `build_dataset` what makes samples of their records; returns `dataset`."""
    for part in getattr(dataset, "datasets", [dataset]):
        part.build = build
    return dataset
