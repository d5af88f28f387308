"""What the tests of dia_pangu share: the smallest sizes, a few phantoms, a small language model of
openPangu's class."""

import pytest
import torch

from common.tiny_llm import make_llm, make_tokenizer
from dia_pangu import make_data
from dia_pangu.src.Dataset.prompt import status_text
from dia_pangu.src.Model.build import build_model
from tests import forked
from tests.once import once

__all__ = ["data", "llm", "model_text"]  # the fixtures
SMALL = {
    "embedding": {
        "perceiver_num": 3,
        "vis_dim": 24,
        "patch_size": 8,
        "frame_patch_size": 4,
        "n_tok": 16,
        "vit": {
            "image_size": 16,
            "frames": 16,
            "depth": 1,
            "heads": 2,
            "dim_head": 8,
            "mlp_dim": 32,
            "dropout": 0.0,
            "emb_dropout": 0.0,
        },
        "perceiver": {"depth": 1, "heads": 2, "dim_head": 8},
    },
    "grid": {"size": [16, 16, 16], "fov_mm": [384.0, 384.0, 320.0], "preprocess": "windows"},
    "language": "en",
    "max_length": 512,
    "lora": None,
    "thresholds": [0.5] * 14,
}


def call(script, *arguments, log):
    """Run the main of an imported script in a fork; returns (returncode, text of stdout and stderr)."""
    return forked.call(script, arguments, log)


@once
def data(tmp_path_factory):
    """Phantoms in the CTRG format: 8 volumes for training, 3 for validation, 4 for the test."""
    folder = tmp_path_factory.mktemp("dia_data")
    arguments = ["--out", str(folder), "--train", "8", "--val", "3", "--test", "4"]
    make_data.main(make_data.parse_args(arguments))
    return folder


@once
def llm(tmp_path_factory):
    """A small language model of openPangu's class; two layers of width 32."""
    folder = tmp_path_factory.mktemp("dia_llm") / "model"
    texts = [status_text([i % 2] * 14, language) for i in range(4) for language in ("en", "cn")]
    texts += ["The right upper and the left lower lung."] * 9  # words of place become tokens of their own
    make_llm(
        folder,
        make_tokenizer(texts, 420),
        "PanguEmbedded",
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        bias=True,
        rope_theta=16000000.0,
        max_position_embeddings=1024,
    )
    return folder


@pytest.fixture()
def model_text(llm):
    """A report model of the sizes SMALL with random weights, and its writer of prompts."""
    torch.manual_seed(0)
    return build_model(SMALL, llm)
