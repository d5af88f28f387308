"""A small world of flmm for fixtures: scenes, two random bases, a tiny SAM, and a configuration of them."""

import json
from pathlib import Path
from types import SimpleNamespace

from flmm import make_data
from flmm.models.tiny import save_base, tiny_model, tiny_sam, tiny_tokenizer

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
