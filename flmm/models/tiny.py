"""Tiny bases and a tiny SAM of the real transformers classes, for the built-in run and the tests. Nothing is
downloaded."""

import torch
import transformers as hf
from tokenizers.pre_tokenizers import ByteLevel

from common.checkpoint import atomic_dir
from common.tiny_llm import make_tokenizer
from flmm.data.scenes import all_texts

SPECIAL = (
    *("<image>", "<image_placeholder>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
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
VISION = dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, patch_size=8
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}


def tiny_tokenizer():
    """Byte-level BPE in which every scene word is one token; any other text still has tokens."""
    tokenizer = make_tokenizer(all_texts(), 480, SPECIAL)
    # "red" and " red" are one word
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    return tokenizer


def llava(text, token, side, kind=hf.LlavaConfig, **more):
    return kind(
        vision_config=hf.CLIPVisionConfig(**VISION, image_size=side),
        text_config=hf.LlamaConfig(**text),
        image_token_id=token("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(side // 8) ** 2,
        tie_word_embeddings=False,
        **more,
    )


def llava_next(text, token, side):
    shapes = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))
    pinpoints = [[rows * side, columns * side] for rows, columns in shapes]
    return llava(text, token, side, hf.LlavaNextConfig, image_grid_pinpoints=pinpoints)


def deepseek_vl(text, token, side):
    return hf.DeepseekVLConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, image_size=side),
        text_config=hf.LlamaConfig(**text),
        image_token_id=token("<image_placeholder>"),
        tie_word_embeddings=False,
    )


def qwen(text, token, side):
    vision = dict(depth=2, hidden_size=96, intermediate_size=192, num_heads=4, patch_size=4)
    vision |= dict(spatial_merge_size=2, temporal_patch_size=2, window_size=32, fullatt_block_indexes=[0, 1])
    return hf.Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": ROPE},
        tie_word_embeddings=False,
        vision_config={**vision, "out_hidden_size": 128},
        **qwen_tokens(token),
    )


def qwen_tokens(token):
    """The tokens around and of pictures that all configurations of Qwen name."""
    return {
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
    }


MODELS = {
    "llava": (llava, hf.LlavaForConditionalGeneration),
    "llava_next": (llava_next, hf.LlavaNextForConditionalGeneration),
    "deepseek_vl": (deepseek_vl, hf.DeepseekVLForConditionalGeneration),
    "qwen": (qwen, hf.Qwen2_5_VLForConditionalGeneration),
}
TINY_FAMILIES = tuple(MODELS)


def text_config(tokenizer):
    """TEXT for the vocabulary and the special tokens of `tokenizer`."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {**TEXT, **{name: getattr(tokenizer, name) for name in names}, "vocab_size": len(tokenizer)}


def tiny_model(family, tokenizer, seed=0, side=64):
    """Randomly initialised model of one of TINY_FAMILIES for `side`-pixel pictures."""
    config, model = MODELS[family]
    torch.manual_seed(seed)
    return model(config(text_config(tokenizer), tokenizer.convert_tokens_to_ids, side))


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
    size, decoder = dict(image_size=side, patch_size=side // 16), dict(hidden_size=dim, mlp_dim=128)
    vision = dict(hidden_size=96, mlp_dim=192, num_hidden_layers=3, num_attention_heads=4, window_size=7)
    vision |= dict(
        output_channels=dim, num_pos_feats=dim // 2, global_attn_indexes=[2], initializer_range=0.02
    )
    decoder |= dict(num_attention_heads=4, iou_head_hidden_dim=64, layer_norm_eps=1e-5)
    prompts = dict(hidden_size=dim, mask_input_channels=16, **size)
    return hf.SamModel(
        hf.SamConfig(
            vision_config={**vision, **size}, prompt_encoder_config=prompts, mask_decoder_config=decoder
        )
    )
