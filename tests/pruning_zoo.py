"""Settings of tiny decoders of transformers, by model type: six layers of every kind that a layer may be of.

A name may have a suffix, `qwen2/window`: the same type with other fields.
"""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from studies.recipe import options

BASE = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=2,
    bos_token_id=0,
    eos_token_id=1,
)
MOE = dict(
    moe_intermediate_size=16,
    num_experts=4,
    num_experts_per_tok=2,
    n_routed_experts=4,
    num_local_experts=4,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    shared_expert_intermediate_size=16,
)
MLA = dict(
    q_lora_rank=16,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
    head_dim=4,
    num_key_value_heads=4,
)
LINEAR = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=2,
)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
GPT = dict(n_embd=32, n_layer=6, n_head=4)
WINDOW = dict(sliding_window=4)
GEMMA = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=96, **WINDOW)
GEMMA["layer_types"] = ["sliding_attention", "full_attention"] * 3

ZOO = {
    "afmoe": {**MOE, **WINDOW, "num_dense_layers": 2, "global_attn_every_n_layers": 2},
    "apertus": {},
    "arcee": {},
    "axk1": {**MOE, **MLA},
    "bamba": {**MAMBA, "attn_layer_indices": [1, 4]},
    "bert": {"is_decoder": True},
    "biogpt": {},
    "bitnet": {},
    "bloom": {"n_layer": 6, "n_head": 4},
    "codegen": {**GPT, "rotary_dim": 4},
    "cohere": {},
    "cohere2": WINDOW,
    "ctrl": {**GPT, "dff": 48},
    "cwm": WINDOW,
    "deepseek_v2": {**MOE, **MLA, "first_k_dense_replace": 1},
    "deepseek_v3": {**MOE, **MLA, "first_k_dense_replace": 3},
    "deepseek_v32": {**MOE, **MLA, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4},
    "doge": {},
    "dots1": {**MOE, "first_k_dense_replace": 3},
    "ernie4_5": {},
    "ernie4_5_moe": {**MOE, "moe_num_experts": 4, "moe_k": 2, "moe_layer_interval": 2},
    "exaone4": {**WINDOW, "sliding_window_pattern": 3},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_chunk_size": 8},
    "falcon_mamba": {"state_size": 8},
    "flex_olmo": MOE,
    "gemma": {},
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "gemma3n_text": {
        **GEMMA,
        "intermediate_size": [48, 48, 64, 48, 48, 48],
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {**GEMMA, "num_kv_shared_layers": 2},
    "glm4": {},
    "glm4_moe": {**MOE, "first_k_dense_replace": 3},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {
        "num_layers": 6,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 3]],
        "window_size": 4,
    },
    "gpt_neox": {},
    "gpt_oss": {**MOE, **WINDOW},
    "gptj": {**GPT, "rotary_dim": 4},
    "granite": {},
    "granite_swa": {
        **WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "layer_rope_theta": [1e4, 0, 100, 0, 1e4, 1e3],
    },
    "granitemoehybrid": {
        **MOE,
        **MAMBA,
        "shared_intermediate_size": 16,
        "layer_types": ["mamba", "attention", "mamba", "attention", "mamba", "mamba"],
    },
    "helium": {},
    "hunyuan_v1_dense": {},
    "inkling2_text": {**MOE, "layer_types": ["hybrid_sliding"] * 5 + ["hybrid"], **WINDOW},
    "jetmoe": {**MOE, "num_key_value_heads": 4, "kv_channels": 8},
    "kimi_linear": {
        **MOE,
        **MLA,
        "first_k_dense_replace": 1,
        "linear_attn_config": {
            "full_attn_layers": [3, 6],
            "kda_layers": [1, 2, 4, 5],
            "num_heads": 4,
            "head_dim": 8,
            "short_conv_kernel_size": 2,
        },
    },
    "lfm2": {"full_attn_idxs": [1, 3, 5]},
    "lfm2_moe": {**MOE, "num_dense_layers": 2, "layer_types": ["conv", "full_attention"] * 3},
    "llama": {},
    "llama4_text": {
        **MOE,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": 4,
        "no_rope_layer_interval": 3,
    },
    "mamba": {"state_size": 8},
    "mbart": {"d_model": 32, "decoder_layers": 6, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "mimo_v2_flash": MOE,
    "minicpm3": MLA,
    "minimax": {**MOE, "layer_types": ["linear_attention", "full_attention"] * 3, "block_size": 8},
    "ministral3": {},
    "mistral": {},
    "mixtral": MOE,
    "modernbert-decoder": {"global_attn_every_n_layers": 3},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 6},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {
        **MOE,
        "layers_block_type": ["mamba", "attention", "moe"] * 2,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "olmo2": {},
    "openai-gpt": GPT,
    "olmo_hybrid": {k: v for k, v in LINEAR.items() if "conv" not in k},
    "olmoe": MOE,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": MOE,
    "qwen2": {},
    "qwen2/window": {**WINDOW, "use_sliding_window": True, "max_window_layers": 3},
    "qwen2_moe": {**MOE, "decoder_sparse_step": 2},
    "qwen3": {},
    "qwen3_5_text": LINEAR,
    "qwen3_moe": {**MOE, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "qwen3_next": {**MOE, **LINEAR, "decoder_sparse_step": 2},
    "recurrent_gemma": {
        "lru_width": 32,
        "attention_window_size": 8,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1, 0, 0, 1, 1]},  # longer than the model, as its class allows
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": WINDOW,
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 6, "attention_heads": 4},
    "zaya": {**MOE, "num_experts_per_tok": 1},
}
# What config.json cannot express for the layers 0, 1, 3 and 5, and the words that say why.
REFUSED = {
    "beam": ({}, "attn_residual_add_idx as 6 instead of 8"),
    "diffllama": ({}, "lambda_init as 0.47"),
    "gpt2/inverse": ({**GPT, "scale_attn_by_inverse_layer_idx": True}, "attn.scaling as"),
    "jamba": (
        {
            **MOE,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
        "expert_layer_period and expert_layer_offset",
    ),
    "bamba/attention": ({**MAMBA, "attn_layer_indices": [2, 4]}, "attention stands in layer 2, 4 alone"),
    "gemma4_text/shared": (
        {**GEMMA, "num_kv_shared_layers": 3, "layer_types": ["full_attention"] * 6},
        "layer 3 works with the keys and values of layer 2",
    ),
}


def call(script, *words, **flags):
    """Run a script's main with words and keyword arguments as its command line."""
    return script.main(script.parse_args([*map(str, words), *options(flags)]))


def make(name: str, settings: dict, **options):
    """A tiny causal language model of random weights that every layer's output depends on, in eval mode."""
    if name.split("/")[0] not in CONFIG_MAPPING:
        pytest.skip(f"this transformers knows no {name}")
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split("/")[0], **{**BASE, **settings})
    model = AutoModelForCausalLM.from_config(config, **options).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model
