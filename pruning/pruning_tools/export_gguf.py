"""Write a language model's folder as one GGUF file, for llama.cpp and the programs around it.

    python pruning/pruning_tools/export_gguf.py --model pruned/hf_drop23_28 --out pruned.gguf --pre llama-bpe

It knows Llama, Mistral, Qwen 2 and Qwen 3 with a byte-level BPE tokenizer, whose every setting has a field in
the file; anything else is refused, and llama.cpp's own convert_hf_to_gguf.py is the way. Names and bytes are
written by llama.cpp's package gguf (pip install gguf), one tensor in memory at a time.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np

from common.arguments import Parser
from common.checkpoint import atomic_path
from common.errors import UserError, run
from common.files import read_json
from common.llm import load_tokenizer
from pruning.pruning_tools.shards import open_checkpoint
from pruning.shorter import config_object

# llama.cpp's architecture of each model_type.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("--model", type=Path, required=True, help="folder of the language model")
    p.add_argument("--out", type=Path, required=True, help="the .gguf file")
    p.add_argument(
        "--pre",
        required=True,
        help="how the tokenizer splits text before it merges, by llama.cpp's name: llama-bpe, qwen2, smollm, "
        "gpt-2, ...; the field tokenizer.ggml.pre of any GGUF file of the unpruned model says it",
    )
    p.add_argument("--type", choices=TYPES, help="number format of the matrices; default: as stored")
    p.add_argument("--overwrite", action="store_true", help="replace --out")
    return p.parse_args(argv)


def read_config(folder: Path):
    """The configuration of the model in `folder`; UserError where a setting has no field in the file."""
    config = read_json(folder / "config.json", dict)
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{folder}: model_type {kind} is not among {', '.join(ARCHITECTURES)}; use llama.cpp's "
            "convert_hf_to_gguf.py"
        )
    known = config_object(config, strict=True)
    rope = getattr(known, "rope_parameters", None) or {}
    sliding = getattr(known, "use_sliding_window", kind == "mistral") and getattr(
        known, "sliding_window", None
    )
    refused = {
        "rope_parameters": rope.get("rope_type", "default") != "default",
        "sliding_window": bool(sliding),
        "attention_bias": getattr(known, "attention_bias", False),
        "mlp_bias": getattr(known, "mlp_bias", False),
        "hidden_act": known.hidden_act != "silu",
        "quantization_config": "quantization_config" in config,
    }
    if wrong := [name for name, yes in refused.items() if yes]:
        raise UserError(
            f"{folder / 'config.json'}: {wrong[0]} {config.get(wrong[0])} is not written here; use "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    return known


def add_settings(writer, config, head_dim: int, name: str):
    """Write the sizes of the model."""
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def add_tokenizer(writer, folder: Path, size: int, pre: str):
    """Write the words, merges and special tokens of a byte-level BPE tokenizer.json; `size`: the rows of the
    model's table, which may hold more than there are words."""
    from gguf import SpecialVocab, TokenType

    file = folder / "tokenizer.json"
    fields = {"model": {"type": str, "vocab": dict}, "added_tokens": [{"id": int, "content": str}]}
    tokenizer = read_json(file, fields)
    if tokenizer["model"]["type"] != "BPE" or "ByteLevel" not in str(tokenizer.get("pre_tokenizer")):
        raise UserError(f"{file}: is no byte-level BPE; use llama.cpp's convert_hf_to_gguf.py")
    words = {number: (word, TokenType.NORMAL) for word, number in tokenizer["model"]["vocab"].items()}
    for token in tokenizer["added_tokens"]:
        kind = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
        words[token["id"]] = token["content"], kind
    if max(words) >= size:
        raise UserError(f"{file}: holds the word {max(words)}, the model's table has {size} rows")
    rows = [words.get(number, (f"[PAD{number}]", TokenType.UNUSED)) for number in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([word for word, _ in rows])
    writer.add_token_types([kind for _, kind in rows])
    writer.add_add_space_prefix(False)

    # special tokens and template; which of them stand around a text is asked of the tokenizer itself
    special, own = SpecialVocab(folder, load_merges=True, n_vocab=size), load_tokenizer(folder)
    ids = own("a").input_ids
    special.add_special_token |= {"bos": ids[0] == own.bos_token_id, "eos": ids[-1] == own.eos_token_id}
    special.add_to_gguf(writer, quiet=True)


def interleaved(weight, heads: int):
    """The rows of q or k in llama.cpp's order for Llama: halves that rotate together lie side by side."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def write_tensors(writer, entries: dict, config, names, kind):
    """Write where each tensor will lie, then one after the other; vectors stay float32."""
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape, quants

    types = {
        key: kind if len(entry.shape) > 1 else GGMLQuantizationType.F32 for key, entry in entries.items()
    }
    for key, entry in entries.items():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"{key} has no place in llama.cpp's architecture for {config.model_type}")
        size = int(np.prod(quant_shape_to_byte_shape(entry.shape, types[key])))
        writer.add_tensor_info(name, entry.shape, np.dtype(np.float32), size, types[key])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()

    turned = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    for key, entry in entries.items():
        values, heads = entry.read().float(), turned.get(".".join(key.split(".")[-2:]))
        if heads and ARCHITECTURES[config.model_type] == "llama":
            values = interleaved(values, heads)
        writer.write_tensor_data(quants.quantize(values.contiguous().numpy(), types[key]))


def main(args):
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"the package gguf is missing ({error}); pip install gguf") from error
    if args.out.exists() and not args.overwrite:
        raise UserError(f"{args.out} exists; add --overwrite or choose another --out")

    # the model, and what its file says of it
    config, checkpoint = read_config(args.model), open_checkpoint(args.model)
    arch = ARCHITECTURES[config.model_type]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    entries = {key: e for key, e in checkpoint.entries.items() if not key.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        entries.pop("lm_head.weight", None)
    stored = str(entries["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    kind = args.type or {"float16": "F16", "bfloat16": "BF16"}.get(stored, "F32")

    with atomic_path(args.out) as temporary:
        writer = gguf.GGUFWriter(temporary, arch)
        add_settings(writer, config, head_dim, args.model.name)
        add_tokenizer(writer, args.model, config.vocab_size, args.pre)
        writer.add_file_type(gguf.LlamaFileType[TYPES[kind]])
        if kind == "Q8_0":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

        write_tensors(writer, entries, config, names, gguf.GGMLQuantizationType[kind])
        writer.close()
    megabytes = args.out.stat().st_size / 1e6
    print(f"wrote {args.out}: {config.num_hidden_layers} layers, {kind}, {megabytes:.1f} MB")


if __name__ == "__main__":
    run(main, parse_args())
