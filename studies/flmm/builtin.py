"""Built-in study: scenes -> tiny base (pre-trained, then frozen) -> heads -> scores beside their controls.

    python studies/flmm/builtin.py              # LLaVA class; about 8 minutes of processor time a seed
    SEEDS="0 1 2" python studies/flmm/builtin.py
    SMOKE=1 python studies/flmm/builtin.py      # a minute; the numbers mean nothing

Seeds 0, 1 and 2 run side by side where three cores or more are to be had, one core each; seed 0 runs alone
elsewhere. qwen.py is the same study with the Qwen2.5-VL class, real.py the one on photographs with real
weights.
"""

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from studies.flmm.model import CONFIG, OUT, SAM, builtin_model
from studies.recipe import CORES, DATA, RUNS, SMOKE, recipe, side_by_side, size, stage

SCENES = DATA / size("flmm", smoke="flmm-smoke")


def seeds_of_this_machine() -> list[int]:
    """The seeds that SEEDS names; else three where as many cores are free, and one where they are not."""
    if "SEEDS" in os.environ:
        return [int(seed) for seed in os.environ["SEEDS"].split()]
    return [0, 1, 2] if CORES >= 3 and not SMOKE else [0]


def one_seed(base: str, seed: int, base_steps: int):
    """Pre-train a base, then train and test a head on it and on a random base of the same shape."""
    model = builtin_model(base, seed)
    stage(
        "studies/flmm/pretrain_base.py",
        base=base,
        out=OUT / f"base-{base}-{seed}",
        max_steps=size(base_steps, smoke=4),
        seed=seed,
        overwrite=True,
    )
    stage(
        "studies/flmm/score_words.py",
        config=CONFIG,
        set=model,
        data=SCENES,
        out=OUT / f"words-{base}-{seed}.json",
    )

    # The control has the same head, data and steps on a base that has learned nothing.
    for control, random_base in (("", None), ("-random", seed + 100)):
        cache, head = OUT / f"cache-{base}-{seed}{control}", OUT / f"head-{base}-{seed}{control}"
        shutil.rmtree(cache, ignore_errors=True)
        stage(
            "flmm/train.py",
            config=CONFIG,
            set=[*model, f"optim.coarse_first={size(480, smoke=2)}"],
            random_base=random_base,
            data=SCENES,
            cache_attention=cache,
            batch_size=8,
            max_steps=size(640, smoke=4),
            seed=seed,
            out=head,
            overwrite=True,
        )
        shutil.rmtree(cache)
        stage(
            "flmm/test.py",
            config=CONFIG,
            set=model,
            random_base=random_base,
            data=SCENES,
            head=head / "head.safetensors",
            controls=True,
            batch_size=8,
            out=OUT / f"test-{base}-{seed}{control}",
            overwrite=True,
        )

    ask_the_head(base, seed, model, OUT / f"head-{base}-{seed}" / "head.safetensors")


def ask_the_head(base: str, seed: int, model: list, head):
    """What else a trained head can do: say what is there, and tell objects that hide each other apart."""
    # Presence and score are calibrated on validation scenes, and asked about on fresh ones.
    options = dict(config=CONFIG, set=model, head=head)
    stage("flmm/scripts/calibrate.py", data=SCENES, **options)
    stage(
        "studies/flmm/presence.py",
        scenes=size(200, smoke=4),
        out=OUT / f"presence-{base}-{seed}.json",
        **options,
    )

    # Objects that hide each other, which no head has been trained on.
    stage(
        "flmm/test.py",
        config=CONFIG,
        set=model,
        data=SCENES,
        split="overlap",
        head=head,
        controls=True,
        batch_size=8,
        out=OUT / f"test-{base}-{seed}-overlap",
        overwrite=True,
    )


def main(base: str = "llava", base_steps: int = 1200):
    seeds = seeds_of_this_machine()
    os.environ["OMP_NUM_THREADS"] = "1"  # the tiny models gain nothing from more threads

    # Scenes of generator seed 1: those of seed 0 were looked at while the recipe was made.
    counts = size(
        dict(seed=1, train=500, val=60, test=200, overlap=100), dict(train=16, val=4, test=4, overlap=2)
    )
    stage("flmm/make_data.py", out=SCENES, **counts)
    stage("studies/flmm/pretrain_sam.py", out=SAM.parent, max_steps=size(300, smoke=2), overwrite=True)

    side_by_side(*(lambda seed=seed: one_seed(base, seed, base_steps) for seed in seeds))

    # What needs no repetition is done with the first seed.
    first = dict(config=CONFIG, set=builtin_model(base, seeds[0]), data=SCENES)
    stage(
        "studies/flmm/check_base_untouched.py",
        **first,
        head=OUT / f"head-{base}-{seeds[0]}" / "head.safetensors",
        out=OUT / f"untouched-{base}.json",
    )
    stage(
        "flmm/scripts/train_keyword_selector.py",
        **first,
        max_steps=size(300, smoke=2),
        out=OUT / f"selector-{base}",
        overwrite=True,
    )
    stage("studies/flmm/report.py", runs=RUNS, base=base, seeds=seeds)


if __name__ == "__main__":
    recipe(main)
