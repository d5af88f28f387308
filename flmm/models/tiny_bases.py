"""Tiny random models of the real transformers classes of every family, to check an adapter without a
download."""

import torch
import transformers as hf

from common.errors import UserError
from flmm.models.frozen_efficientnet import EfficientNetLiteConfig
from flmm.models.tiny import ROPE, TINY_FAMILIES, qwen_tokens, text_config, tiny_model, tiny_tokenizer

VISION = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SIGLIP = dict(VISION, model_type="siglip_vision_model", image_size=64, patch_size=8)
GROUPED = {"num_key_value_heads": 2, "head_dim": 32}
SPECIAL = [
    *("<IMG_CONTEXT>", "<img>", "</img>", "<start_of_image>", "<image_soft_token>", "<end_of_image>"),
    *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    *("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]
# One user turn, as the tokenizers of these models write it; what stands for a picture differs.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def check_tokenizer(family):
    """A tokenizer with the special tokens of `family`, and a chat template where the family asks for one."""
    from flmm.build import FAMILIES

    tokenizer, kind = tiny_tokenizer(), FAMILIES[family]
    if family not in TINY_FAMILIES:
        tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL, "<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = CHAT.replace("IMAGE", kind.chat_image or kind.image_text)
    return tokenizer


def tiny_base(family, seed=0, attention="rows", **options):
    """A frozen base of `family` with random weights and a tokenizer of its own."""
    from flmm.build import FAMILIES

    kind, tokenizer = FAMILIES[family], check_tokenizer(family)
    if family in TINY_FAMILIES:
        model, options = tiny_model(family, tokenizer, seed), {"template": "plain", **options}
    else:
        torch.manual_seed(seed)
        model = new_model(family, tokenizer)
    sizes = {"size": {"shortest_edge": 1024, "longest_edge": 20_000}} if family.startswith("qwen") else {}
    if family in ("smolvlm", "idefics3"):
        sizes = {"size": {"longest_edge": 128}}
    if family == "internvl":
        sizes = {"max_patches": 6}
    processor = kind.make_processor(model.config, sizes)
    return kind(model, tokenizer, processor, attention=attention, question="Describe.", **options)


def new_model(family, tokenizer):
    """A random model of one of the families that transformers added since the paper, of the configuration
    that the function of its name makes."""
    if not (make := globals().get(family)):
        raise UserError(
            f"{family}: has no tiny configuration; write one of this name in flmm/models/tiny_bases.py, or "
            "check a model folder with --config and --base-path"
        )
    config = make(text_config(tokenizer), tokenizer.convert_tokens_to_ids)
    from flmm.build import FAMILIES

    model = getattr(hf, FAMILIES[family].architecture)(config)
    if family == "gemma3":  # its projection starts at zero, so every picture would look alike
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.05)
    return model


def qwen3_vl(text, token):
    vision = dict(depth=3, hidden_size=96, intermediate_size=192, num_heads=4, patch_size=8)
    vision |= dict(spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=128)
    return hf.Qwen3VLConfig(
        text_config={**text, **GROUPED, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
        vision_config={**vision, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 256},
        **qwen_tokens(token),
    )


def internvl(text, token):
    return hf.InternVLConfig(
        vision_config=dict(VISION, image_size=[64, 64], patch_size=[8, 8]),
        text_config=dict(model_type="qwen2", **text),
        image_token_id=token("<IMG_CONTEXT>"),
        downsample_ratio=0.5,
    )


def gemma3(text, token):
    layers = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    return hf.Gemma3Config(
        text_config={**text, **GROUPED, **layers, "sliding_window": 16, "query_pre_attn_scalar": 32},
        vision_config=dict(VISION, image_size=64, patch_size=8),
        mm_tokens_per_image=16,
        image_token_index=token("<image_soft_token>"),
        boi_token_index=token("<start_of_image>"),
        eoi_token_index=token("<end_of_image>"),
    )


def efficientnet(text, token):
    return hf.LlavaConfig(
        vision_config=EfficientNetLiteConfig(image_size=256),
        text_config=hf.LlamaConfig(**text),
        image_token_id=token("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def deepseek_vl_hybrid(text, token):
    high = dict(hidden_size=32, mlp_dim=64, num_hidden_layers=2, num_attention_heads=2, image_size=128)
    high |= dict(patch_size=8, output_channels=16, window_size=7, global_attn_indexes=[0])
    return hf.DeepseekVLHybridConfig(
        text_config={"model_type": "llama", **text},
        vision_config=dict(SIGLIP),
        high_res_vision_config={"model_type": "sam_vision_model", **high},
        image_token_id=token("<image_placeholder>"),
    )


def idefics3(text, token, kind=hf.Idefics3Config):
    return kind(
        text_config={"model_type": "llama", **text},
        vision_config=dict(VISION, image_size=64, patch_size=8),
        image_token_id=token("<image>"),
        scale_factor=2,
    )


def smolvlm(text, token):
    return idefics3(text, token, hf.SmolVLMConfig)


def llava_onevision(text, token):
    return hf.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text},
        vision_config=dict(SIGLIP),
        image_token_index=token("<image>"),
        image_token_id=token("<image>"),
        image_grid_pinpoints=[[64 * i, 64 * j] for i in range(1, 7) for j in range(1, 7)],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def mistral3(text, token):
    return hf.Mistral3Config(
        vision_config=dict(VISION, model_type="pixtral", head_dim=16, image_size=64, patch_size=4),
        text_config={**text, **GROUPED, "model_type": "mistral", "sliding_window": None},
        image_token_index=token("[IMG]"),
        spatial_merge_size=2,
    )
