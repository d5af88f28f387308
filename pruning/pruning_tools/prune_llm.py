"""Remove decoder layers from a checkpoint on disk (upstream: prune_llm_only_and_merge_{CN,EN}_cli.py with
msmodelslim).

    python pruning/pruning_tools/prune_llm.py --ckpt runs/dia_pangu/ft --lang-model-path path/to/llm --out-dir pruned --drop-layers 23-28

Removing layers is renaming keys, so no model is built and no value changes: dtype, tied embeddings and LoRA
weights stay as they are, and the LoRA alpha, which decides how strongly they act, is carried along (upstream
guessed it, halved it and rounded to float16). The source is never modified. From a checkpoint that holds more
than a language model, it writes

    llm_only_pruned_state_{tag}_{version}_cpu.bin              the language model's tensors
    pytorch_model_pruned_{tag}_merged_clean_{version}_cpu.bin  all tensors (.safetensors, or a folder of shards, if the source is so)
    prune_layer_map_{tag}_{version}_cpu.json                   what was removed, with upstream's fields
    adapter_config.json                                        LoRA rank, alpha and targets
    hf_{tag}/                                                  with --hf: a folder that from_pretrained loads

and from a plain language model the map and hf_{tag}/.
"""

import argparse
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # repository root: every way of starting this file finds it
from common.checkpoint import atomic_dir, atomic_write
from common.errors import UserError, run
from common.files import check, read_json
from pruning.layers import ATTENTION, check_drop, config_key, shorter_config
from pruning.pruning_tools.shards import (
    Checkpoint,
    cast,
    derived,
    open_checkpoint,
    write_bin,
    write_safetensors,
    write_shards,
)

VERSIONS = ("v0112_en", "CN")
ENDINGS = (".bin", ".safetensors", ".json")
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "generation_config.json",
    "chat_template*",
)


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--ckpt",
        type=Path,
        required=True,
        help=".bin, .pth, .safetensors, or a folder (one file or shards with an index)",
    )
    p.add_argument(
        "--lang-model-path",
        type=Path,
        help="folder with the language model's config.json and tokenizer; default the checkpoint's folder",
    )
    p.add_argument("--out-dir", type=Path, required=True)
    p.add_argument(
        "--drop-layers",
        action="append",
        default=[],
        metavar="SPEC",
        help='layers to remove, such as 23-28 or "0-2,5,7-9"; repeat for several models',
    )
    p.add_argument("--plan", type=Path, help="json of choose_layers.py: prune every set in it")
    p.add_argument(
        "--tag",
        action="append",
        default=[],
        help="name of the result, once for each --drop-layers; default drop<first>_<last> or drop<ids>",
    )
    p.add_argument(
        "--lora-alpha",
        type=float,
        help="LoRA alpha, when no adapter_config.json stands beside the checkpoint",
    )
    p.add_argument("--lora-r", type=int, help="only checked against the checkpoint, which knows its rank")
    p.add_argument("--lora-target-modules", help="comma separated; only checked against the checkpoint")
    p.add_argument(
        "--layer-prefix", help="keys before the layer number, if the checkpoint holds several decoders"
    )
    p.add_argument(
        "--hf",
        choices=("none", "merged", "adapter", "both"),
        default="none",
        help="for a checkpoint with more than a language model: also write it as a folder for "
        "from_pretrained, LoRA "
        "merged "
        "into the weights, as a peft folder adapter/ beside them, or both folders (default none)",
    )
    p.add_argument(
        "--llm-dtype",
        choices=("keep", "float32", "float16", "bfloat16"),
        default="keep",
        help="type of the language model's tensors (upstream: float16)",
    )
    p.add_argument(
        "--format",
        choices=("source", "bin", "safetensors"),
        default="source",
        help="of the merged file; default as the source",
    )
    p.add_argument("--max-shard-gb", type=float, default=5.0, help="largest shard, 10^9 bytes (default 5)")
    p.add_argument(
        "--script-version", choices=VERSIONS, default=VERSIONS[0], help="part of upstream's file names"
    )
    p.add_argument("--overwrite", action="store_true", help="replace results of the same tag")
    return p.parse_args(argv)


# ------------------------------------------------------------------------------------------------ which
# layers


def parse_drop_layers(spec: str) -> list[int]:
    """Sorted unique layer ids of a list such as "23-28" or "0-2, 5 7-9" (separated by commas or blanks);
    ranges ascend."""
    layers = set()
    for part in re.split(r"[,\s]+", spec.strip()):
        if not part:
            continue
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise UserError(
                f"--drop-layers {spec!r}: {part!r} is neither a layer number nor a range such as 23-28"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise UserError(f"--drop-layers {spec!r}: the range {part} descends; write {last}-{first}")
        if last >= 100_000:  # a slip of the keyboard should not fill the memory
            raise UserError(f"--drop-layers {spec!r}: no model has a layer {last}")
        layers.update(range(first, last + 1))
    return sorted(layers)


def make_tag(drop_layers: list[int]) -> str:
    """Upstream's name of a drop set: drop23_28 when contiguous, drop0_2_5 otherwise, dropNone when empty."""
    if not drop_layers:
        return "dropNone"
    first, last = drop_layers[0], drop_layers[-1]
    return (
        f"drop{first}_{last}"
        if last - first + 1 == len(drop_layers)
        else "drop" + "_".join(map(str, drop_layers))
    )


def plain_tag(drop_layers: list[int]) -> str:
    """A name that only one set has: drop5to7 and drop5_7, which upstream both calls drop5_7."""
    return "drop" + spec_of(drop_layers).replace("-", "to").replace(",", "_")


def spec_of(drop_layers: list[int]) -> str:
    """The shortest --drop-layers text of a set: [1, 2, 3, 5] -> "1-3,5"."""
    runs = []
    for layer in sorted(drop_layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in runs)


# ------------------------------------------------------------------------------------------------ what the
# checkpoint holds


@dataclass
class Lora:
    r: int
    alpha: float | None
    target_modules: list
    from_adapter_config: bool


@dataclass
class LanguageModel:
    """Where a checkpoint keeps its decoder. prefix: before the layer number. root: before the plain model's
    own keys."""

    prefix: str
    root: str
    layers: int

    @property
    def pattern(self) -> str:
        return re.escape(self.prefix) + r"(\d+)\."


def find_language_model(keys, prefix: str | None = None) -> LanguageModel:
    """Find the decoder layers among checkpoint keys; other parts (vision encoder, Perceiver) have .layers.
    too and are left alone."""
    attention = re.compile(rf"(.*?\.?(?:layers|h|blocks)\.)(\d+)\.(?:{'|'.join(ATTENTION)})\.")
    found = {}
    for key in keys:
        if match := attention.match(key):
            found.setdefault(match[1], set()).add(int(match[2]))
    language = [
        p for p in found if p.startswith(("lang_model.", "language_model.")) or ".language_model." in p
    ]
    others = [p for p in found if not re.search("vision|visual|audio|perceiver|encoder", p)]
    candidates = [prefix] if prefix else language or others
    candidates = [p for p in candidates if p in found]
    if not candidates:
        raise UserError(
            "the checkpoint holds no decoder layers (keys such as model.layers.0.self_attn.q_proj.weight)"
            + (f" under --layer-prefix {prefix}; it has {', '.join(found) or 'none'}" if prefix else "")
        )
    if len(candidates) > 1:
        raise UserError(
            f"the checkpoint holds several decoders; choose one with --layer-prefix: {', '.join(candidates)}"
        )
    prefix = candidates[0]
    missing = sorted(set(range(max(found[prefix]) + 1)) - found[prefix])
    if missing:
        raise UserError(f"layer {missing[0]} is missing under {prefix}; the checkpoint is not whole")
    root = (
        prefix.removesuffix("model.layers.")
        if prefix.startswith(("lang_model.", "base_model.model."))
        else ""
    )
    return LanguageModel(prefix, root, len(found[prefix]))


def find_lora(checkpoint: Checkpoint, llm: LanguageModel, alpha: float | None) -> Lora | None:
    """LoRA of the decoder: targets and rank from the keys, alpha from adapter_config.json beside them or from
    `alpha`.

    Returns None for a checkpoint without LoRA. Its alpha stays None when it is not known. UserError if ranks
    differ or if the two sources of alpha contradict each other.
    """
    ranks = {}
    for key, entry in checkpoint.entries.items():
        if match := re.match(llm.pattern + r"(?:.*\.)?(\w+)\.lora_A\.", key):
            ranks.setdefault(match[2], set()).add(entry.shape[0])
    if not ranks:
        return None
    rank, *more = set.union(*ranks.values())
    if more:
        raise UserError(f"{checkpoint.path}: LoRA ranks differ ({ranks}); one rank for all layers is needed")
    path = checkpoint.folder / "adapter_config.json"
    stored = None
    if path.is_file():
        stored = read_json(path, {"lora_alpha": float})["lora_alpha"]
        if alpha is not None and alpha != stored:
            raise UserError(f"{path} says lora_alpha {stored}, --lora-alpha says {alpha:g}; they must agree")
    return Lora(rank, alpha if stored is None else stored, sorted(ranks), stored is not None)


def read_config(folder: Path, llm: LanguageModel) -> dict | None:
    """The language model's config.json, checked against the checkpoint; None if the folder has none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    config = read_json(path, dict)
    count = config.get(config_key(config, "num_hidden_layers"))
    if count is not None and count != llm.layers:
        raise UserError(
            f"{path}: num_hidden_layers is {count}, the checkpoint holds {llm.layers} layers; this config is "
            "of "
            f"another model"
        )
    return config


def read_map(path) -> dict:
    """The prune map that upstream's tool or ours wrote: which old layer each new layer was."""
    fields = {"new_layers": int, "layer_id_map": dict, "old_layers?": int, "lora_alpha?": float, "tag?": str}
    prune_map = read_json(path, fields)
    every = {str(new): int for new in range(prune_map["new_layers"])}
    check(prune_map["layer_id_map"], every, path, "layer_id_map")
    return prune_map


# ------------------------------------------------------------------------------------------------ pruning


def prune_keys(entries: dict, llm: LanguageModel, drop_layers) -> tuple[dict, dict]:
    """({key: Entry} without the dropped layers and with the rest renumbered, {new: old} layer ids)."""
    drop = check_drop(drop_layers, llm.layers)
    layer_id_map = dict(enumerate(i for i in range(llm.layers) if i not in drop))
    new_of = {old: new for new, old in layer_id_map.items()}
    kept = {}
    for key, entry in entries.items():
        match = re.match(llm.pattern, key)
        if match is None:
            kept[key] = entry
        elif int(match[1]) in new_of:
            kept[f"{llm.prefix}{new_of[int(match[1])]}{key[match.end(1) :]}"] = entry
    return kept, layer_id_map


def plain_entries(entries: dict, llm: LanguageModel, lora: Lora | None, merge: bool) -> tuple[dict, dict]:
    """(tensors under the plain model's own key names, adapter tensors under peft's names); with `merge` the
    adapter is added into the weights, in float32, and rounded once to their type."""
    weights, adapter = {}, {}
    for key, entry in entries.items():
        if not key.startswith(llm.root) or key.endswith("rotary_emb.inv_freq"):
            continue
        key = key[len(llm.root) :]
        if ".lora_" in key:
            adapter["base_model.model." + key.replace(".default.", ".")] = entry
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


def hf_config(config: dict, layer_id_map: dict, weights: dict) -> dict:
    """config.json of the pruned model. openPangu's remote class is a Llama with biases on the attention
    projections, and is written as such, so that no remote code is needed."""
    config = shorter_config(config, list(layer_id_map.values()))
    if config.get("model_type") == "PanguEmbedded":
        config = {k: v for k, v in config.items() if k not in ("auto_map", "bias")} | {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": config.get("bias", True),
            "mlp_bias": False,
        }
    dtypes = {str(e.dtype).removeprefix("torch.") for e in weights.values() if e.dtype.is_floating_point}
    if len(dtypes) == 1:
        config.pop("torch_dtype", None)
        config["dtype"] = dtypes.pop()
    return config


def write_hf(
    folder: Path,
    entries: dict,
    llm,
    lora,
    config: dict,
    source: Path,
    layer_id_map: dict,
    merge: bool,
    shard_bytes: int,
):
    weights, adapter = plain_entries(entries, llm, lora, merge)
    with atomic_dir(folder) as temporary:
        write_shards(temporary, weights, shard_bytes)
        (temporary / "config.json").write_text(
            json.dumps(hf_config(config, layer_id_map, weights), indent=1, ensure_ascii=False)
        )
        for pattern in TOKENIZER_FILES:
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, temporary / file.name)
        if adapter:
            (temporary / "adapter").mkdir()
            write_safetensors(temporary / "adapter" / "adapter_model.safetensors", adapter)
            write_adapter_config(temporary / "adapter", lora)


def write_adapter_config(folder: Path, lora: Lora):
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
    atomic_write(folder / "adapter_config.json", json.dumps(config, indent=1))


def result_names(tag: str, version: str) -> list[str]:
    """What one drop set makes: upstream's names, without ending, of the language model's tensors, of all
    tensors and of the map; then our two folders."""
    return [
        f"llm_only_pruned_state_{tag}_{version}_cpu",
        f"pytorch_model_pruned_{tag}_merged_clean_{version}_cpu",
        f"prune_layer_map_{tag}_{version}_cpu",
        f"hf_{tag}",
        f"hf_{tag}_adapter",
    ]


def prune(checkpoint: Checkpoint, llm, lora, config, drop_layers, tag: str, args, source: Path) -> dict:
    """Write everything for one drop set; returns the map."""
    entries, layer_id_map = prune_keys(checkpoint.entries, llm, drop_layers)
    if args.llm_dtype != "keep":
        dtype = getattr(torch, args.llm_dtype)
        entries = {k: cast(e, dtype) if k.startswith(llm.root) else e for k, e in entries.items()}
    llm_only, merged, map_name, hf_merged, hf_adapter = (
        args.out_dir / name for name in result_names(tag, args.script_version)
    )
    out, shard_bytes = args.out_dir, int(args.max_shard_gb * 1e9)
    form = checkpoint.format if args.format == "source" else args.format
    if llm.root:
        for stem, part in (
            (llm_only, {k: e for k, e in entries.items() if k.startswith(llm.root)}),
            (merged, entries),
        ):
            if form == "bin":
                write_bin(stem.with_name(stem.name + ".bin"), part)
            elif len(checkpoint.files) == 1:
                write_safetensors(stem.with_name(stem.name + ".safetensors"), part)
            else:
                with atomic_dir(stem) as temporary:
                    write_shards(temporary, part, shard_bytes)
                if lora:
                    write_adapter_config(stem, lora)
        if lora:
            write_adapter_config(out, lora)
        if (checkpoint.folder / "dia_config.json").is_file():  # sizes and thresholds of dia_pangu
            shutil.copyfile(checkpoint.folder / "dia_config.json", out / "dia_config.json")
    for merge in {"none": (), "merged": (True,), "adapter": (False,), "both": (True, False)}[
        args.hf if llm.root else "merged"
    ]:
        write_hf(
            hf_merged if merge else hf_adapter,
            entries,
            llm,
            lora,
            config,
            source,
            layer_id_map,
            merge,
            shard_bytes,
        )
    report = {
        "tag": tag,
        "old_layers": llm.layers,
        "new_layers": len(layer_id_map),
        "drop_layers": list(drop_layers),
        "layer_id_map": {str(new): old for new, old in layer_id_map.items()},
        "llm_layer_prefix": llm.prefix,
        "llm_layer_pattern": llm.pattern,
        "device": "cpu",
        "ckpt": str(args.ckpt),
        "lang_model_path": str(args.lang_model_path or source),
        "lora_target_modules": lora.target_modules if lora else [],
        "lora_r": lora.r if lora else None,
        "lora_alpha": lora.alpha if lora else None,
        "adapter_config_used": bool(lora and lora.from_adapter_config),
        "note": "Keys renamed, values untouched; layers that were removed leave nothing behind.",
        "script_version": args.script_version,
        "parameters_before": sum(e.numel for e in checkpoint.entries.values()),
        "parameters_after": sum(e.numel for e in entries.values()),
    }
    atomic_write(
        map_name.with_name(map_name.name + ".json"), json.dumps(report, indent=2, ensure_ascii=False)
    )
    return report


def wanted_sets(args) -> list[tuple[list[int], str]]:
    """(drop layers, tag) of every model to write."""
    sets = [parse_drop_layers(spec) for spec in args.drop_layers]
    if args.plan:
        plan = read_json(args.plan, {"choices": [{"drop_layers": str}]})
        sets += [parse_drop_layers(choice["drop_layers"]) for choice in plan["choices"]]
    if not sets or not all(sets):
        raise UserError("--drop-layers is empty; name the layers to remove, such as 23-28")
    if args.tag and len(args.tag) != len(sets):
        raise UserError(f"{len(args.tag)} --tag for {len(sets)} sets of layers; give one for each, or none")
    if bad := [tag for tag in args.tag if not re.fullmatch(r"[\w.-]+", tag)]:
        raise UserError(
            f"--tag {bad[0]!r}: use letters, digits, '_', '-' and '.' only, it becomes part of file names"
        )
    named = {}
    for i, drop in enumerate(sets):
        tag = args.tag[i] if args.tag else make_tag(drop)
        if named.get(tag, drop) != drop:
            if args.tag:
                raise UserError(f"--tag {tag} names two sets; give each its own")
            tag = plain_tag(drop)
        named[tag] = drop
    return [(drop, tag) for tag, drop in named.items()]


def check_space(folder: Path, needed: int):
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; make room or "
            "choose "
            f"another --out-dir"
        )


def main(args):
    sets = wanted_sets(args)
    checkpoint = open_checkpoint(args.ckpt)
    llm = find_language_model(checkpoint.entries, args.layer_prefix)
    source = args.lang_model_path or checkpoint.folder
    config = read_config(source, llm)
    if config is None and (args.lang_model_path or args.hf != "none" or not llm.root):
        raise UserError(
            f"{source}: no config.json there; name the language model's folder with --lang-model-path"
        )
    lora = find_lora(checkpoint, llm, args.lora_alpha)
    if lora and lora.alpha is None:
        raise UserError(
            f"{args.ckpt} holds LoRA weights of rank {lora.r} but no adapter_config.json says their alpha; "
            "pass "
            "--lora-alpha (Dia-Pangu was trained with 16)"
        )
    if lora and args.lora_r not in (None, lora.r):
        raise UserError(f"--lora-r {args.lora_r}: the checkpoint has rank {lora.r}")
    if (
        lora
        and args.lora_target_modules
        and sorted(args.lora_target_modules.split(",")) != lora.target_modules
    ):
        raise UserError(
            f"--lora-target-modules {args.lora_target_modules}: the checkpoint has "
            f"{','.join(lora.target_modules)}"
        )
    for drop, _ in sets:
        check_drop(drop, llm.layers)
    names = {
        name + end
        for _, tag in sets
        for name in result_names(tag, args.script_version)
        for end in ("", *ENDINGS)
    }
    present = sorted(name for name in names if (args.out_dir / name).exists())
    if present and not args.overwrite:
        raise UserError(
            f"{args.out_dir} holds {present[0]} already; add --overwrite or choose another --out-dir"
        )
    if args.out_dir.resolve() == checkpoint.folder.resolve():
        raise UserError(
            f"--out-dir {args.out_dir} is the source's own folder; choose another, so that the source stays "
            "as it is"
        )
    total = sum(e.nbytes for e in checkpoint.entries.values())
    copies = (2 if llm.root else 0) + {"none": 0, "merged": 1, "adapter": 1, "both": 2}[
        args.hf if llm.root else "merged"
    ]
    check_space(args.out_dir, int(copies * total * sum(1 - len(drop) / llm.layers for drop, _ in sets)))
    args.out_dir.mkdir(parents=True, exist_ok=True)
    print(
        f"{args.ckpt}: {llm.layers} layers under {llm.prefix}, {len(checkpoint.entries)} tensors, "
        f"{total / 1e9:.3f} GB"
        + (f"; LoRA r {lora.r}, alpha {lora.alpha:g}, {', '.join(lora.target_modules)}" if lora else "")
    )
    for drop, tag in sets:
        report = prune(checkpoint, llm, lora, config, drop, tag, args, source)
        share = 1 - report["parameters_after"] / report["parameters_before"]
        print(
            f"{tag}: layers {llm.layers} -> {report['new_layers']}, values {report['parameters_before']:,} "
            "-> "
            f"{report['parameters_after']:,} ({share:.1%} removed), in {args.out_dir}"
            + ("" if llm.root else f"/hf_{tag}")
        )


if __name__ == "__main__":
    run(main, parse_args())
