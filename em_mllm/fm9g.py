"""FM9G-4B (folder 9G4B/, model type "fm9g") and its relatives of the MiniCPM recipe, natively, without the
code in their folder.

The recipe is Llama with three factors:  x0 = scale_emb * E[ids];  x += scale_depth / sqrt(layers) *
sublayer(norm(x)); logits = head(norm(x) * dim_model_base / hidden).  Granite of the transformers library has
a multiplier in each of these places and Llama's tensor names, so the published file loads unchanged. Folding
the factors into the weights gives a plain Llama with equal logits.
"""

from pathlib import Path

import torch
from transformers import GraniteConfig, LlamaConfig

from common.files import read_json

MODEL_TYPES = ("fm9g", "minicpm")
SHARED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "hidden_act max_position_embeddings rms_norm_eps bos_token_id eos_token_id pad_token_id "
    "attention_bias attention_dropout initializer_range"
).split()


def is_fm9g(folder) -> bool:
    """True when folder/config.json describes a model of this recipe (and not of MiniCPM3's latent
    attention)."""
    path = Path(folder) / "config.json"
    return path.exists() and read_json(path, {"model_type?": str}).get("model_type") in MODEL_TYPES


def shared_fields(config: dict) -> dict:
    """The fields that FM9G has in common with Llama and Granite; a rope_scaling entry (longrope) becomes
    rope_parameters."""
    rope = {"rope_type": "default", **(config.get("rope_scaling") or {})}
    rope["rope_theta"] = config.get("rope_theta", 10000.0)
    rope["rope_type"] = rope.pop("type", rope["rope_type"])
    if rope["rope_type"] == "longrope":
        name = "original_max_position_embeddings"
        rope.setdefault(name, config.get(name, config.get("max_position_embeddings")))
    return {**{k: config[k] for k in SHARED if config.get(k) is not None}, "rope_parameters": rope}


def granite_config(config: dict) -> GraniteConfig:
    """FM9G config.json (a dictionary) to the Granite configuration that computes the same."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return GraniteConfig(
        **shared_fields(config),
        tie_word_embeddings=config.get("tie_word_embeddings", True),
        embedding_multiplier=float(config.get("scale_emb", 1)),
        residual_multiplier=config.get("scale_depth", 1) / config["num_hidden_layers"] ** 0.5,
        attention_multiplier=head_dim**-0.5,
        logits_scaling=config["hidden_size"] / config.get("dim_model_base", config["hidden_size"]),
    )


def fold_to_llama(config: dict, tensors: dict) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
    """FM9G configuration and weights to a plain Llama with the factors in its weights and an untied head;
    equal logits."""
    residual = config.get("scale_depth", 1) / config["num_hidden_layers"] ** 0.5
    embedding = tensors["model.embed_tokens.weight"]
    scaled = ("o_proj.weight", "down_proj.weight")
    out = {k: v * residual if k.endswith(scaled) else v for k, v in tensors.items()}
    head = tensors.get("lm_head.weight", embedding)
    share = config.get("dim_model_base", config["hidden_size"]) / config["hidden_size"]
    out["lm_head.weight"] = head * share
    out["model.embed_tokens.weight"] = embedding * config.get("scale_emb", 1)
    return LlamaConfig(**shared_fields(config), tie_word_embeddings=False), out
