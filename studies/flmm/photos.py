"""Study on photographs: DATA_ROOT=/data python studies/flmm/photos.py, after builtin.py has made a base and
SAM.

DATA_ROOT/grounding holds folders in the plain phrase format (images/, masks/, annotations.json). Those named
train* are learned from and the others scored; without training folders the head of an earlier run is scored.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.errors import UserError
from studies.flmm.model import OUT, builtin_model
from studies.recipe import REAL, ROOT, RUNS, recipe, size, stage

CONFIG = ROOT / "flmm/configs/tiny/photos.yaml"


def entries(names, **options) -> str:
    """Folders of phrases as a list that a configuration understands."""
    more = "".join(f", {name}: {value}" for name, value in options.items())
    return "[" + ", ".join(f"{{type: phrases, folder: {name}{more}}}" for name in names) + "]"


def main(base: str = "llava", seed: int = 0):
    if not REAL or not (REAL / "grounding").is_dir():
        raise UserError(
            "DATA_ROOT names no folder that holds grounding/; set it to the folder of the real data"
        )
    data, model = REAL / "grounding", builtin_model(base, seed)
    names = sorted(path.parent.name for path in data.glob("*/annotations.json"))
    train = [name for name in names if name.startswith("train")]
    held_out = [name for name in names if name not in train]
    head = OUT / "head-photos" / "head.safetensors"

    # Learn from the training folders, and score the others.
    if train:
        stage(
            "flmm/train.py",
            config=CONFIG,
            set=[*model, f"data.train={entries(train)}"],
            data=data,
            max_steps=size(150, smoke=3),
            out=head.parent,
            overwrite=True,
        )
    elif not head.is_file():
        raise UserError(
            f"{data}: no folder train* to learn from, and no head of an earlier run in {head.parent}; train "
            "on "
            "photographs first"
        )
    stage(
        "flmm/test.py",
        config=CONFIG,
        set=[*model, f"data.train={entries(train or held_out)}", f"data.test={entries(held_out or train)}"],
        data=data,
        head=head,
        controls=True,
        limit=size(None, smoke=6),
        out=OUT / "test-photos",
        overwrite=True,
    )

    # Eight pictures learned by heart: can the pipeline fit real masks at all?
    eight = entries(names[:1], limit=8, captions=1)
    by_heart = [*model, "unet.upsample_input=64", f"data.train={eight}", f"data.test={eight}"]
    cache = OUT / "cache-photos"
    shutil.rmtree(cache, ignore_errors=True)
    stage(
        "flmm/train.py",
        config=CONFIG,
        set=by_heart,
        data=data,
        cache_attention=cache,
        targets="original",
        max_steps=size(250, smoke=3),
        out=OUT / "head-photos-overfit",
        overwrite=True,
    )
    shutil.rmtree(cache)
    stage(
        "flmm/test.py",
        config=CONFIG,
        set=by_heart,
        data=data,
        head=OUT / "head-photos-overfit" / "head.safetensors",
        controls=True,
        out=OUT / "test-photos-overfit",
        overwrite=True,
    )
    stage("studies/flmm/report.py", runs=RUNS, photos=True)


if __name__ == "__main__":
    recipe(main)
