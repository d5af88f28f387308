"""Collect the built-in study, or the real one, into results and figures for the closing table.

python studies/flmm/report.py --runs runs --base llava --seeds 0 1 2
"""

import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np

from common.arguments import Parser, refuse
from common.errors import UserError, run
from common.figures import new_figure, save_figure
from common.intervals import bootstrap
from studies.summary import write_result


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder that holds flmm/test-*")
    parser.add_argument("--base", default="llava", help="family of the base of the built-in study")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of the built-in study")
    parser.add_argument("--real", action="store_true", help="report the real study instead")
    return parser.parse_args(argv)


def read(path):
    """Content of a JSON file that an earlier stage has written."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the recipe of this study from its start") from None


def results(folder):
    """Scores of one run of test.py."""
    return read(folder / "results.json")


def rows(folder):
    """Phrases of one run of test.py, as dictionaries of text."""
    with open(folder / "phrases.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def interval(tables, name):
    """95 % interval of the mean of column `name` over the phrases of all tables.

    Whole pictures are resampled. Every seed has scored the same ones, so a picture comes with its rows in all
    tables: more seeds do not make more pictures.
    """
    table = [row for part in tables for row in part]
    values = np.array([float(row[name]) for row in table])
    return bootstrap(np.mean, values, groups=[row["file"] for row in table])


def per_word(table):
    """Mean IoU of the phrases that hold each word."""
    words = sorted({word for row in table for word in row["phrase"].split()})
    return {
        word: float(np.mean([float(row["iou"]) for row in table if word in row["phrase"].split()]))
        for word in words
    }


def confident(table):
    """Mean IoU when a mask of predicted IoU below one half counts as none, and the fraction of masks that
    stay."""
    kept = np.array([float(row["score"]) > 0.5 for row in table])
    ious = np.array([float(row["iou"]) for row in table])
    return float((ious * kept).mean()), float(kept.mean())


def average(parts, *keys):
    """Mean over the parts of parts[i][key][key]..."""
    values = parts
    for key in keys:
        values = [value[key] for value in values]
    return float(np.mean(values))


def draw_scores(trained, random, words, path):
    """Chart: held-out phrases beside every control, and mean IoU by word. trained, random: scores, one per
    seed."""
    bars = {
        "refined": average(trained, "mIoU"),
        "coarse": average(trained, "mIoU_coarse"),
        "random\nbase,\nrefined": average(random, "mIoU"),
        "random\nbase,\ncoarse": average(random, "mIoU_coarse"),
    }
    controls = {
        "union of\nobjects": "union",
        "best raw\nmap": "raw",
        "centre\nbox": "centre",
        "whole\npicture": "whole",
        "another\nphrase": "other",
    }
    bars |= {label: average(trained, "controls", name) for label, name in controls.items()}
    figure, (left, right) = new_figure(1, 2)
    left.bar(range(len(bars)), bars.values(), color=["#2a6fbb"] * 2 + ["#d1603d"] * 2 + ["#5b6770"] * 5)
    left.set_xticks(range(len(bars)), bars, fontsize=7)
    left.set_ylabel("mean IoU of held-out phrases")
    order = sorted(words, key=words.get)
    right.barh(range(len(order)), [words[word] for word in order])
    right.set_yticks(range(len(order)), order, fontsize=7)
    right.set_xlabel("mean IoU of phrases with this word")
    return save_figure(figure, path)


def blind_controls(trained):
    """What needs no word of the phrase: means over the seeds."""
    names = {
        "best raw map": "raw",
        "three localisation heads": "heads",
        "mean of all maps": "mean",
        "decomposed fusion": "fusion",
        "union of all objects": "union",
        "whole picture": "whole",
        "centre box": "centre",
    }
    return {label: average(trained, "controls", name) for label, name in names.items()}


def coarse_masks(folder, base, trained, random, tables, note):
    """Row of the mask head alone, with the chart."""
    words = per_word([row for table in tables for row in table])
    chart = draw_scores(trained, random, words, folder / "figures" / f"{base}.png")
    write_result(
        folder,
        f"mask head on a frozen tiny {base} base",
        "mean IoU of coarse masks",
        average(trained, "mIoU_coarse"),
        {
            "same head on a random base": average(random, "mIoU_coarse"),
            "another phrase's mask on a random base": average(random, "controls", "other_coarse"),
            "another phrase's coarse mask": average(trained, "controls", "other_coarse"),
            **blind_controls(trained),
        },
        interval(tables, "iou_coarse"),
        [(chart, "held-out phrases against controls, and by word")],
        note,
        {
            "per_seed": [scores["mIoU_coarse"] for scores in trained],
            "per_seed_random": [scores["mIoU_coarse"] for scores in random],
            "by_word": words,
        },
    )


def refined_masks(folder, base, trained, random, tables, random_tables, note, overlays):
    """Row of the masks after SAM, with some pictures and what a random base's masks have in common."""
    sure, kept = np.mean([confident(table) for table in tables], axis=0).tolist()
    sure_random, kept_random = np.mean([confident(table) for table in random_tables], axis=0).tolist()
    write_result(
        folder,
        f"masks refined by SAM, {base} base",
        "mean IoU of refined masks",
        average(trained, "mIoU"),
        {
            "coarse masks": average(trained, "mIoU_coarse"),
            "refiner on a random base": average(random, "mIoU"),
            "another phrase's mask on a random base": average(random, "controls", "other"),
            "another phrase's mask": average(trained, "controls", "other"),
            **blind_controls(trained),
        },
        interval(tables, "iou"),
        [(path, "picture, truth, coarse and refined masks") for path in overlays],
        f"{note}. The masks of two phrases of a picture have an IoU of {average(trained, 'alike'):.3f}, "
        f"on a random base of {average(random, 'alike'):.3f}, and there of "
        f"{average(random, 'all_objects'):.3f} with all objects together (near 1: every object, whatever the "
        "phrase). With masks of predicted IoU below .5 "
        f"counted as none: {sure:.3f}, on a random base {sure_random:.3f}",
        details={
            "per_seed": [scores["mIoU"] for scores in trained],
            "per_seed_random": [scores["mIoU"] for scores in random],
            "cIoU": average(trained, "cIoU"),
            "predicted_iou": average(trained, "score"),
            "predicted_iou_random": average(random, "score"),
            "confident_masks_only": {"mIoU": sure, "kept": kept},
            "confident_masks_only_random": {"mIoU": sure_random, "kept": kept_random},
        },
        headline=base == "llava",
    )


def scenes(folder, base, seeds):
    """Coarse and refined masks of held-out scenes beside every control, means over the seeds."""
    folders = [folder / f"test-{base}-{seed}" for seed in seeds]
    random_folders = [folder / f"test-{base}-{seed}-random" for seed in seeds]
    trained, random = [results(f) for f in folders], [results(f) for f in random_folders]
    tables, random_tables = [rows(f) for f in folders], [rows(f) for f in random_folders]
    note = (
        f"{trained[0]['phrases']} phrases of held-out scenes, seeds {seeds} (base, scenes of its "
        "pre-training, head); "
        "the interval covers other pictures, not other seeds"
    )
    coarse_masks(folder, base, trained, random, tables, note)
    overlays = sorted((folders[0] / "overlays").glob("*.png"))[:4]
    refined_masks(folder, base, trained, random, tables, random_tables, note, overlays)


def beside_the_masks(folder, base, seeds):
    """Objects that hide each other, the words that the base knows, the base left untouched, the keyword
    selector."""
    overlap = [results(folder / f"test-{base}-{seed}-overlap") for seed in seeds]
    controls = {
        name: average(overlap, "controls", name) for name in ("other", "union", "raw", "whole", "centre")
    }
    write_result(
        folder,
        f"objects that hide each other, {base}",
        "mean IoU of refined masks",
        average(overlap, "mIoU"),
        {"coarse masks": average(overlap, "mIoU_coarse"), **controls},
        note=f"the head has been trained on separate objects only; seeds {seeds}",
        details={"per_seed": [scores["mIoU"] for scores in overlap]},
    )
    known = [read(folder / f"words-{base}-{seed}.json") for seed in seeds]
    write_result(
        folder,
        f"shape words of the base, {base}",
        "fraction right among the four",
        average(known, "shape", "right picture"),
        {"next picture": average(known, "shape", "next picture"), "chance": known[0]["shape"]["chance"]},
        note=f"teacher-forced captions of held-out scenes, seeds {seeds}; colours, sizes and textures are in "
        "the details",
        details={kind: [words[kind]["right picture"] for words in known] for kind in known[0]},
    )
    untouched = read(folder / f"untouched-{base}.json")
    write_result(
        folder,
        f"base untouched, {base}",
        "weights and answers that training changed, lower is better",
        untouched["tensors_changed"] + untouched["answers_changed"],
        {"compared": untouched["tensors"] + untouched["answers"]},
        note=f"greedy answer: {untouched['example']!r}",
    )
    scores = read(folder / f"selector-{base}" / "metrics.json")
    write_result(
        folder,
        f"keyword selector, {base}",
        "F1 over words",
        scores["selector"]["F1"],
        {name: scores[name]["F1"] for name in ("noun phrases", "every word")},
        note="validation scenes",
    )


def presence(folder, base, seeds):
    """What is there against what is not, on fresh scenes."""
    found = [read(folder / f"presence-{base}-{seed}.json") for seed in seeds]
    kinds = [name.removeprefix("presence_auc, ") for name in found[0] if name.startswith("presence_auc, ")]
    write_result(
        folder,
        f"presence, {base}",
        "AUC against phrases of what is not there",
        average(found, "presence_auc, all"),
        {
            "chance": 0.5,
            "the score instead": average(found, "score_auc, all"),
            "hardest kind": min(average(found, f"presence_auc, {kind}") for kind in kinds),
        },
        figures=[
            (folder / f"head-{base}-{seeds[0]}" / "reliability.png", "predicted against happened, validation")
        ],
        note="swapped colour, swapped shape, absent object and nonsense on "
        f"{found[0]['scenes']} fresh scenes, seeds {seeds}; calibrated on validation "
        f"scenes; N-acc {average(found, 'N_acc'):.3f}, T-acc {average(found, 'T_acc'):.3f}, score "
        f"against true IoU: correlation {average(found, 'score_iou_correlation'):.3f}",
        details={"per_seed": found},
    )


def real(folder, seeds):
    """The study on photographs with real weights."""
    folders = [folder / f"test-{seed}" for seed in seeds]
    trained, tables = [results(f) for f in folders], [rows(f) for f in folders]
    controls, intervals = {}, {"whole picture": interval(tables[:1], "iou_whole")}
    for name in ("random tower", "random llm", "pilot"):
        parts = [folder / f"test-{name.replace(' ', '-')}-{seed}" for seed in seeds]
        if parts[0].is_dir():  # a smoke run has not all of them
            controls[name] = average([results(part) for part in parts], "mIoU")
            intervals[name] = interval([rows(part) for part in parts], "iou")
    controls["another phrase's mask"] = average(trained, "controls", "other")
    controls |= blind_controls(trained)
    overlays = sorted((folders[0] / "overlays").glob("*.png"))[:6]
    write_result(
        folder,
        "photographs, EfficientNet-lite0 and SmolLM2-135M",
        "mean IoU of coarse masks",
        average(trained, "mIoU"),
        controls,
        interval(tables, "iou"),
        [(path, "picture, truth, coarse masks") for path in overlays],
        f"{trained[0]['phrases']} phrases of held-out photographs, seeds {seeds} of the head; the base is "
        "taught once on captions and phrase boxes of the training photographs",
        {
            "per_seed": [scores["mIoU"] for scores in trained],
            "intervals": {name: [float(v) for v in pair] for name, pair in intervals.items()},
            "average_recall": trained[0]["average_recall"],
        },
    )


def main(args):
    folder = args.runs / "flmm"
    if args.real:
        refuse(args, ["base"], "beside --real")
        real(folder, args.seeds)
    else:
        scenes(folder, args.base, args.seeds)
        presence(folder, args.base, args.seeds)
        beside_the_masks(folder, args.base, args.seeds)
    print(
        f"results in {folder / 'results'}, chart in {folder / 'figures'}, pictures in "
        f"{folder}/test-*/overlays"
    )


if __name__ == "__main__":
    run(main, parse_args())
