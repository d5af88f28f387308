"""Build a model from its configuration and folders, load published start weights into it, and write it to one
file.

A model folder holds pytorch_model.bin (upstream's name and keys), dia_config.json (sizes, grid, language,
LoRA, thresholds) and adapter_config.json (because LoRA's alpha cannot be read from the weights).
"""

import math
import os
from copy import deepcopy
from pathlib import Path

import torch

from common.arguments import refuse
from common.checkpoint import atomic_json, atomic_path
from common.errors import UserError
from common.files import read_json, reading
from common.llm import add_lora, add_trust_argument, load_llm
from common.run import describe
from common.weights import load_weights, read_weights
from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset
from dia_pangu.src.Dataset.preprocess import PREPROCESS, Grid, read_scan
from dia_pangu.src.Dataset.prompt import LANGUAGES, LAYOUTS, ReportText
from dia_pangu.src.Dataset.verdict import GREY
from dia_pangu.src.Model.multimodality_model import MultiPanguForCausalLM
from dia_pangu.src.Model.my_embedding_layer import MyEmbedding
from dia_pangu.src.Model.pangu import load_tokenizer

# The published sizes are the defaults of MyEmbedding; TINY is for the built-in phantoms.
PUBLISHED = {
    "embedding": {},
    "grid": {"size": [256, 256, 64], "fov_mm": [384.0, 384.0, 320.0], "preprocess": "windows"},
    "language": "en",
    "prompt": "all",
    "max_length": 2048,
    "lora": None,
    "thresholds": [0.5] * 14,
}
TINY = {
    **PUBLISHED,
    "max_length": 512,
    "embedding": {
        "perceiver_num": 8,
        "vis_dim": 96,
        "patch_size": 8,
        "frame_patch_size": 4,
        "n_tok": 256,
        "vit": {
            "image_size": 64,
            "frames": 16,
            "depth": 3,
            "heads": 4,
            "dim_head": 24,
            "mlp_dim": 192,
            "dropout": 0.0,
            "emb_dropout": 0.0,
        },
        "perceiver": {"depth": 2, "heads": 4, "dim_head": 24, "ff_mult": 2},
    },
    "grid": {"size": [64, 64, 16], "fov_mm": [384.0, 384.0, 320.0], "preprocess": "windows"},
}
SIZES = {"published": PUBLISHED, "tiny": TINY}
# The form of dia_config.json and of a --config file, as common.files.read_json checks it.
CONFIG = {
    "embedding?": dict,
    "grid?": {"size": [int], "fov_mm": [float], "preprocess": str},
    "language?": str,
    "prompt?": str,
    "max_length?": int,
    "lora?": {"r": int, "alpha": float, "dropout": float, "targets": [str]},
    "thresholds?": [float],
}


def add_model(parser):
    """Add the flags that name a model: its sizes, its language model and its tokenizer."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    llm = "folder of the language model (openPangu-Embedded-7B, Llama-2, or any causal LM)"
    add("--lang-encoder-path", help=llm)
    add("--tokenizer-path", help="folder of its tokenizer, if that is not --lang-encoder-path")
    add("--size", choices=SIZES, default="published", help="sizes of the vision part")
    add("--config", help="JSON file with the keys of dia_config.json, instead of --size")
    language = "language of prompts and reports, instead of the configuration's (en)"
    add("--language", choices=LANGUAGES, help=language)
    prompt = (
        "findings that the prompt has a sentence for, instead of the configuration's (all); positives: those "
        "that are present, which makes prompts short"
    )
    add("--prompt", choices=LAYOUTS, help=prompt)
    preparation = (
        "preparation of the volumes; windows: orientation, spacing and three HU windows; upstream: exactly "
        "as published. Without it, that of the weights in --start, or windows for a CT in HU and upstream "
        "for grey levels"
    )
    add("--preprocess", choices=PREPROCESS, help=preparation)
    add("--attn", default="sdpa", choices=("sdpa", "eager"), help="attention code of the language model")
    add_trust_argument(group)


def read_config(args) -> dict:
    """Return the configuration of --config or --size; --language, --prompt and --preprocess override it."""
    config = deepcopy(SIZES[args.size])
    if args.config:
        refuse(args, ["size"], "beside --config")
        config = {**deepcopy(PUBLISHED), **read_json(args.config, CONFIG)}
        check_config(config, args.config)
    config["language"] = args.language or config["language"]
    config["prompt"] = getattr(args, "prompt", None) or config.get("prompt") or "all"
    config["grid"]["preprocess"] = args.preprocess or config["grid"]["preprocess"]
    return config


def check_config(config: dict, path):
    """Raise UserError for a field of a configuration file whose value no model can have."""
    grid, embedding, lora = config["grid"], config["embedding"], config["lora"]
    with reading(path, "configuration"):
        patch = embedding.get("patch_size", 32), embedding.get("patch_size", 32)
        parts = [
            size / side for size, side in zip(grid["size"], (*patch, embedding.get("frame_patch_size", 4)))
        ]
        known = {
            "grid.size": len(grid["size"]) == 3 and min(grid["size"]) > 0,
            "grid.fov_mm": len(grid["fov_mm"]) == 3 and all(0 < mm < 10000 for mm in grid["fov_mm"]),
            "grid.preprocess": grid["preprocess"] in PREPROCESS,
            "embedding.n_tok": math.prod(parts) == embedding.get("n_tok", 1024)
            and all(p % 1 == 0 for p in parts),
            "language": config["language"] in LANGUAGES,
            "prompt": config.get("prompt") in (None, *LAYOUTS),
            "max_length": config["max_length"] > 0,
            "lora": not lora or lora["r"] > 0 and 0 <= lora["dropout"] < 1 and bool(lora["targets"]),
            "thresholds": len(config["thresholds"]) == 14
            and all(0 <= cut <= 1 for cut in config["thresholds"]),
        }
    wrong = next((field for field, right in known.items() if not right), None)
    if wrong:
        raise UserError(f"{path}: field {wrong} has a value that no model can have; correct it")


def prepared_as(path) -> dict:
    """Return what the configuration beside start weights says of their grid; weights without one are
    published ones, which upstream's preparation has made."""
    path = Path(path)
    home = path if path.is_dir() else path.parent
    if (home / "dia_config.json").is_file():
        return read_json(home / "dia_config.json", CONFIG).get("grid") or {}
    return {} if (home / "vision.safetensors").is_file() else {"preprocess": "upstream"}


def settle_preparation(config: dict, args, starts) -> dict:
    """Choose how volumes are prepared, say so in one line, and return the configuration.

    The preparation belongs to the weights: those of `starts` decide, and they decide the grid too. Without
    them, and without --preprocess or --config, the first training volume decides.
    """
    implied = {str(path): prepared_as(path) for path in starts}
    kinds = {path: grid["preprocess"] for path, grid in implied.items() if grid.get("preprocess")}
    if len(set(kinds.values())) > 1:
        raise UserError(f"--start: the weights differ in preparation ({kinds}); take those of one")
    for path, grid in implied.items():
        for name in ("size", "fov_mm"):
            if name in grid and list(grid[name]) != list(config["grid"][name]):
                raise UserError(
                    f"--start {path}: its grid has {name} {grid[name]}, the configuration "
                    f"{config['grid'][name]}; "
                    "take the --size or --config that it was trained with"
                )
    if kinds:
        path, kind = next(iter(kinds.items()))
        if args.preprocess and args.preprocess != kind:
            tell(f"--preprocess {args.preprocess}, although {path} was trained with {kind}")
            return config
        config["grid"]["preprocess"] = kind
        tell(f"volumes are prepared with --preprocess {kind}, as {path} was trained")
    elif not args.preprocess and not args.config:
        config["grid"]["preprocess"] = kind = preparation_of(args.data, config["language"])
        if kind == "upstream":
            tell("the volumes are grey levels, no HU: they are prepared with --preprocess upstream")
    return config


def tell(text: str):
    """Print a line once, however many processes run."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def preparation_of(data, language: str) -> str:
    """Return upstream's preparation for data whose first training volume holds grey levels, else windows."""
    first = CTRGDataset(data, "train", Grid(), language=language, limit=1)
    try:
        return "upstream" if read_scan(first.path(first.items[0]["id"])).verdict.values == GREY else "windows"
    except UserError:
        return "windows"  # the data set says what is wrong with the volume when it reads it


def check_preparation(config: dict, starts, names: list[str]):
    """Raise UserError where a frozen ViT would see volumes of another preparation than its own."""
    kind = config["grid"]["preprocess"]
    for path in starts:
        trained = prepared_as(path).get("preprocess", kind)
        if trained != kind and not any("vision_encoder." in name for name in names):
            raise UserError(
                f"--preprocess {kind}: the ViT of {path} was trained with {trained} and is frozen; leave "
                "--preprocess out, or train vision_encoder"
            )


def make_grid(config) -> Grid:
    """Return the grid of voxels that the configuration asks for."""
    grid = config["grid"]
    return Grid(tuple(grid["size"]), tuple(grid["fov_mm"]), grid["preprocess"])


def make_text(tokenizer, config, vocabulary: int) -> ReportText:
    """Return the writer of prompts for a tokenizer and a word table of `vocabulary` rows."""
    return ReportText(
        tokenizer,
        vocabulary,
        config["embedding"].get("perceiver_num", 32),
        1,
        config["language"],
        config["max_length"],
        layout=config.get("prompt") or "all",
    )


def make_embedding(config, vocabulary: int, width: int) -> MyEmbedding:
    """Return MyEmbedding as configured; a placeholder stands for the word table of the language model."""
    with reading("the configuration's embedding", "set of sizes"):
        layer = MyEmbedding(num_embeddings=1, embedding_dim=width, **config["embedding"])
    layer.weight = torch.nn.Parameter(torch.empty(vocabulary, width, device="meta"))
    return layer


def build_model(
    config, lang_encoder_path, tokenizer_path=None, trust_remote_code=False, attn="sdpa", dtype="auto"
):
    """Return (model, text): the language model of a folder, with LoRA if the configuration has it, around a
    new embedding layer.

    text is the writer of prompts that belongs to it. dtype and attn are those of the language model.
    """
    if not lang_encoder_path:
        raise UserError("--lang-encoder-path is needed: the folder of the language model")
    llm = load_llm(lang_encoder_path, dtype, trust_remote_code, attn_implementation=attn)
    tokenizer = load_tokenizer(tokenizer_path or lang_encoder_path, trust_remote_code)
    vocabulary, width = llm.get_input_embeddings().weight.shape
    text = make_text(tokenizer, config, vocabulary)
    if config["lora"]:
        llm = add_lora(llm, **config["lora"])
    return MultiPanguForCausalLM(llm, make_embedding(config, vocabulary, width)), text


# RadFM keeps ViT and Perceiver in files of their own, whose keys begin with these words.
PARTS = {
    **dict.fromkeys(("to_patch_embedding.", "pos_embedding.", "transformer."), "vision_encoder."),
    **dict.fromkeys(("latents", "layers.", "norm."), "perceiver."),
}


def to_our_keys(model, tensors: dict, take: str) -> dict:
    """Rename published keys to this model's.

    take "vision": only the vision part, whatever else the file holds (Dia-LLaMA's language model has the
    names and shapes of Pangu's, so that loading all of it would overwrite Pangu layers with Llama's). RadFM's
    separate files have bare ViT or Perceiver keys. take "all": also the language model, with or without
    LoRA's names as the model needs them.
    """
    wanted = model.state_dict() if take == "all" else {}
    if not any(key.startswith(("embedding_layer.", "lang_model.")) for key in tensors):
        tensors = {f"embedding_layer.{part_of(key)}{key}": value for key, value in tensors.items()}
    out = {}
    for key, value in tensors.items():
        if key.startswith("embedding_layer."):
            if key != "embedding_layer.weight" or take == "all":
                out[key] = value
        elif take == "all" and key.startswith("lang_model."):
            out[language_key(key, wanted)] = value
    return out


def part_of(key: str) -> str:
    """Return the prefix of the part that a bare RadFM key belongs to, or an empty string."""
    return next((part for word, part in PARTS.items() if key.startswith(word)), "")


def language_key(key: str, wanted: dict) -> str:
    """Rename a key of the language model to that of a model with the keys `wanted`, with or without LoRA."""
    lora = any(".lora_A." in name for name in wanted)
    if lora and not key.startswith("lang_model.base_model."):
        key = key.replace("lang_model.", "lang_model.base_model.model.", 1)
        stem, leaf = key.rsplit(".", 1)
        return key if key in wanted else f"{stem}.base_layer.{leaf}"
    if not lora and key.startswith("lang_model.base_model.model."):
        if ".lora_" in key:
            raise UserError(
                f"the checkpoint has LoRA weights ({key}), the model has none; train it with --stage ft"
            )
        key = key.replace("lang_model.base_model.model.", "lang_model.", 1).replace(".base_layer.", ".")
    return key


def load_start(model, path, take: str = "vision"):
    """Load start weights, print what was taken and what not, and return the keys that were taken.

    path: a Dia-LLaMA, Dia-Pangu or RadFM file or folder, or a folder with vision.safetensors. take: "vision"
    or "all", see `to_our_keys`. Raises UserError if a tensor has another shape than the model's.
    """
    path = Path(path)
    tensors = read_weights(path / "vision.safetensors" if (path / "vision.safetensors").is_file() else path)
    renamed = to_our_keys(model, tensors, take)
    left = len([key for key in tensors if key.startswith("lang_model.")]) if take == "vision" else 0
    target = torch.nn.ModuleDict({"embedding_layer": model.embedding_layer}) if take == "vision" else model
    report = load_weights(target, renamed, str(path), min_share=0.0)
    if report.mismatched:
        key, theirs, ours = report.mismatched[0]
        raise UserError(
            f"{path}: {len(report.mismatched)} tensors have another shape, {key} {theirs} where the model "
            f"has {ours}; take the --size or --config that the checkpoint was made with"
        )
    if left:
        tell(f"  {left} tensors of the file's language model left alone")
    return report.loaded


def save_model(weights: dict, folder, config: dict):
    """Write pytorch_model.bin with dia_config.json and, for LoRA, adapter_config.json beside it."""
    folder = Path(folder)
    with atomic_path(folder / "pytorch_model.bin") as temporary:
        torch.save({key: value.detach().cpu().contiguous() for key, value in weights.items()}, temporary)
    atomic_json(folder / "dia_config.json", config)
    if config["lora"]:
        lora = config["lora"]
        adapter = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": lora["r"],
            "lora_alpha": lora["alpha"],
            "lora_dropout": lora["dropout"],
            "target_modules": lora["targets"],
            "bias": "none",
        }
        atomic_json(folder / "adapter_config.json", adapter)


def load_model(
    folder,
    lang_encoder_path,
    tokenizer_path=None,
    trust_remote_code=False,
    attn="sdpa",
    dtype="auto",
    language=None,
):
    """Return (model in eval mode, text, config) of a folder that `save_model` or upstream's trainer wrote, or
    of its .bin file.

    Without dia_config.json the published sizes are taken; LoRA's rank and targets come from the keys, and its
    alpha from adapter_config.json or, if that is absent, upstream's 16.
    """
    folder = Path(folder)
    home = folder if folder.is_dir() else folder.parent
    config = deepcopy(PUBLISHED)
    if (home / "dia_config.json").is_file():
        config = {**config, **read_json(home / "dia_config.json", CONFIG)}
        check_config(config, home / "dia_config.json")
    else:
        config["grid"]["preprocess"] = "upstream"
        print(
            f"{home}: no dia_config.json; taking the published sizes, --preprocess upstream and --language "
            f"{language or 'en'}"
        )
    tensors = read_weights(folder)
    config["language"] = language or config["language"]
    found = {key: value for key, value in tensors.items() if key.endswith(".lora_A.default.weight")}
    if found and not config["lora"]:
        alpha, file = 16, home / "adapter_config.json"
        if file.is_file():
            alpha = read_json(file, {"lora_alpha": float})["lora_alpha"]
        else:
            print(f"{home}: no adapter_config.json; taking upstream's LoRA alpha 16")
        config["lora"] = {
            "r": next(iter(found.values())).shape[0],
            "alpha": alpha,
            "dropout": 0.0,
            "targets": sorted({key.split(".")[-4] for key in found}),
        }
    model, text = build_model(config, lang_encoder_path, tokenizer_path, trust_remote_code, attn, dtype)
    load_weights(model, to_our_keys(model, tensors, "all"), str(folder), min_share=0.9)
    return model.eval(), text, config


def print_model(model, names: list[str]):
    """Print the parameters of the model and what trains of it, part by part."""
    parts = {}
    sizes = dict(model.named_parameters())
    for name in names:
        part = "lang_model (LoRA)" if "lora_" in name else "lang_model"
        if name.startswith("embedding_layer."):
            part = ".".join(name.split(".")[:2])
        count, values = parts.get(part, (0, 0))
        parts[part] = (count + 1, values + sizes[name].numel())
    print(describe(model))
    for part, (count, values) in parts.items():
        print(f"  trains {part}: {count} tensors, {values:,} values")
