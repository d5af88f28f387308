"""Recipe: does the ranking of the layers transfer to a language model that was trained from another seed?

    SEED=1 python studies/pruning/second_base.py          after studies/pruning/builtin.py

The phantoms and the vision part stay. The language model and the report model are trained once more from SEED
(default 1), the study is repeated, and the layers that the first study chose are scored there too.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in

from common.errors import UserError
from studies.dia_pangu import bases, builtin_model
from studies.pruning.builtin import data, dia, out, sizes
from studies.recipe import recipe, size, stage

seed = int(os.environ.get("SEED", 1))


def main():
    base, first = out / f"base-{seed}", out / "study"
    for file in (first / "layer_sensitivity.all.csv", bases.places, data / "annotation_en.json"):
        if not file.is_file():
            raise UserError(f"{file} is not there; run studies/pruning/builtin.py first")
    run = {**bases.run, "seed": seed}
    model = {**builtin_model.model, "lang_encoder_path": base / "llm/model"}
    finetune = {**builtin_model.finetune, **model, "start": base / "pre"}

    # The language model, from another seed.
    stage(
        "studies/dia_pangu/warm_llm.py",
        **run,
        places=bases.places,
        make=8,
        width=96,
        key_weight=4,
        batch_size=8,
        max_steps=size(1100, smoke=12),
        out=base / "llm",
    )

    # The report model around it, as the first base was made.
    stage(
        builtin_model.train,
        **run,
        **model,
        stage="pre",
        start=dia / "contrast",
        lr=1e-3,
        max_steps=size(20, smoke=2),
        out=base / "pre",
    )
    stage(
        builtin_model.train,
        **run,
        **finetune,
        lr_scheduler_type="cosine",
        lr=1e-3,
        train=["figure_token", "perceiver.", "fc."],
        freeze="vision_encoder",
        max_steps=size(60, smoke=4),
        out=base / "ft",
    )

    # The same study, with the first one's choices beside its own.
    stage(
        "studies/pruning/study.py",
        model=base / "ft",
        lang_model_path=base / "llm/model",
        data=data,
        cache=data / "cache",
        also=first,
        out=out / f"study-{seed}",
        overwrite=True,
        **sizes,
    )


if __name__ == "__main__":
    recipe(main)
