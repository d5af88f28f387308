"""The language model in a checkpoint: where its decoder lies, its LoRA, and the map of what was pruned."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import check, read_json
from pruning.layers import MARKS, decoder_paths
from pruning.pruning_tools.shards import Checkpoint
from pruning.shorter import OTHER_LAYERS, layer_count, prediction_layers

# What belongs to a model in a folder beside its weights: tokenizer, processor, templates, code, terms.
COMPANIONS = ("*.json", "*.py", "*.txt", "*.md", "*.jinja", "tokenizer*", "*.model", "*.tiktoken", "*.spm")
COMPANIONS += ("*.vocab", "*.bpe", "LICEN[CS]E*", "NOTICE*")
TEMPLATES = "additional_chat_templates"  # the one folder that belongs to a tokenizer
# Of these, what is written anew or belongs to a run.
OWN = (
    "config.json",
    "adapter_config.json",
    "dia_config.json",
    "prune_width.json",
    "timing.json",
    "metrics.json",
    "params.json",  # of consolidated weights, which are not taken along
)

# Fields of adapter_config.json under which a LoRA adds something else than alpha / r times B A.
OTHER_STRENGTHS = ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "fan_in_fan_out", "lora_bias")
OTHER_STRENGTHS += ("layer_replication",)
LORA_PART = re.compile(r"\.(lora_[AB])(?:\.(\w+))?\.weight$")  # and the adapter's name, if there is one


@dataclass
class Lora:
    """Settings of a checkpoint's LoRA; alpha is None where nothing says it."""

    r: int
    alpha: float | None
    target_modules: list
    from_adapter_config: bool

    def settings(self, dropout: float) -> dict:
        """These in the words of dia_config.json."""
        return {"r": self.r, "alpha": self.alpha, "dropout": dropout, "targets": self.target_modules}


@dataclass
class LanguageModel:
    """Where a checkpoint keeps its decoder.

    prefix: what stands before the layer number. root: what stands before the plain model's own keys. layers:
    how many there are. extra: layers behind them, which predict further tokens.
    """

    prefix: str
    root: str
    layers: int
    extra: int = 0

    @property
    def pattern(self) -> str:
        return re.escape(self.prefix) + r"(\d+)\."


def find_language_model(keys, prefix: str | None = None, config: dict | None = None) -> LanguageModel:
    """Find the decoder layers among a checkpoint's keys, or those under `prefix`.

    Other parts, such as a vision encoder or a Perceiver, have `.layers.` too and are left alone. config: the
    decoder's config.json, which says how many there are. UserError where there is no decoder, or more than
    one, or one with a gap.
    """
    # numbered layers; those of a decoder have attention, or what stands in its place
    numbered = re.compile(r"((?:.*?\.)?(?:layers?|h|blocks)\.)(\d+)\.(\w+)")
    found, mixed = {}, set()
    for match in filter(None, map(numbered.match, keys)):
        found.setdefault(match[1], set()).add(int(match[2]))
        if match[3] in MARKS:
            mixed.add(match[1])
    found = {name: ids for name, ids in found.items() if name in mixed}

    # of these the language model's
    candidates = [p for p in (prefix,) if p in found] if prefix else decoder_paths(found)
    if not (prefix or config):  # nothing says that it is more than a tower
        candidates = [p for p in candidates if not OTHER_LAYERS.search(p)]
    count, ahead = (layer_count(config), prediction_layers(config)) if config else (None, 0)
    if len(candidates) > 1 and not prefix:  # a tower of pictures is rarely as high
        candidates = [p for p in candidates if len(found[p]) in (count, (count or 0) + ahead)] or candidates
    if not candidates:
        raise UserError(
            "the checkpoint holds no decoder layers (keys such as model.layers.0.self_attn.q_proj.weight)"
            + (f" under --layer-prefix {prefix}; it has {', '.join(found) or 'none'}" if prefix else "")
        )
    if len(candidates) > 1:
        raise UserError(
            f"the checkpoint holds several decoders; choose one with --layer-prefix: {', '.join(candidates)}"
        )

    # whole, and where the plain model's own keys begin
    prefix = candidates[0]
    missing = sorted(set(range(max(found[prefix]) + 1)) - found[prefix])
    if missing:
        raise UserError(f"layer {missing[0]} is missing under {prefix}; the checkpoint is not whole")
    inner = prefix.startswith(("lang_model.", "base_model.model."))
    root = prefix.removesuffix("model.layers.") if inner else ""
    held = len(found[prefix])
    extra = held - count if count is not None and count < held <= count + ahead else 0
    return LanguageModel(prefix, root, held - extra, extra)


def find_lora(checkpoint: Checkpoint, llm: LanguageModel, alpha: float | None) -> Lora | None:
    """LoRA of the decoder, None for a checkpoint without.

    Targets and rank come from the keys, alpha from adapter_config.json beside the checkpoint or from `alpha`.
    UserError if ranks differ or if the two sources of alpha contradict each other.
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
        settings = read_json(path, {"lora_alpha": float})
        stored = settings["lora_alpha"]
        if odd := [name for name in OTHER_STRENGTHS if settings.get(name)]:
            raise UserError(
                f"{path}: {odd[0]} is {settings[odd[0]]}; only LoRA of one strength, alpha / r, on linear "
                "modules can be carried along: merge this one with peft's merge_and_unload first"
            )
        if alpha is not None and alpha != stored:
            raise UserError(f"{path} says lora_alpha {stored}, --lora-alpha says {alpha:g}; they must agree")
    return Lora(rank, alpha if stored is None else stored, sorted(ranks), stored is not None)


def check_adapter(checkpoint: Checkpoint, llm: LanguageModel):
    """UserError for an adapter that would be lost: one beside the model, without it, or of other parts."""
    adapted = [key for key in checkpoint.entries if key.startswith(llm.root) and ".lora_" in key]
    parts = {key: LORA_PART.search(key) for key in adapted}
    names = {part[2] or "default" for part in parts.values() if part}
    beside = [f for place in ("", "adapter/") for f in checkpoint.folder.glob(f"{place}adapter_model.*")]
    why = None
    if odd := [key for key, part in parts.items() if part is None]:
        why = f"{odd[0]} is no matrix of LoRA on a linear module"
    elif len(names) > 1:
        why = f"holds several adapters, {' and '.join(sorted(names))}"
    elif adapted and not any(re.match(llm.pattern, k) and k not in parts for k in checkpoint.entries):
        why = "holds an adapter without the model"
    elif checkpoint.path.is_dir() and not adapted and beside:
        why = f"{beside[0].relative_to(checkpoint.folder)} is an adapter beside the model, and would be lost"
    if why:
        raise UserError(f"{checkpoint.path}: {why}; merge it with peft's merge_and_unload first")


def known_lora(checkpoint: Checkpoint, llm: LanguageModel, alpha: float | None) -> Lora | None:
    """`find_lora`; UserError for a LoRA whose alpha nothing says, and by `check_adapter`."""
    check_adapter(checkpoint, llm)
    lora = find_lora(checkpoint, llm, alpha)
    if lora and lora.alpha is None:
        raise UserError(
            f"{checkpoint.path} holds LoRA weights of rank {lora.r} and no adapter_config.json says their "
            "alpha; pass --lora-alpha (Dia-Pangu was trained with 16)"
        )
    return lora


def check_lora(args, r: int, targets: list[str]):
    """Refuse --lora-r and --lora-target-modules that contradict the LoRA of the checkpoint."""
    if "lora_r" in args._given and args.lora_r != r:
        raise UserError(f"--lora-r {args.lora_r}: the checkpoint's LoRA has rank {r}")
    if args.lora_target_modules and sorted(args.lora_target_modules.split(",")) != sorted(targets):
        raise UserError(
            f"--lora-target-modules {args.lora_target_modules}: the checkpoint's LoRA has {','.join(targets)}"
        )


def check_config(folder: Path, config: dict, llm: LanguageModel):
    """UserError unless the configuration counts the layers that the checkpoint holds."""
    count = layer_count(config)
    if count is not None and count != llm.layers:
        raise UserError(
            f"{folder / 'config.json'}: num_hidden_layers is {count}, the checkpoint holds {llm.layers} "
            "layers; this config is of another model"
        )


def read_map(path) -> dict:
    """The prune map that upstream's tool or ours wrote: which old layer each new layer was."""
    fields = {"new_layers": int, "layer_id_map": dict, "old_layers?": int, "lora_alpha?": float, "tag?": str}
    prune_map = read_json(path, fields)
    every = {str(new): int for new in range(prune_map["new_layers"])}
    check(prune_map["layer_id_map"], every, path, "layer_id_map")
    return prune_map


def copy_companions(source: Path, folder: Path):
    """Copy what belongs to the model in the folder `source` beside its weights and `folder` does not hold."""
    files = {file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file()}
    for file in files:
        made_anew = file.name in OWN or file.name.endswith(".index.json")
        if not made_anew and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, folder / TEMPLATES, dirs_exist_ok=True)
