"""Recipe of the real study: real photographs, ImageNet's EfficientNet-lite0 and SmolLM2-135M.

    DATA_ROOT=... bash run_all.sh --real flmm

DATA_ROOT/grounding holds folders in the plain phrase format (images/, masks/, annotations.json): those named
train* are learned from, the others scored, once. Tower and language model are joined to a base whose
projector learns from the captions of the training folders and the boxes of their phrases; then it stays
frozen, and heads are trained on its attention with the seeds of SEEDS (default 0 1 2). Controls: the same
recipe with a random tower and with a random language model, the pilot (the same features and words without
any attention), another phrase's mask, the best raw map, the whole picture. There is no SAM here, so masks are
coarse.
"""

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.errors import UserError
from studies.real_models import efficientnet_lite0, smollm2
from studies.recipe import REAL, ROOT, RUNS, recipe, size, stage

CONFIG, OUT = ROOT / "flmm/configs/tiny/real.yaml", RUNS / "flmm"
CONTROLS = ("tower", "llm")  # what gets random weights
# Fifths of the training photographs. Heads learn from others than the base: on what it has learned from, its
# maps are better than on any other.
BASE, HEAD, VAL = [0, 1], [3, 4], [2]


def entries(folders, fifths=None) -> str:
    """Folders of phrases, or these fifths of their pictures, as a list that a configuration understands."""
    part = f", fifths: {fifths}" if fifths else ""
    return "[" + ", ".join(f"{{type: phrases, folder: {folder.name}{part}}}" for folder in folders) + "]"


def one_base(folders, held_out, seeds, random=None):
    """Teach a base, train a head for each seed on its features, and score the held-out pictures."""
    name = f"-random-{random}" if random else ""
    base, cache = OUT / f"base{name}", OUT / f"cache{name}"
    stage(
        "studies/flmm/teach_base.py",
        tower=efficientnet_lite0(),
        llm=smollm2(),
        random=random,
        data=folders,
        fifths=BASE,
        side=size(448, smoke=64),
        out=base,
        overwrite=True,
    )
    options = dict(
        config=CONFIG,
        set=[
            f"base.path={base}",
            f"data.train={entries(folders, HEAD)}",
            f"data.val={entries(folders, VAL)}",
            f"data.test={entries(held_out)}",
        ],
        data=folders[0].parent,
    )
    for seed in seeds:
        head = OUT / f"head{name}-{seed}"
        stage(
            "flmm/train.py",
            **options,
            cache_attention=cache,
            batch_size=size(8, smoke=2),
            max_steps=size(160, smoke=2),
            seed=seed,
            out=head,
            overwrite=True,
        )
        stage(
            "flmm/test.py",
            **options,
            head=head / "head.safetensors",
            controls=True,
            batch_size=size(8, smoke=2),
            limit=size(None, smoke=4),
            out=OUT / f"test{name}-{seed}",
            overwrite=True,
        )
    shutil.rmtree(cache, ignore_errors=True)


def main():
    if not REAL or not (REAL / "grounding").is_dir():
        raise UserError("DATA_ROOT names no folder that holds grounding/; set it to the folder of real data")
    names = sorted(path.parent for path in (REAL / "grounding").glob("*/annotations.json"))
    folders = [name for name in names if name.name.startswith("train")]
    held_out = [name for name in names if name not in folders]
    if not folders or not held_out:
        raise UserError(f"{REAL / 'grounding'}: needs folders train* to learn from and another one to score")
    os.environ["OMP_NUM_THREADS"] = "1"
    seeds = [int(seed) for seed in os.environ.get("SEEDS", "0 1 2").split()]
    one_base(folders, held_out, seeds)
    for seed in seeds:
        stage(
            "studies/flmm/pilot.py",
            base=OUT / "base",
            data=folders,
            test=held_out,
            steps=size(225, smoke=2),
            seed=seed,
            out=OUT / f"test-pilot-{seed}",
            overwrite=True,
        )
    for control in CONTROLS:
        one_base(folders, held_out, seeds, control)
    stage("studies/flmm/report.py", runs=RUNS, real=True, seeds=seeds)


if __name__ == "__main__":
    recipe(main)
