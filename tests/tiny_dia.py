"""What the tests of dia_pangu share: the smallest sizes, a few phantoms, a small language model of openPangu's class."""

import json
import subprocess
import sys

import pytest
import torch

from common.tiny_llm import make_llm, make_tokenizer
from dia_pangu.src.Dataset.prompt import status_text
from dia_pangu.src.Model.build import build_model
from tests import forked
from tests.golden import ROOT

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


def python(file, *arguments, cwd=None):
    """Run a file, or `-m` and a module, in a process of its own."""
    if file != "-m":
        return forked.run_file(file, *arguments, cwd=cwd)
    return subprocess.run([sys.executable, "-m", *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dia_data")
    result = python(
        ROOT / "dia_pangu" / "make_data.py", "--out", folder, "--train", 8, "--val", 3, "--test", 4
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dia_llm") / "model"
    texts = [status_text([i % 2] * 14, language) for i in range(4) for language in ("en", "cn")]
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
    torch.manual_seed(0)
    return build_model(json.loads(json.dumps(SMALL)), llm)
