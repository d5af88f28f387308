"""What a checkpoint holds, without loading it: keys with shapes and types, numbered prefixes, decoder, LoRA.

python pruning/pruning_tools/inspect_ckpt.py path/to/pytorch_model.bin
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
from pruning.pruning_tools.language_model import find_language_model, find_lora
from pruning.pruning_tools.shards import open_checkpoint


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("path", type=Path, help=".bin, .pth, .safetensors or a folder of shards")
    p.add_argument("--keys", type=number(int, 0), default=30, help="how many keys to list")
    return p.parse_args(argv)


def main(args):
    checkpoint = open_checkpoint(args.path)
    entries = checkpoint.entries
    print(
        f"{args.path}: {len(entries)} keys in {len(checkpoint.files)} {checkpoint.format} file(s), "
        f"{sum(e.nbytes for e in entries.values()) / 1e9:.3f} GB"
    )
    for key, entry in list(entries.items())[: args.keys]:
        print(f"  {key}  {tuple(entry.shape)}  {str(entry.dtype).removeprefix('torch.')}")
    print("prefixes before a number, with their keys:")
    prefixes = Counter(m[1] for key in entries if (m := re.match(r"(.*?)\d+\.", key)))
    for prefix, count in prefixes.most_common():
        print(f"  {count:6}  {prefix}")
    file = checkpoint.folder / "config.json"
    try:
        llm = find_language_model(entries, config=read_json(file, dict) if file.is_file() else None)
    except UserError as error:
        print(f"decoder: {error}")
        return
    lora = find_lora(checkpoint, llm, None)
    print(f"decoder: {llm.layers} layers under {llm.prefix}")
    if lora:
        alpha = "unknown (no adapter_config.json)" if lora.alpha is None else f"{lora.alpha:g}"
        print(f"LoRA: r {lora.r}, alpha {alpha}, {', '.join(lora.target_modules)}")


if __name__ == "__main__":
    run(main, parse_args())
