"""Tiny bases and a tiny SAM of the real transformers classes, for the built-in run and the tests. Nothing is
downloaded."""

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPVisionConfig,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SamConfig,
    SamModel,
    SiglipVisionConfig,
)

from common.checkpoint import atomic_dir
from common.tiny_llm import make_tokenizer
from flmm.data.scenes import all_texts

SPECIAL = (
    "<image>",
    "<image_placeholder>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEXT = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=512,
    initializer_range=0.05,
    tie_word_embeddings=False,
)


TINY_FAMILIES = ("llava", "llava_next", "deepseek_vl", "qwen")


def tiny_tokenizer():
    """Byte-level BPE in which every scene word is one token; any other text still has tokens."""
    tokenizer = make_tokenizer(all_texts(), 480, SPECIAL)
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(
        add_prefix_space=True
    )  # "red" and " red" are one word
    return tokenizer


def tiny_model(family, tokenizer, seed=0, side=64):
    """Randomly initialised model of one of TINY_FAMILIES for `side`-pixel pictures."""
    ids = dict(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text = {**TEXT, **ids, "vocab_size": len(tokenizer)}
    token = tokenizer.convert_tokens_to_ids
    vision = dict(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=8,
        image_size=side,
    )
    torch.manual_seed(seed)
    if family in ("llava", "llava_next"):
        common = dict(
            vision_config=CLIPVisionConfig(**vision),
            text_config=LlamaConfig(**text),
            image_token_id=token("<image>"),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            image_seq_length=(side // 8) ** 2,
            tie_word_embeddings=False,
        )
        if family == "llava":
            return LlavaForConditionalGeneration(LlavaConfig(**common))
        pinpoints = [
            [side, 2 * side],
            [2 * side, side],
            [2 * side, 2 * side],
            [side, 3 * side],
            [3 * side, side],
        ]
        return LlavaNextForConditionalGeneration(LlavaNextConfig(**common, image_grid_pinpoints=pinpoints))
    if family == "deepseek_vl":
        return DeepseekVLForConditionalGeneration(
            DeepseekVLConfig(
                vision_config=SiglipVisionConfig(**vision),
                text_config=LlamaConfig(**text),
                image_token_id=token("<image_placeholder>"),
                tie_word_embeddings=False,
            )
        )
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": rope},
            tie_word_embeddings=False,
            vision_config=dict(
                depth=2,
                hidden_size=96,
                intermediate_size=192,
                num_heads=4,
                patch_size=4,
                spatial_merge_size=2,
                temporal_patch_size=2,
                window_size=32,
                fullatt_block_indexes=[0, 1],
                out_hidden_size=128,
            ),
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
        )
    )


def save_base(model, tokenizer, folder):
    """Write a base folder as `from_pretrained` reads it."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with atomic_dir(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def tiny_sam(seed=0, side=64, dim=64):
    """Randomly initialised SAM for `side`-pixel pictures: 16 x 16 embedding, 64 x 64 low-resolution masks."""
    torch.manual_seed(seed)
    patch = side // 16
    return SamModel(
        SamConfig(
            vision_config=dict(
                hidden_size=96,
                mlp_dim=192,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=side,
                patch_size=patch,
                output_channels=dim,
                num_pos_feats=dim // 2,
                window_size=7,
                global_attn_indexes=[2],
                initializer_range=0.02,
            ),
            prompt_encoder_config=dict(
                hidden_size=dim, image_size=side, patch_size=patch, mask_input_channels=16
            ),
            mask_decoder_config=dict(
                hidden_size=dim,
                mlp_dim=128,
                num_attention_heads=4,
                iou_head_hidden_dim=64,
                layer_norm_eps=1e-5,
            ),
        )
    )
