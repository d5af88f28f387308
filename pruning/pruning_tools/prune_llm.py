"""Remove decoder layers from a checkpoint on disk.

    python pruning/pruning_tools/prune_llm.py --ckpt path/to/llm --out-dir pruned --drop-layers 23-28
    python pruning/pruning_tools/prune_llm.py --ckpt runs/dia_pangu/ft --lang-model-path path/to/llm \\
        --out-dir pruned --drop-layers 23-28

Removing layers renames keys, so no model is built and no value changes: dtype, tied embeddings and LoRA
weights stay as they are, and the alpha of LoRA, which decides how strongly it acts, is carried along
(upstream guessed it, halved it and rounded to float16). The source is never modified. From a checkpoint that
holds more than a language model it writes

    llm_only_pruned_state_{tag}_{version}_cpu.bin              the language model's tensors
    pytorch_model_pruned_{tag}_merged_clean_{version}_cpu.bin  all tensors (safetensors if the source is so)
    prune_layer_map_{tag}_{version}_cpu.json                   what was removed, with upstream's fields
    adapter_config.json                                        rank, alpha and targets of LoRA
    hf_{tag}/                                                  with --hf: a folder that from_pretrained loads

and from a plain language model the map and hf_{tag}/. Upstream: prune_llm_only_and_merge_{CN,EN}_cli.py.
"""

import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch

from common.arguments import Parser, refuse
from common.checkpoint import atomic_dir, atomic_json
from common.errors import UserError, run
from common.files import read_json
from pruning.layers import (
    DOWN,
    MIXERS,
    MLP,
    OF_LAYER,
    OUTPUT,
    PER_LAYER,
    check_drop,
    make_tag,
    parse_drop_layers,
    parts_of,
    plain_tag,
)
from pruning.pruning_tools import read_back
from pruning.pruning_tools.language_model import (
    LORA_PART,
    LanguageModel,
    Lora,
    check_config,
    check_lora,
    copy_companions,
    find_language_model,
    known_lora,
)
from pruning.pruning_tools.shards import (
    Checkpoint,
    Entry,
    cast,
    derived,
    open_checkpoint,
    write_bin,
    write_safetensors,
    write_shards,
)
from pruning.shorter import (
    QUANTIZATION_FILES,
    config_object,
    quantized_names,
    shorter_config,
    shorter_generation,
    unquantized,
)

VERSIONS = ("v0112_en", "CN")
# The last matrices of a layer's two branches, below the layer's own key; LoRA adds nothing where B is zero.
LAST = r"(?:base_layer\.)?(?:weight|bias|lora_B\..+)"
BRANCHES = {
    "attention": re.compile(rf"(?:{'|'.join(MIXERS)})\.(?:.+\.)?(?:{'|'.join(OUTPUT)})\.{LAST}"),
    "mlp": re.compile(
        rf"(?:{'|'.join(MLP)})\.(?:bias|(?:.+\.)?(?:{'|'.join(DOWN)}|output_linear)(?:_bias|\.{LAST})?)"
        rf"|(?:fc2|output\.dense)\.{LAST}"
    ),
}
# --hf: whether LoRA is merged, for each folder that is written.
HF = {"none": (), "merged": (True,), "adapter": (False,), "both": (True, False)}


def parse_args(argv=None):
    p = Parser(__doc__)
    add_source_arguments(p.add_argument_group("checkpoint"))
    add_layer_arguments(p.add_argument_group("layers"))
    add_result_arguments(p.add_argument_group("results"))
    return p.parse_args(argv)


def add_source_arguments(group):
    group.add_argument(
        "--ckpt",
        type=Path,
        required=True,
        help=".bin, .pth, .safetensors, or a folder with such or with shards",
    )
    group.add_argument(
        "--lang-model-path",
        type=Path,
        help="folder with config.json and tokenizer; default: the checkpoint's",
    )
    group.add_argument("--lora-alpha", type=float, help="alpha of LoRA, where no adapter_config.json says it")
    group.add_argument("--lora-r", type=int, help="rank of LoRA; only checked against the checkpoint")
    group.add_argument(
        "--lora-target-modules",
        help="targets of LoRA, separated by commas; only checked against the checkpoint",
    )
    group.add_argument(
        "--layer-prefix", help="keys before the layer number, where the checkpoint holds several decoders"
    )


def add_layer_arguments(group):
    group.add_argument(
        "--drop-layers",
        action="append",
        default=[],
        metavar="SPEC",
        help='layers to remove, such as 23-28 or "0-2,5,7-9"; repeat it for several models',
    )
    for part in BRANCHES:
        group.add_argument(
            f"--off-{part}",
            default="",
            metavar="SPEC",
            help=f"kept layers, by old numbers, whose {part} is switched off: its last matrix is written as "
            "zeros, which every program reads; size and time stay",
        )
    group.add_argument("--plan", type=Path, help="JSON file of choose_layers.py: prune every set in it")


def add_result_arguments(group):
    group.add_argument("--out-dir", type=Path, required=True, help="folder of the results")
    group.add_argument(
        "--tag",
        action="append",
        default=[],
        help="name of each set's result; default: drop<first>_<last> or drop<layers>",
    )
    group.add_argument(
        "--hf",
        choices=HF,
        default="none",
        help="of a checkpoint with more than a language model, also write a folder for from_pretrained: LoRA "
        "merged into the weights, beside them as a peft folder adapter/, or both folders",
    )
    group.add_argument(
        "--llm-dtype",
        choices=("keep", "float32", "float16", "bfloat16"),
        default="keep",
        help="number format of the language model's tensors (upstream: float16)",
    )
    group.add_argument(
        "--format",
        choices=("source", "bin", "safetensors"),
        default="source",
        help="format of the merged file",
    )
    group.add_argument("--max-shard-gb", type=float, default=5.0, help="largest shard in 10^9 bytes")
    group.add_argument(
        "--script-version", choices=VERSIONS, default=VERSIONS[0], help="part of upstream's file names"
    )
    group.add_argument(
        "--unchecked", action="store_true", help="write also a model whose class transformers does not know"
    )
    group.add_argument("--overwrite", action="store_true", help="replace results of the same tag")


# ---------------------------------------- pruning


def prune_keys(entries: dict, llm: LanguageModel, drop_layers) -> tuple[dict, dict]:
    """Return ({key: Entry} without the dropped layers, the rest renumbered; {new: old} layer numbers)."""
    drop = check_drop(drop_layers, llm.layers)
    layer_id_map = dict(enumerate(i for i in range(llm.layers) if i not in drop))
    new_of = {old: new for new, old in layer_id_map.items()}
    new_of |= {llm.layers + i: len(layer_id_map) + i for i in range(llm.extra)}
    kept = {}
    for key, entry in entries.items():
        match = re.match(llm.pattern, key)
        if match is None:
            if name := outside_name(key, new_of):
                kept[name] = by_layer(key, entry, list(layer_id_map.values()), llm.layers)
        elif int(match[1]) in new_of:
            kept[f"{llm.prefix}{new_of[int(match[1])]}{key[match.end(1) :]}"] = entry
    return kept, layer_id_map


def switched_off(entries: dict, llm: LanguageModel, args) -> dict:
    """`entries` with zeros where the branches of --off-attention and --off-mlp end, by old layer numbers."""
    off, changed = branches_off(args), {}
    for part, layers in off.items():
        missing = set(check_drop(layers, llm.layers, f"--off-{part}"))
        for key, entry in entries.items():
            match = re.match(llm.pattern, key)
            layer = int(match[1]) if match else None
            if layer in layers and BRANCHES[part].fullmatch(key[match.end() :]):
                changed[key] = derived(entry, torch.zeros_like)
                missing.discard(layer)
        if missing:
            raise UserError(f"--off-{part}: layer {min(missing)} has no {part} with one last matrix")
    return entries | changed


def branches_off(args) -> dict:
    """{branch: layers} of --off-attention and --off-mlp."""
    return {part: parse_drop_layers(getattr(args, f"off_{part}"), f"--off-{part}") for part in BRANCHES}


def outside_name(key: str, new_of: dict) -> str | None:
    """The new key of a tensor outside the layers, None for one that belonged to a dropped layer."""
    for pattern, less in OF_LAYER.items():
        if found := re.search(pattern, key):
            new = new_of.get(int(found[1]) + less)
            return None if new is None else f"{key[: found.start(1)]}{new - less}"
    return key


def by_layer(key: str, entry, keep: list[int], layers: int):
    """The entry of a tensor outside the layers, without what Gemma's tables hold for dropped ones."""
    axis = next((axis for name, axis in PER_LAYER.items() if key.endswith(name)), None)
    if axis is None or len(keep) == layers or entry.shape[axis] % layers:
        return entry
    shape = list(entry.shape)
    shape[axis] = shape[axis] // layers * len(keep)
    return Entry(entry.dtype, tuple(shape), lambda: parts_of(entry.read(), axis, keep, layers))


def plain_entries(entries: dict, llm: LanguageModel, lora: Lora | None, merge: bool) -> tuple[dict, dict]:
    """Return (tensors under the plain model's own key names, adapter tensors under peft's names).

    merge: add the adapter into the weights, in float32, rounded once to their type; the second is then empty.
    """
    weights, adapter = {}, {}
    for key, entry in entries.items():
        if not key.startswith(llm.root) or key.endswith("rotary_emb.inv_freq"):
            continue
        key = key[len(llm.root) :]
        if ".lora_" in key:
            adapter["base_model.model." + LORA_PART.sub(r".\1.weight", key)] = entry
        else:
            weights[key.replace(".base_layer.", ".")] = entry
    if merge and lora:
        scale = lora.alpha / lora.r
        for key in [k for k in adapter if ".lora_A." in k]:
            target = key.removeprefix("base_model.model.").replace(".lora_A.", ".")
            a, b = adapter[key], adapter[key.replace(".lora_A.", ".lora_B.")]

            def add(w, a=a, b=b):
                return w.float() + scale * (b.read().float() @ a.read().float())

            weights[target] = derived(weights[target], add)
        adapter = {}
    return weights, adapter


def untied(weights: dict, config: dict) -> dict:
    """`weights` with tensors that lie in one memory once, where the model ties its embeddings anyway."""
    known = config_object(config)
    if known is None or not getattr(known, "tie_word_embeddings", False):
        return weights
    once = {}
    for key, entry in weights.items():
        once.setdefault(entry.memory or key, (key, entry))
    return dict(once.values())


def as_llama(config: dict) -> dict:
    """openPangu's remote class is a Llama with biases on the attention projections, and is written as such,
    so that no remote code is needed; any other config.json stays as it is."""
    if config.get("model_type") != "PanguEmbedded":
        return config
    return {k: v for k, v in config.items() if k not in ("auto_map", "bias")} | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": config.get("bias", True),
        "mlp_bias": False,
    }


def hf_config(config: dict, keep: list[int], unchecked: bool) -> dict:
    """config.json of the pruned model, whose layers were compared with those that they were."""
    config = as_llama(config)
    shorter = shorter_config(config, keep)
    if not read_back.check_layers(config, shorter, keep) and not unchecked:
        raise UserError(
            f"transformers does not know model_type {config.get('model_type')!r}, so that nothing can be "
            "compared; add --unchecked to write it all the same, and compare it yourself"
        )
    return shorter


def files_beside(source: Path, keep: list[int], follow) -> dict:
    """{name: content} of the files in the folder `source` that number layers, for the kept ones: a
    quantizer's own, whose names `follow` turns into the new ones, and how to generate."""
    rules = dict.fromkeys(QUANTIZATION_FILES, follow)
    rules["generation_config.json"] = partial(shorter_generation, keep=keep)
    there = {name: rule for name, rule in rules.items() if (source / name).is_file()}
    return {name: rule(read_json(source / name, dict)) for name, rule in there.items()}


def write_hf(folder: Path, parts: tuple, lora, files: dict, source: Path, follow, shard_bytes: int):
    """Write a folder that from_pretrained loads, whole or not at all; it is first loaded without its values.

    parts: of `plain_entries`; an adapter goes to adapter/, for peft. files: {name: content}, config.json of
    `hf_config` among them. source: the folder whose other files are copied: tokenizer, processor, chat
    template, code, licence. follow: of `check_folder`.
    """
    weights, adapter = parts
    dtypes = {str(e.dtype).removeprefix("torch.") for e in weights.values() if e.dtype.is_floating_point}
    config = files["config.json"]
    if len(dtypes) == 1:
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {
            "dtype": dtypes.pop()
        }
    with atomic_dir(folder) as temporary:
        write_shards(temporary, weights, shard_bytes)
        for name, content in {**files, "config.json": config}.items():
            (temporary / name).write_text(json.dumps(content, indent=1, ensure_ascii=False))
        copy_companions(source, temporary)
        read_back.check_folder(temporary, source, follow)
        if adapter:
            (temporary / "adapter").mkdir()
            write_safetensors(temporary / "adapter" / "adapter_model.safetensors", adapter)
            write_adapter_config(temporary / "adapter", lora)


def write_adapter_config(folder: Path, lora: Lora):
    """Write adapter_config.json as peft does, which carries the alpha of LoRA."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "target_modules": lora.target_modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "base_model_name_or_path": None,
    }
    atomic_json(folder / "adapter_config.json", config)


def result_names(tag: str, version: str) -> dict[str, str]:
    """The names of what one set of layers makes; llm_only and merged get an ending by their format."""
    return {
        "llm_only": f"llm_only_pruned_state_{tag}_{version}_cpu",
        "merged": f"pytorch_model_pruned_{tag}_merged_clean_{version}_cpu",
        "map": f"prune_layer_map_{tag}_{version}_cpu.json",
        "hf": f"hf_{tag}",
        "hf_adapter": f"hf_{tag}_adapter",
    }


def present_results(folder: Path, names: dict) -> list[Path]:
    """What lies in `folder` under names of `result_names`, in any format."""
    paths = [
        folder / f"{name}{end}" for name in sorted(names.values()) for end in ("", ".bin", ".safetensors")
    ]
    return [path for path in paths if path.exists()]


def write_merged(stem: Path, entries: dict, checkpoint: Checkpoint, lora, args):
    """Write tensors under upstream's name `stem`, in the format of the source or of --format."""
    form = checkpoint.format if args.format == "source" else args.format
    if form == "bin":
        write_bin(stem.with_name(stem.name + ".bin"), entries)
    elif len(checkpoint.files) == 1:
        write_safetensors(stem.with_name(stem.name + ".safetensors"), entries)
    else:
        with atomic_dir(stem) as temporary:
            write_shards(temporary, entries, int(args.max_shard_gb * 1e9))
        if lora:
            write_adapter_config(stem, lora)


def prune(checkpoint: Checkpoint, llm, lora, config, drop_layers, tag: str, args, source: Path) -> dict:
    """Write everything for one set of layers; returns the map."""
    # which tensors stay, and under which names
    entries, layer_id_map = prune_keys(switched_off(checkpoint.entries, llm, args), llm, drop_layers)
    if args.llm_dtype != "keep":
        dtype = getattr(torch, args.llm_dtype)
        entries = {k: cast(e, dtype) if k.startswith(llm.root) else e for k, e in entries.items()}
    names = result_names(tag, args.script_version)
    results = {what: args.out_dir / name for what, name in names.items()}

    # what an earlier run left under this tag, its map first: the new one would speak of files that this run
    # does not write
    for path in (results["map"], *present_results(args.out_dir, names)):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)

    # upstream's files
    if llm.root:
        own = {k: e for k, e in entries.items() if k.startswith(llm.root)}
        write_merged(results["llm_only"], own, checkpoint, lora, args)
        write_merged(results["merged"], entries, checkpoint, lora, args)
        if lora:
            write_adapter_config(args.out_dir, lora)
        settings = checkpoint.folder / "dia_config.json"  # sizes and thresholds of dia_pangu
        if settings.is_file():
            shutil.copyfile(settings, args.out_dir / settings.name)

    # folders for from_pretrained
    keep = [*layer_id_map.values()]
    follow = partial(quantized_names, keep=keep, count=llm.layers, ahead=llm.extra)
    for merge in hf_folders(args, llm):
        weights, adapter = plain_entries(entries, llm, lora, merge)
        parts = untied(weights, config), adapter
        files = {"config.json": config, **files_beside(source, keep, follow)}
        folder = results["hf" if merge else "hf_adapter"]
        write_hf(folder, parts, lora, files, source, follow, int(args.max_shard_gb * 1e9))

    # the map, which says that all is there
    changed = args.llm_dtype != "keep" or any(branches_off(args).values())
    values = "values as --llm-dtype and --off ask" if changed else "values untouched"
    report = {
        "tag": tag,
        "old_layers": llm.layers,
        "new_layers": len(layer_id_map),
        "drop_layers": list(drop_layers),
        "layer_id_map": {str(new): old for new, old in layer_id_map.items()},
        **{f"off_{part}": layers for part, layers in branches_off(args).items() if layers},
        "llm_layer_prefix": llm.prefix,
        "llm_layer_pattern": llm.pattern,
        "device": "cpu",
        "ckpt": str(args.ckpt),
        "lang_model_path": str(args.lang_model_path or source),
        "lora_target_modules": lora.target_modules if lora else [],
        "lora_r": lora.r if lora else None,
        "lora_alpha": lora.alpha if lora else None,
        "adapter_config_used": bool(lora and lora.from_adapter_config),
        "note": f"Keys renamed, {values}; layers that were removed leave nothing behind.",
        "script_version": args.script_version,
        "parameters_before": sum(e.numel for e in checkpoint.entries.values()),
        "parameters_after": sum(e.numel for e in entries.values()),
    }
    atomic_json(results["map"], report)
    return report


def hf_folders(args, llm) -> tuple:
    """Whether LoRA is merged, for each folder to write; a plain language model is always written as one."""
    return HF[args.hf] if llm.root else HF["merged"]


def wanted_sets(args) -> list[tuple[list[int], str]]:
    """Return (layers to drop, tag) of every model to write."""
    sets = [parse_drop_layers(spec) for spec in args.drop_layers]
    if args.plan:
        plan = read_json(args.plan, {"choices": [{"drop_layers": str}]})
        planned = f"{args.plan}: drop_layers"
        sets += [parse_drop_layers(choice["drop_layers"], planned) for choice in plan["choices"]]
        if not all(sets[len(args.drop_layers) :]) or not plan["choices"]:
            raise UserError(f"{args.plan}: a choice names no layers; make it anew with choose_layers.py")
    off = branches_off(args)
    switched = {layer for layers in off.values() for layer in layers}
    if switched and not sets:
        sets = [[]]
    elif not sets or not all(sets):
        raise UserError("--drop-layers is empty; name the layers to remove, such as 23-28")
    if both := sorted(switched & {layer for drop in sets for layer in drop}):
        raise UserError(f"layer {both[0]} is dropped; leave it out of --off-attention and --off-mlp")
    named = {}
    for tag, drop in zip(given_tags(args.tag, len(sets)) or own_tags(sets, off), sets):
        if named.setdefault(tag, drop) != drop:
            raise UserError(f"--tag {tag} names two sets; give each its own")
    return [(drop, tag) for tag, drop in named.items()]


def given_tags(tags: list[str], count: int) -> list[str]:
    """--tag, one for each of `count` sets, or none."""
    if tags and len(tags) != count:
        raise UserError(f"{len(tags)} --tag for {count} sets of layers; give one for each, or none")
    if bad := [tag for tag in tags if not re.fullmatch(r"[\w.-]+", tag)]:
        raise UserError(
            f"--tag {bad[0]!r}: use letters, digits, '_', '-' and '.' only, it becomes part of file names"
        )
    return tags


def own_tags(sets, off: dict) -> list[str]:
    """Upstream's name of each set of layers; where two share it, the second gets `plain_tag`."""
    end = "".join(f"_off{part}{plain_tag(some)[4:]}" for part, some in off.items() if some)
    tags, named = [], {}
    for drop in sets:
        first = named.setdefault(make_tag(drop), drop)
        tags.append((make_tag(drop) if first == drop else plain_tag(drop)) + end)
    return tags


def check_space(folder: Path, needed: int):
    """Raise UserError where the disk of `folder` has fewer than `needed` bytes free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; make room or "
            "choose another --out-dir"
        )


def check_results(args, checkpoint: Checkpoint, sets):
    """Refuse to write over results, or over the source."""
    tags = [tag for _, tag in sets]
    present = [
        path for tag in tags for path in present_results(args.out_dir, result_names(tag, args.script_version))
    ]
    if present and not args.overwrite:
        raise UserError(
            f"{args.out_dir} holds {present[0].name} already; add --overwrite or choose another --out-dir"
        )
    if args.out_dir.resolve() == checkpoint.folder.resolve():
        raise UserError(
            f"--out-dir {args.out_dir} is the source's own folder; choose another, so that the source stays "
            "as it is"
        )


def main(args):
    sets = wanted_sets(args)

    # what the checkpoint holds
    checkpoint = open_checkpoint(args.ckpt)
    source = args.lang_model_path or checkpoint.folder
    config = read_json(source / "config.json", dict) if (source / "config.json").is_file() else None
    llm = find_language_model(checkpoint.entries, args.layer_prefix, config)
    if config:
        check_config(source, config, llm)
    quantized = config is not None and unquantized(config) != config
    quantized = quantized or any((source / name).is_file() for name in QUANTIZATION_FILES)
    if quantized:
        refuse(args, ["llm_dtype", *(f"off_{part}" for part in BRANCHES)], "for a quantized model")
    if not llm.root:
        refuse(args, ["hf", "format"], "for a plain language model, whose result is always such a folder")
    if config is None and (args.lang_model_path or args.hf != "none" or not llm.root):
        raise UserError(
            f"{source}: no config.json there; name the language model's folder with --lang-model-path"
        )
    lora = known_lora(checkpoint, llm, args.lora_alpha)
    if quantized and lora and True in hf_folders(args, llm):
        raise UserError(
            f"{args.ckpt}: LoRA cannot be merged into quantized matrices; use --hf adapter or none"
        )

    # whatever could fail fails before anything is written
    if lora is None:
        refuse(args, ["lora_alpha", "lora_r", "lora_target_modules"], "for a checkpoint without LoRA")
    else:
        check_lora(args, lora.r, lora.target_modules)
    switched_off(checkpoint.entries, llm, args)
    for drop, _ in sets:
        check_drop(drop, llm.layers)
    check_results(args, checkpoint, sets)
    configs = {}
    for drop, tag in sets if hf_folders(args, llm) else ():
        configs[tag] = hf_config(config, [i for i in range(llm.layers) if i not in drop], args.unchecked)
    total = sum(e.nbytes for e in checkpoint.entries.values())
    copies = (2 if llm.root else 0) + len(hf_folders(args, llm))
    check_space(args.out_dir, int(copies * total * sum(1 - len(drop) / llm.layers for drop, _ in sets)))

    # one model after the other
    args.out_dir.mkdir(parents=True, exist_ok=True)
    about = f"; LoRA r {lora.r}, alpha {lora.alpha:g}, {', '.join(lora.target_modules)}" if lora else ""
    print(
        f"{args.ckpt}: {llm.layers} layers under {llm.prefix}, {len(checkpoint.entries)} tensors, "
        f"{total / 1e9:.3f} GB{about}"
    )
    for drop, tag in sets:
        report = prune(checkpoint, llm, lora, configs.get(tag), drop, tag, args, source)
        before, after = report["parameters_before"], report["parameters_after"]
        folder = args.out_dir if llm.root else args.out_dir / f"hf_{tag}"
        print(
            f"{tag}: layers {llm.layers} -> {report['new_layers']}, values {before:,} -> {after:,} "
            f"({1 - after / before:.1%} removed), in {folder}"
        )


if __name__ == "__main__":
    run(main, parse_args())
