"""Load a causal language model and its tokenizer from a folder, and add LoRA to it.

    model = load_llm(folder, "bfloat16", args.trust_remote_code)
    tokenizer = load_tokenizer(folder, args.trust_remote_code)
    model = add_lora(model, r=8, alpha=16, targets=["q_proj", "v_proj"])

Only local folders are read. A folder's own Python code runs only where the user passed --trust-remote-code.
"""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from common.errors import UserError
from common.files import read_json, reading

# Projections that hold query, key and value one after the other (Phi, GPT-2, GPT-NeoX and Bloom).
FUSED = ("qkv_proj", "c_attn", "query_key_value")
# Files that hold the words of a tokenizer; tokenizer_config.json holds none.
WORDS = ("tokenizer.*", "tokeniz*.py", "*vocab*", "*.model", "*.tiktoken", "*.spm", "*.bpe", "tekken.json")


def add_trust_argument(parser):
    """Add --trust-remote-code to a parser or to one of its groups."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let the Python code inside the language model's folder run",
    )


def load_llm(folder, dtype="auto", trust_remote_code: bool = False, **options):
    """Return the causal language model of `folder` in eval mode.

    dtype: "auto" (as stored) or a torch type or its name. options: further arguments of `from_pretrained`,
    such as config. Raises UserError naming the folder when it holds no readable model, or when its
    architecture is code of its own and `trust_remote_code` is not set.
    """
    folder = Path(folder)
    check_llm(folder, trust_remote_code, options.get("config"))
    with reading(folder, "language model"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=trust_remote_code, **options
        )
    return model.eval()


def four_bit(dtype) -> BitsAndBytesConfig:
    """What loads a model with its linear layers in 4-bit numbers, NF4 twice quantised, that compute in
    `dtype` (QLoRA, arXiv 2305.14314). UserError where bitsandbytes is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError("--load-in-4bit needs the package bitsandbytes: pip install bitsandbytes") from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def check_llm(folder, trust_remote_code: bool = False, config=None):
    """Raise UserError unless `folder` has a config.json whose architecture transformers knows or may run."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise UserError(
            f"{folder}: no config.json there; give the folder of a language model, with its configuration, "
            "weights and tokenizer"
        )
    settings = read_json(file, {"model_type?": str, "auto_map?": dict})
    if config is None and settings.get("auto_map") and not trust_remote_code:
        try:
            AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise UserError(
                f"{file}: model_type {settings.get('model_type')!r} is Python code of the folder; read that "
                "code, then pass --trust-remote-code"
            ) from error


def load_tokenizer(folder, trust_remote_code: bool = False):
    """Return the tokenizer of `folder`; UserError naming the folder when there is none that can be read."""
    try:
        with reading(folder, "tokenizer" + ("" if trust_remote_code else " (without --trust-remote-code)")):
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        # without its files transformers may make one of special words alone
        if len(tokenizer) > len({*tokenizer.all_special_ids}):
            return tokenizer
    except UserError:
        if any(file for pattern in WORDS for file in Path(folder).glob(pattern)):
            raise
    raise UserError(
        f"{folder}: holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json); copy it there"
    )


def linear_names(model) -> list[str]:
    """The last parts of the names of all linear modules that LoRA can act on; the output head is left out."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    linear = (nn.Linear, Conv1D)
    found = {name for name, m in base.named_modules() if isinstance(m, linear) and m is not head}
    return sorted({name.rpartition(".")[2] for name in found})


def usual_targets(model) -> list[str]:
    """q_proj and v_proj; where a model holds query, key and value in one projection, that one."""
    names = linear_names(model)
    if {"q_proj", "v_proj"} <= set(names):
        return ["q_proj", "v_proj"]
    return [name for name in FUSED if name in names]


def add_lora(model, r: int, alpha: float, dropout: float = 0.0, targets=None, option="--lora-targets"):
    """Add LoRA of rank `r` and strength alpha / r to the linear modules of `model` named `targets`.

    targets: last parts of module names; None: `usual_targets`. option: the flag that an error names. Returns
    the PEFT model; everything but the LoRA matrices is frozen (Hu et al., arXiv 2106.09685).
    """
    names = linear_names(model)
    targets = list(targets) if targets is not None else usual_targets(model)
    missing = [target for target in targets if target not in names]
    if missing or not targets:
        raise UserError(
            f"{option} {','.join(targets)}: the language model has no linear module "
            f"{(missing or ['q_proj'])[0]!r}; it has {', '.join(names)}"
        )
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)
