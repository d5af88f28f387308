"""Collect the built-in run (and the study on photographs) into results and figures for the closing table.

python flmm/report.py --runs runs --base llava --seeds 0 1 2
"""

import argparse
import csv
import json
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it

import numpy as np

from common.errors import UserError, run
from common.figures import new_figure, save_figure
from studies.summary import write_result


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True, help="folder that holds flmm/test-*")
    parser.add_argument("--base", default="llava", help="family of the built-in run (default llava)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of the built-in run")
    parser.add_argument("--photos", action="store_true", help="report the photographs instead")
    return parser.parse_args()


def results(folder):
    try:
        return json.loads((folder / "results.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{folder}: no results; run test.py first") from None


def rows(folder):
    with open(folder / "phrases.csv", newline="") as file:
        return list(csv.DictReader(file))


def bootstrap(values, groups, seed=0):
    """95 % interval of the mean, resampling pictures (phrases of one picture stay together)."""
    values, rng = np.asarray(values, float), np.random.default_rng(seed)
    index = {}
    for i, g in enumerate(groups):
        index.setdefault(g, []).append(i)
    parts = [values[i] for i in index.values()]
    sums, sizes = np.array([p.sum() for p in parts]), np.array([len(p) for p in parts])
    draws = rng.integers(len(parts), size=(1000, len(parts)))
    return np.percentile(sums[draws].sum(1) / sizes[draws].sum(1), [2.5, 97.5]).tolist()


def per_word(table):
    """Mean IoU of the phrases that hold each word."""
    words = sorted({w for r in table for w in r["phrase"].split()})
    return {w: float(np.mean([float(r["iou"]) for r in table if w in r["phrase"].split()])) for w in words}


def confident(table):
    """Mean IoU when a mask of predicted IoU below one half counts as none, and the share of masks that stay."""
    kept = [float(r["score"]) > 0.5 for r in table]
    return float(np.mean([float(r["iou"]) * k for r, k in zip(table, kept)])), float(np.mean(kept))


def average(parts, *keys):
    """Mean over the parts of parts[i][key][key]..."""
    values = parts
    for key in keys:
        values = [v[key] for v in values]
    return float(np.mean(values))


def draw_scores(trained, random, words, path):
    """Chart: held-out phrases beside every control, and mean IoU by word. trained, random: results of test.py, one per seed."""
    bars = {
        "refined": average(trained, "mIoU"),
        "coarse": average(trained, "mIoU_coarse"),
        "random\nbase,\nrefined": average(random, "mIoU"),
        "random\nbase,\ncoarse": average(random, "mIoU_coarse"),
    }
    for label, name in (
        ("union of\nobjects", "union"),
        ("best raw\nmap", "raw"),
        ("centre\nbox", "centre"),
        ("whole\npicture", "whole"),
        ("another\nphrase", "other"),
    ):
        bars[label] = average(trained, "controls", name)
    figure, (left, right) = new_figure(1, 2)
    left.bar(range(len(bars)), bars.values(), color=["#2a6fbb"] * 2 + ["#d1603d"] * 2 + ["#5b6770"] * 5)
    left.set_xticks(range(len(bars)), bars, fontsize=7)
    left.set_ylabel("mean IoU of held-out phrases")
    order = sorted(words, key=words.get)
    right.barh(range(len(order)), [words[w] for w in order])
    right.set_yticks(range(len(order)), order, fontsize=7)
    right.set_xlabel("mean IoU of phrases with this word")
    return save_figure(figure, path)


def scenes(folder, base, seeds):
    """Coarse and refined masks of held-out scenes with every control, means over the seeds; interval over pictures."""
    trained, random = (
        [results(folder / f"test-{base}-{s}{control}") for s in seeds] for control in ("", "-random")
    )
    tables, random_tables = (
        [rows(folder / f"test-{base}-{s}{control}") for s in seeds] for control in ("", "-random")
    )
    (sure, kept), (sure_random, kept_random) = (
        np.mean([confident(t) for t in part], axis=0).tolist() for part in (tables, random_tables)
    )
    pooled, words = [r for t in tables for r in t], per_word([r for t in tables for r in t])
    pictures = [f"{s}{r['file']}" for s, t in enumerate(tables) for r in t]
    chart = draw_scores(trained, random, words, folder / "figures" / f"{base}.png")
    overlays = sorted((folder / f"test-{base}-{seeds[0]}" / "overlays").glob("*.png"))[:4]
    blind = {
        "best raw map": average(trained, "controls", "raw"),
        "union of all objects": average(trained, "controls", "union"),
        "whole picture": average(trained, "controls", "whole"),
        "centre box": average(trained, "controls", "centre"),
    }
    note = (
        f"{trained[0]['phrases']} phrases of held-out scenes, seeds {seeds} (base, scenes of its pre-training, head); "
        "interval over pictures"
    )
    write_result(
        folder,
        f"mask head on a frozen tiny {base} base",
        "mean IoU of coarse masks",
        average(trained, "mIoU_coarse"),
        {
            "same head on a random base": average(random, "mIoU_coarse"),
            "another phrase's mask on a random base": average(random, "controls", "other_coarse"),
            "another phrase's coarse mask": average(trained, "controls", "other_coarse"),
            **blind,
        },
        bootstrap([float(r["iou_coarse"]) for r in pooled], pictures),
        [
            (chart, "held-out phrases against controls, and by word"),
            *((p, "picture, truth, coarse and refined masks") for p in overlays),
        ],
        note,
        {
            "per_seed": [t["mIoU_coarse"] for t in trained],
            "per_seed_random": [r["mIoU_coarse"] for r in random],
            "by_word": words,
        },
    )
    write_result(
        folder,
        f"SAM refiner after it, {base}",
        "mean IoU of refined masks",
        average(trained, "mIoU"),
        {
            "coarse masks": average(trained, "mIoU_coarse"),
            "refiner on a random base": average(random, "mIoU"),
            "another phrase's mask on a random base": average(random, "controls", "other"),
            "another phrase's mask": average(trained, "controls", "other"),
            **blind,
        },
        bootstrap([float(r["iou"]) for r in pooled], pictures),
        note=f"{note}. The masks of two phrases of a picture have an IoU of {average(trained, 'alike'):.3f}, on a random base of "
        f"{average(random, 'alike'):.3f}, and there of {average(random, 'all_objects'):.3f} with all objects together (near 1: "
        "every object, whatever the phrase). With masks of predicted IoU below .5 counted as none: "
        f"{sure:.3f}, on a random base {sure_random:.3f}",
        details={
            "per_seed": [t["mIoU"] for t in trained],
            "per_seed_random": [r["mIoU"] for r in random],
            "cIoU": average(trained, "cIoU"),
            "predicted_iou": average(trained, "score"),
            "predicted_iou_random": average(random, "score"),
            "confident_masks_only": {"mIoU": sure, "kept": kept},
            "confident_masks_only_random": {"mIoU": sure_random, "kept": kept_random},
        },
    )


def beside_the_masks(folder, base, seeds):
    """Objects that hide each other, the words that the base knows, the base left untouched, the keyword selector."""
    overlap = [results(folder / f"test-{base}-{s}-overlap") for s in seeds]
    write_result(
        folder,
        f"objects that hide each other, {base}",
        "mean IoU of refined masks",
        average(overlap, "mIoU"),
        {
            "coarse masks": average(overlap, "mIoU_coarse"),
            **{k: average(overlap, "controls", k) for k in ("other", "union", "raw", "whole", "centre")},
        },
        note=f"the head has been trained on separate objects only; seeds {seeds}",
        details={"per_seed": [o["mIoU"] for o in overlap]},
    )
    known = [json.loads((folder / f"words-{base}-{s}.json").read_text()) for s in seeds]
    write_result(
        folder,
        f"shape words of the base, {base}",
        "share right among the four",
        average(known, "shape", "right picture"),
        {"next picture": average(known, "shape", "next picture"), "chance": known[0]["shape"]["chance"]},
        note=f"teacher-forced captions of held-out scenes, seeds {seeds}; colours, sizes and textures are in the details",
        details={kind: [k[kind]["right picture"] for k in known] for kind in known[0]},
    )
    untouched = json.loads((folder / f"untouched-{base}.json").read_text())
    write_result(
        folder,
        f"base untouched, {base}",
        "weights and answers changed (0 is right)",
        untouched["tensors_changed"] + untouched["answers_changed"],
        {"compared": untouched["tensors"] + untouched["answers"]},
        note=f"greedy answer: {untouched['example']!r}",
    )
    scores = json.loads((folder / f"selector-{base}.json").read_text())
    write_result(
        folder,
        f"keyword selector, {base}",
        "F1 over words",
        scores["selector"]["F1"],
        {name: scores[name]["F1"] for name in ("noun phrases", "every word")},
        note="validation scenes",
    )


def photos(folder):
    """The study on photographs: the held-out ones, and eight pictures learned by heart."""
    held, fit, table = (
        results(folder / "test-photos"),
        results(folder / "test-photos-overfit"),
        rows(folder / "test-photos"),
    )
    write_result(
        folder,
        "photographs",
        "mean IoU",
        held["mIoU"],
        {
            "coarse": held["mIoU_coarse"],
            "whole picture": held["controls"]["whole"],
            "centre box": held["controls"]["centre"],
            "best raw map": held["controls"]["raw"],
            "another phrase's mask": held["controls"]["other"],
        },
        bootstrap([float(r["iou"]) for r in table], [r["file"] for r in table]),
        note="the base has never seen a photograph: no grounding is to be expected, only that loader and metric are right",
        details=held,
    )
    write_result(
        folder,
        "photographs, 8 pictures by heart",
        "mean IoU on these pictures",
        fit["mIoU"],
        {"whole picture": fit["controls"]["whole"], "centre box": fit["controls"]["centre"]},
        figures=[
            (p, "picture, truth, coarse, refined")
            for p in sorted((folder / "test-photos-overfit" / "overlays").glob("*.png"))[:3]
        ],
        note="overfit: the pipeline can fit real masks; says nothing about other pictures",
    )


def main(args):
    folder = args.runs / "flmm"
    if args.photos:
        photos(folder)
    else:
        scenes(folder, args.base, args.seeds)
        beside_the_masks(folder, args.base, args.seeds)
    print(
        f"results in {folder / 'results'}, chart in {folder / 'figures'}, pictures in {folder}/test-*/overlays"
    )


if __name__ == "__main__":
    run(main, parse_args())
