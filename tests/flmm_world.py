"""A small world of flmm for fixtures: scenes, two random bases, a tiny SAM, and a configuration of them."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

from flmm import make_data
from flmm.models.frozen_llava import FrozenLlava
from flmm.models.tiny import TEXT, save_base, tiny_model, tiny_sam, tiny_tokenizer
from flmm.models.tiny_bases import VISION, check_tokenizer

SCENES = Path(make_data.__file__).parent / "configs/tiny/scenes.yaml"


def make_world(tmp_path_factory):
    """.folder with data, base-0, base-1, sam and config.yaml, and .options that name configuration and data.

    The pictures have 96 pixels a side, of which the processor makes 64.
    """
    folder = tmp_path_factory.mktemp("world")
    counts = ["--train", 8, "--val", 4, "--test", 3, "--overlap", 1, "--side", 96]
    make_data.main(make_data.parse_args([str(word) for word in ["--out", folder / "data", *counts]]))
    tokenizer = tiny_tokenizer()
    for seed in (0, 1):
        save_base(tiny_model("llava", tokenizer, seed), tokenizer, folder / f"base-{seed}")
    tiny_sam().save_pretrained(folder / "sam")
    parts = {
        "include": str(SCENES),
        "base": {"path": str(folder / "base-0")},
        "sam": {"path": str(folder / "sam")},
        "unet": {"base_channels": 4},
    }
    (folder / "config.yaml").write_text(json.dumps(parts))
    options = ["--config", folder / "config.yaml", "--data", folder / "data"]
    return SimpleNamespace(folder=folder, options=options)


class FrozenPaliGemma(FrozenLlava):
    architecture, image_text, template = "PaliGemmaForConditionalGeneration", "<image>", "plain"


def paligemma(kind="gemma", **text):
    """A random base that the project does not ship. kind, text: of its language model."""
    tokenizer = check_tokenizer("llava")
    text = {**TEXT, "head_dim": 32, "num_key_value_heads": 2, "model_type": kind, **text}
    vision = dict(VISION, model_type="siglip_vision_model", image_size=64, patch_size=8, projection_dim=128)
    config = PaliGemmaConfig(
        text_config={**text, "vocab_size": len(tokenizer)},
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=128,
    )
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(config)
    return FrozenPaliGemma(model, tokenizer, FrozenPaliGemma.make_processor(model.config, {}))
