"""Recipe: the built-in report model, that is the bases and then the stages pre and ft of dia_pangu/train.py.

    python studies/dia_pangu/builtin_model.py

Stage ft comes in two forms: a short one (runs/dia_pangu/ft), which the pruning study works on, and the one
that RESULTS.md measures (runs/dia_pangu/ft-hidden). Called by builtin.py, and by the pruning study when the
model is not there yet.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in

from studies.dia_pangu import bases
from studies.dia_pangu.bases import out, places, run, vision
from studies.recipe import recipe, size, stage

train = "dia_pangu/train.py"
model = {**vision, "lang_encoder_path": out / "llm/model", "places": places, "batch_size": 8, "accum": 1}
lora = {
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0,
    "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
finetune = {**model, **lora, "stage": "ft", "start": out / "pre", "key_weight": 4, "flip": 0.02}
diagnosis = ["vision_encoder", "prototype", "sample_memory", "embedding_layer.proj.", "temp"]


def main():
    bases.main()

    # Stage pre: the Perceiver alone.
    pre = {"stage": "pre", "start": out / "contrast", "lr": 1e-3, "max_steps": size(20, smoke=2)}
    stage(train, **run, **model, **pre, out=out / "pre")

    # Stage ft in short: only the way from the volume into the words trains, LoRA stays zero.
    cosine = {**finetune, "lr_scheduler_type": "cosine"}
    parts = {"train": ["figure_token", "perceiver.", "fc."], "freeze": "vision_encoder"}
    stage(train, **run, **cosine, **parts, lr=1e-3, max_steps=size(60, smoke=2), out=out / "ft")

    # Stage ft in full: LoRA trains too. Half the places are left out of the prompts, so that the image
    # tokens come to matter; the diagnosis stays as it is.
    parts = {"hide_places": 0.5, "freeze": diagnosis}
    stage(train, **run, **cosine, **parts, lr=2e-3, max_steps=size(600, smoke=2), out=out / "ft-hidden")


if __name__ == "__main__":
    recipe(main)
