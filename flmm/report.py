"""Collect the built-in run (and the study on photographs) into results and figures for the closing table.

python flmm/report.py --runs runs --base llava --seeds 0 1 2
"""

import argparse
import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root: every way of starting this file finds it


import numpy as np

from common.errors import UserError, run
from common.figures import new_figure, save_figure
from common.summary import write_result


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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


def scenes(args):
    folder = args.runs / "flmm"
    trained = [results(folder / f"test-{args.base}-{s}") for s in args.seeds]
    random = [results(folder / f"test-{args.base}-{s}-random") for s in args.seeds]
    tables = [rows(folder / f"test-{args.base}-{s}") for s in args.seeds]
    random_tables = [rows(folder / f"test-{args.base}-{s}-random") for s in args.seeds]
    sure, sure_random = (np.mean([confident(t) for t in part], axis=0).tolist() for part in (tables, random_tables))

    def mean(parts, key):
        return float(np.mean([p[key] for p in parts]))

    other = {
        label: float(np.mean([t["controls"][name] for t in trained]))
        for label, name in (
            ("another phrase's mask", "other"),
            ("another phrase's coarse mask", "other_coarse"),
            ("best raw map", "raw"),
            ("union of all objects", "union"),
            ("whole picture", "whole"),
            ("centre box", "centre"),
        )
    }
    random_other = {name: float(np.mean([r["controls"][name] for r in random])) for name in ("other", "other_coarse")}
    pooled = [r for t in tables for r in t]
    pictures = [f"{s}{r['file']}" for s, t in enumerate(tables) for r in t]
    figure, (left, right) = new_figure(1, 2)
    bars = {
        "refined": mean(trained, "mIoU"),
        "coarse": mean(trained, "mIoU_coarse"),
        "random\nbase,\nrefined": mean(random, "mIoU"),
        "random\nbase,\ncoarse": mean(random, "mIoU_coarse"),
        "union of\nobjects": other["union of all objects"],
        "best raw\nmap": other["best raw map"],
        "centre\nbox": other["centre box"],
        "whole\npicture": other["whole picture"],
        "another\nphrase": other["another phrase's mask"],
    }
    left.bar(range(len(bars)), bars.values(), color=["#2a6fbb"] * 2 + ["#d1603d"] * 2 + ["#5b6770"] * 5)
    left.set_xticks(range(len(bars)), bars, fontsize=7)
    left.set_ylabel("mean IoU of held-out phrases")
    words = per_word([r for t in tables for r in t])
    order = sorted(words, key=words.get)
    right.barh(range(len(order)), [words[w] for w in order])
    right.set_yticks(range(len(order)), order, fontsize=7)
    right.set_xlabel("mean IoU of phrases with this word")
    chart = save_figure(figure, folder / "figures" / f"{args.base}.png")
    overlays = sorted((folder / f"test-{args.base}-{args.seeds[0]}" / "overlays").glob("*.png"))[:4]
    note = (
        f"{trained[0]['phrases']} phrases of held-out scenes, seeds {args.seeds} (base, scenes of its pre-training, head); "
        "interval over pictures"
    )
    write_result(
        folder,
        f"mask head on a frozen tiny {args.base} base",
        "mean IoU of coarse masks",
        mean(trained, "mIoU_coarse"),
        {
            "same head on a random base": mean(random, "mIoU_coarse"),
            "another phrase's mask on a random base": random_other["other_coarse"],
            **{k: v for k, v in other.items() if k != "another phrase's mask"},
        },
        bootstrap([float(r["iou_coarse"]) for r in pooled], pictures),
        [(chart, "held-out phrases against controls, and by word"), *((p, "picture, truth, coarse and refined masks") for p in overlays)],
        note,
        {"per_seed": [t["mIoU_coarse"] for t in trained], "per_seed_random": [r["mIoU_coarse"] for r in random], "by_word": words},
    )
    write_result(
        folder,
        f"SAM refiner after it, {args.base}",
        "mean IoU of refined masks",
        mean(trained, "mIoU"),
        {
            "coarse masks": mean(trained, "mIoU_coarse"),
            "refiner on a random base": mean(random, "mIoU"),
            "another phrase's mask on a random base": random_other["other"],
            **{k: v for k, v in other.items() if k != "another phrase's coarse mask"},
        },
        bootstrap([float(r["iou"]) for r in pooled], pictures),
        note=note
        + "; on a random base the refiner cuts out some object whatever the phrase: another phrase's mask scores nearly as well there. "
        + f"With masks of predicted IoU below .5 counted as none: {sure[0]:.3f}, on a random base {sure_random[0]:.3f}",
        details={
            "per_seed": [t["mIoU"] for t in trained],
            "per_seed_random": [r["mIoU"] for r in random],
            "cIoU": mean(trained, "cIoU"),
            "predicted_iou": mean(trained, "score"),
            "predicted_iou_random": mean(random, "score"),
            "confident_masks_only": {"mIoU": sure[0], "kept": sure[1]},
            "confident_masks_only_random": {"mIoU": sure_random[0], "kept": sure_random[1]},
        },
    )
    overlap = [results(folder / f"test-{args.base}-{s}-overlap") for s in args.seeds]
    write_result(
        folder,
        f"objects that hide each other, {args.base}",
        "mean IoU of refined masks",
        mean(overlap, "mIoU"),
        {
            "coarse masks": mean(overlap, "mIoU_coarse"),
            **{k: float(np.mean([o["controls"][k] for o in overlap])) for k in ("other", "union", "raw", "whole", "centre")},
        },
        note=f"the head has been trained on separate objects only; seeds {args.seeds}",
        details={"per_seed": [o["mIoU"] for o in overlap]},
    )
    known = [json.loads((folder / f"words-{args.base}-{s}.json").read_text()) for s in args.seeds]
    write_result(
        folder,
        f"shape words of the base, {args.base}",
        "share right among the four",
        float(np.mean([k["shape"]["right picture"] for k in known])),
        {"next picture": float(np.mean([k["shape"]["next picture"] for k in known])), "chance": known[0]["shape"]["chance"]},
        note=f"teacher-forced captions of held-out scenes, seeds {args.seeds}; colours, sizes and textures are in the details",
        details={kind: [k[kind]["right picture"] for k in known] for kind in known[0]},
    )
    untouched = json.loads((folder / f"untouched-{args.base}.json").read_text())
    write_result(
        folder,
        f"base untouched, {args.base}",
        "weights and answers changed (0 is right)",
        untouched["tensors_changed"] + untouched["answers_changed"],
        {"compared": untouched["tensors"] + untouched["answers"]},
        note=f"greedy answer: {untouched['example']!r}",
    )
    scores = json.loads((folder / f"selector-{args.base}.json").read_text())
    write_result(
        folder,
        f"keyword selector, {args.base}",
        "F1 over words",
        scores["selector"]["F1"],
        {name: scores[name]["F1"] for name in ("noun phrases", "every word")},
        note="validation scenes",
    )


def photos(args):
    folder = args.runs / "flmm"
    held, fit = results(folder / "test-photos"), results(folder / "test-photos-overfit")
    picture = sorted((folder / "test-photos-overfit" / "overlays").glob("*.png"))[:3]
    write_result(
        folder,
        "photographs, val_panoptic",
        "mean IoU",
        held["mIoU"],
        {
            "coarse": held["mIoU_coarse"],
            "whole picture": held["controls"]["whole"],
            "centre box": held["controls"]["centre"],
            "best raw map": held["controls"]["raw"],
            "another phrase's mask": held["controls"]["other"],
        },
        bootstrap([float(r["iou"]) for r in rows(folder / "test-photos")], [r["file"] for r in rows(folder / "test-photos")]),
        note="the base has never seen a photograph: no grounding is to be expected, only that loader and metric are right",
        details=held,
    )
    write_result(
        folder,
        "photographs, 8 pictures by heart",
        "mean IoU on these pictures",
        fit["mIoU"],
        {"whole picture": fit["controls"]["whole"], "centre box": fit["controls"]["centre"]},
        figures=[(p, "picture, truth, coarse, refined") for p in picture],
        note="overfit: the pipeline can fit real masks; says nothing about other pictures",
    )


def main(args):
    photos(args) if args.photos else scenes(args)


if __name__ == "__main__":
    run(main, parse_args())
