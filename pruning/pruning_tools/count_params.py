"""Values, FLOPs per token and KV-cache of a checkpoint, without loading it; two checkpoints side by side.

python pruning/pruning_tools/count_params.py path/to/model --compare path/to/pruned --config path/to/llm
"""

import re
import sys
from collections import Counter
from pathlib import Path

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.arguments import Parser, number
from common.errors import UserError, run
from common.files import read_json
from pruning.pruning_tools.language_model import find_language_model
from pruning.pruning_tools.shards import open_checkpoint
from pruning.shorter import CHOSEN, EXPERTS, config_head_counts, config_object, layer_count, text_part

# One matrix each for keys, values and output, whose shapes say more than config.json: heads of another
# width in some layers, values narrower than keys, keys that are the values too.
OWN = re.compile(r"\b(k_proj|v_proj|o_proj|out_proj|dense)\.(?:base_layer\.)?weight$")
# What makes the keys of an attention, under the names that decoders give it.
KEYS = re.compile(r"\b(k_proj|self\.key|q?kv_proj|qkv|c_attn|query_key_value|kv_a_proj\w*|Wqkv|wkv|W_pack)\b")


def parse_args(argv=None):
    p, count = Parser(__doc__), number(int, 1)
    p.add_argument("path", type=Path, help=".bin, .pth, .safetensors or a folder of shards")
    p.add_argument("--compare", type=Path, help="a second checkpoint, the pruned one, for a table of both")
    p.add_argument(
        "--config",
        type=Path,
        help="folder of the language model's config.json; left out, or of another number of layers: the "
        "checkpoint's own",
    )
    p.add_argument("--include", help="count only keys that contain this text")
    p.add_argument("--exclude", help="leave out keys that contain this text")
    p.add_argument(
        "--group-depth", type=count, default=2, help="leading parts of a key, up to a dot, that make a group"
    )
    p.add_argument("--topk", type=count, default=30, help="largest groups to list")
    p.add_argument(
        "--check-layer-range",
        metavar="REGEX",
        help=r"report keys that match, such as 'layers\.(2[89]|3\d)\.'",
    )
    p.add_argument("--context", type=count, default=2048, help="tokens in the KV-cache that is reported")
    return p.parse_args(argv)


def head_values(entries: dict, llm, vocabulary) -> int:
    """Values of the output head, or of the table of words that it is tied to; 0 where neither is found."""
    tables = {
        key: entry.numel
        for key, entry in entries.items()
        if key.startswith(llm.root) and not key.startswith(llm.prefix) and entry.shape[:1] == (vocabulary,)
    }
    heads = [key for key in tables if re.search(r"head|embed_out|output|decoder\.weight", key)]
    words = [key for key in tables if re.search("embed|wte", key) and "per_layer" not in key]
    return max((tables[key] for key in heads or words), default=0)


def layer_cost(config: dict, entries: dict, llm, context: int) -> dict:
    """Numbers of the decoder, from its config.json and the checkpoint's entries.

    FLOPs per token: two for each value of a matrix that a token passes (layers and output head; of the
    experts those that a token is sent to), plus attention over `context` tokens. KV-cache: what must be kept
    of `context` tokens in the weights' type: keys and values, or the latent vector that stands for both.
    """
    text = effective(config)
    inside = {k: e for k, e in entries.items() if re.match(llm.pattern, k) and ".lora_" not in k}
    matrices, attending = head_values(entries, llm, text.get("vocab_size")), set()
    experts, share = active_experts(text)
    for key, entry in inside.items():
        layer, name = re.match(llm.pattern + "(.*)", key).groups()
        if KEYS.search(name) and not name.startswith("linear_attn."):
            attending.add(int(layer))
        if len(entry.shape) in (2, 3) and not key.endswith("bias"):
            stacked = len(entry.shape) == 3 and entry.shape[0] == experts
            matrices += entry.numel * (share if stacked or ".experts." in key else 1)
    spans = attended(text, attending, llm.layers, context)
    itemsize = next(iter(inside.values())).dtype.itemsize
    widths = [
        per_token(config, text, inside, f"{llm.prefix}{i}.") if spans[i] else (0, 0)
        for i in range(llm.layers)
    ]
    own = llm.layers - (text.get("num_kv_shared_layers") or 0)  # the others read these layers' keys
    scores = sum(span * products for span, (products, _) in zip(spans, widths))
    cache = sum(span * kept for span, (_, kept) in zip(spans[:own], widths))
    return {
        "layers": llm.layers,
        "decoder layers, values": sum(e.numel for e in inside.values()),
        f"FLOPs per token at {context} tokens": round(2 * matrices) + 2 * scores,
        f"KV-cache of {context} tokens, bytes": cache * itemsize,
    }


def effective(config: dict) -> dict:
    """The decoder's fields with the defaults of its class, where transformers knows it."""
    known = config_object(config)
    own = {k: v for k, v in text_part(config).items() if v is not None}
    return {**(known.get_text_config(decoder=True).to_dict() if known else {}), **own}


def active_experts(text: dict) -> tuple:
    """(experts of a layer, None without; the share of them that one token is sent to)."""
    text = {**text, **(text.get("ffn_config") or {})}  # DBRX keeps them apart
    first = {name: value[0] if isinstance(value, list) and value else value for name, value in text.items()}
    chosen = next((first[n] for n in (*CHOSEN, "top_k") if isinstance(first.get(n), int)), None)
    experts = next((first[n] for n in EXPERTS if isinstance(first.get(n), int)), None)
    return experts, min(1.0, chosen / experts) if chosen and experts else 1.0


def attended(text: dict, attending: set, layers: int, context: int) -> list[int]:
    """How many of `context` tokens each layer attends to and keeps: none where it makes no keys."""
    kinds = text.get("layer_types")
    kinds = kinds if isinstance(kinds, list) and len(kinds) == layers else ["full_attention"] * layers
    windows = {"sliding": text.get("sliding_window"), "chunked": text.get("attention_chunk_size")}
    spans = []
    for layer, kind in enumerate(map(str, kinds)):
        if layer not in attending or "linear" in kind or kind in ("mamba", "conv", "recurrent"):
            spans.append(0)
        else:
            size = next((size for word, size in windows.items() if word in kind), None)
            spans.append(min(size or context, context))
    return spans


def per_token(config: dict, text: dict, entries: dict, layer: str) -> tuple[int, int]:
    """(values of the score and value products, values that are kept) for one token that a layer attends to.

    layer: what the keys of its tensors begin with.
    """
    if text.get("kv_lora_rank"):  # multi-head latent attention
        heads = text["num_attention_heads"]
        width = text["qk_nope_head_dim"] + text["qk_rope_head_dim"] + text["v_head_dim"]
        return heads * width, text["kv_lora_rank"] + text["qk_rope_head_dim"]
    own = {
        found[1]: entry.shape
        for key, entry in entries.items()
        if key.startswith(layer) and (found := OWN.search(key)) and entry.dtype.is_floating_point
    }
    output = next((own[name] for name in ("o_proj", "out_proj", "dense") if name in own), None)
    if "k_proj" in own and output is not None:
        keys, values = own["k_proj"][0], own.get("v_proj", own["k_proj"])[0]
        return output[1] + output[1] * keys // values, keys + values
    heads, kv_heads, head_dim = config_head_counts(config)
    return 2 * heads * head_dim, 2 * kv_heads * head_dim


def describe(path, args) -> dict:
    """Totals, values by type and by key group, and the keys of one checkpoint.

    Returns {"total": {name: number}, "dtypes": Counter, "groups": Counter, "keys": list}.
    """
    checkpoint = open_checkpoint(path)
    include, exclude = args.include or "", args.exclude
    entries = {k: e for k, e in checkpoint.entries.items() if include in k and not (exclude and exclude in k)}
    if not entries:
        raise UserError(f"{path}: no key passes --include {args.include} --exclude {args.exclude}")
    total = {
        "keys": len(entries),
        "values": sum(e.numel for e in entries.values()),
        "bytes": sum(e.nbytes for e in entries.values()),
    }
    dtypes, groups = Counter(), Counter()
    for key, entry in entries.items():
        dtypes[str(entry.dtype).removeprefix("torch.")] += entry.numel
        groups[".".join(key.split(".")[: args.group_depth])] += entry.numel
    found = {"total": total, "dtypes": dtypes, "groups": groups, "keys": list(entries)}
    files = [folder / "config.json" for folder in (args.config, checkpoint.folder) if folder]
    configs = [read_json(file, dict) for file in files if file.is_file()] or [None]
    try:
        llm = find_language_model(checkpoint.entries, config=configs[0])
    except UserError:
        return found
    # --config is of the whole model: a pruned one's own says which kinds of layers are left
    fitting = (config for config in configs if config is not None and layer_count(config) == llm.layers)
    config = next(fitting, configs[0])
    total["layers"] = llm.layers
    if config is not None:
        total |= layer_cost(config, checkpoint.entries, llm, args.context)
    return found


def main(args):
    before = describe(args.path, args)
    after = describe(args.compare, args) if args.compare else None

    # one column, or both with what was saved
    print(f"{args.path}" + (f"  ->  {args.compare}" if after else ""))
    for name, value in before["total"].items():
        if after and name in after["total"]:
            other = after["total"][name]
            less = 1 - other / value if value else 0.0  # a Mamba has no KV-cache
            print(f"  {name:38} {value:>18,}  {other:>18,}  {less:>7.1%} less")
        else:
            print(f"  {name:38} {value:>18,}")

    # where the values are
    print("by type (a tensor that stands under two keys counts twice):")
    for name, value in before["dtypes"].most_common():
        print(f"  {name:38} {value:>18,}")
    print(f"by the first {args.group_depth} parts of the key:")
    for name, value in before["groups"].most_common(args.topk):
        print(f"  {name:38} {value:>18,}")
    if args.check_layer_range:
        print_matches((after or before)["keys"], args.check_layer_range)


def print_matches(keys, pattern: str):
    """Say how many keys match a regular expression, and list the first ten."""
    try:
        left = [key for key in keys if re.search(pattern, key)]
    except re.error as error:
        raise UserError(f"--check-layer-range {pattern}: not a regular expression ({error})") from error
    print(f"{len(left)} keys match {pattern}" + "".join(f"\n  {key}" for key in left[:10]))


if __name__ == "__main__":
    run(main, parse_args())
