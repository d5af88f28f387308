"""cwt_mae on the built-in data: pre-training, linear probe and fine-tuning, each beside its controls.

    python studies/cwt_mae/builtin.py
    SEEDS="0 1 2 3 4" python studies/cwt_mae/builtin.py      # five trainings of each classifier

The real recordings are real.py's.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
from scipy.stats import t as student

from common.files import read_json
from studies.recipe import DATA, ROOT, RUNS, recipe, size, stage
from studies.summary import write_result

OUT = RUNS / "cwt_mae"
SEEDS = os.environ.get("SEEDS", "0").split()  # of the classifiers: weights, windows and augmentation


def builtin():
    """Pre-train on ECG and PPG, probe and fine-tune on five rhythms, score the test subjects; four rows of
    the closing table."""
    out = OUT / "builtin"
    data, labelled = draw_records()
    model = pretrain(data, labelled["split"], out / "base", probe="rhythm")
    stage("cwt_mae/visualize.py", model=model, data=data / "ppg", out=out / "ppg.png", window=1, threads=1)
    rhythms(out, model, dict(labelled, overwrite=True, threads=1))
    report(out)


def draw_records() -> tuple[Path, dict]:
    """The folder of the built-in data, and which of its records are labelled and how they are split."""
    data = DATA / "cwt_mae" / size("builtin", smoke="builtin-smoke")
    minutes = size(5, smoke=1)
    stage("cwt_mae/make_data.py", out=data, subjects=size(30, smoke=9), seconds=60 * minutes, threads=1)
    return data, dict(data=data / "labelled", split=data / "labelled" / "split.json")


def pretrain(data: Path, split: Path, out: Path, **flags) -> Path:
    """Pre-train without labels on windows of 10 s, the test subjects left out; returns the model's file."""
    sizes = dict(config=ROOT / "cwt_mae" / "config_small.yaml", model_fs=50, windows=size(6400, smoke=128))
    steps = dict(batch_size=64, lr=2e-3, max_steps=size(1500, smoke=3))
    often = dict(eval_every=500, save_every=500, log_every=100, overwrite=True, threads=1)
    stage("cwt_mae/train.py", data=data, split=split, out=out, **sizes, **steps, **often, **flags)
    return out / "model.safetensors"


def rhythms(out, model, labelled: dict):
    """Probe and fine-tuned classifier of five rhythms, and their controls. labelled: the options that all
    stages share."""
    # What the frozen encoder says about the rhythms, beside the same encoder with random weights
    stage(
        "studies/cwt_mae/probe.py",
        **labelled,
        model=model,
        task="rhythm",
        random_seeds=size(3, smoke=1),
        out=out / "probe",
    )

    # Controls that know nothing of wavelets, and classifiers: of the trained encoder and of a random one. All
    # learn from all training subjects for a fixed number of steps; nothing is selected.
    steps, windows = size(300, smoke=3), dict(labelled, task="rhythm", model_fs=50, signal_len=500)
    stage("studies/cwt_mae/forest.py", **windows, kind="forest", out=out / "forest")
    for seed in SEEDS:
        stage("studies/cwt_mae/cnn.py", **windows, max_steps=steps, seed=seed, out=out / f"cnn-{seed}")
        for name, layer_decay in (("tuned", 0.75), ("random", 1)):
            start = dict(pretrained=model, random_init=name == "random", layer_decay=layer_decay)
            tuning = dict(lr=1e-3, sampling_power=0.5, augment=1, max_steps=steps, log_every=100)
            run = dict(labelled, task="rhythm", fold=-1, seed=seed, out=out / f"{name}-{seed}")
            stage("cwt_mae/finetune.py", **run, **start, **tuning)
            classifier = out / f"{name}-{seed}" / "model.safetensors"
            stage("cwt_mae/test.py", **labelled, model=classifier, out=out / f"{name}-{seed}-test")


def interval_of(values) -> list[float]:
    """The 95 % interval of a mean over training seeds, by Student's t."""
    reach = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return [float(np.mean(values) - reach), float(np.mean(values) + reach)]


def report(out):
    """The four rows of the closing table."""
    read = lambda name: read_json(out / name / "metrics.json")
    base, linear, first = read("base"), read("probe"), f"tuned-{SEEDS[0]}-test"
    folders = {"fine-tuned": "tuned-{}-test", "random weights, fine-tuned": "random-{}-test"}
    folders["small CNN"] = "cnn-{}"
    seeds = {
        name: [read(folder.format(seed))["macro_f1"] for seed in SEEDS] for name, folder in folders.items()
    }
    means = {name: float(np.mean(values)) for name, values in seeds.items()}
    several = len(SEEDS) > 1
    write_result(
        OUT,
        "built-in ECG, image reconstruction",
        "MSE of hidden patches, lower is better",
        base["val_spec"],
        {"predict the mean": base["spec_mean"], "straight lines": base["spec_line"]},
        figures=[
            (out / "base" / "figures" / "reconstruction.png", "ECG: hidden, reconstructed, original"),
            (out / "ppg.png", "the same for PPG"),
        ],
        note="Normalised wavelet images of subjects held out of the pre-training.",
    )
    write_result(
        OUT,
        "built-in ECG, signal reconstruction",
        "MSE, lower is better",
        base["val_time"],
        {"predict the mean": base["time_mean"], "straight lines": base["time_line"]},
        note="The whole normalised signal of the same subjects, visible parts included.",
    )
    write_result(
        OUT,
        "built-in rhythms, linear probe",
        "macro-F1",
        linear["macro_f1"],
        {"random weights": linear["random_mean"], "most frequent class": linear["chance"]},
        interval=linear["interval"],
        figures=[(out / "probe" / "figures" / "probe.png", "linear probe of frozen features")],
        note="Logistic regression on frozen features, scored on other subjects. The interval is a "
        "bootstrap over the test records; random weights: mean of the seeds.",
    )
    write_result(
        OUT,
        "built-in rhythms, fine-tuned",
        "macro-F1",
        means.pop("fine-tuned"),
        means | {"random forest": read("forest")["macro_f1"], "most frequent class": linear["chance"]},
        interval=interval_of(seeds["fine-tuned"]) if several else read(first)["macro_f1_95"],
        figures=[(out / first / "figures" / "confusion.png", "fine-tuned, test records")],
        note="Windows of 10 s of subjects that no training saw. "
        + (f"Means and interval over {len(SEEDS)} training seeds." if several else "One training seed."),
        details={
            "seeds": seeds,
            "intervals": {k: interval_of(v) for k, v in seeds.items()} if several else {},
        },
        headline=True,
    )


if __name__ == "__main__":
    recipe(builtin)
