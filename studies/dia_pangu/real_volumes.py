"""The parts of dia_pangu that real data can test: reading CT files, the labeler, a language model on real reports.

    python dia_pangu/evaluate/real_data.py --data-root DATA_ROOT --ckpt-path MODEL --lang-encoder-path LLM --out runs/dia_pangu

DATA_ROOT/ct holds volumes/*.nii.gz, dicom_series/ and ct_reports_{train,val}.json (CT-RATE reports with 18 labels); what needs
a part that is not there is left out and said so. No public volume comes with its report, so no report of a real volume is
scored; the reports of `--volume` come from a model that has seen phantoms alone and show that the path works, not what is in
the scan.
"""

import argparse
import json
import math
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # repository root: every way of starting this file finds it

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from common.errors import UserError, run
from common.figures import new_figure, save_figure
from studies.summary import write_result
from dia_pangu.evaluate.findings import bootstrap, finding_scores
from dia_pangu.evaluate.labeler import positives
from dia_pangu.src.Dataset.preprocess import Grid, load_volume, read_hu
from dia_pangu.src.Dataset.prompt import FINDINGS
from dia_pangu.src.Model.pangu import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
# CT-RATE's label -> ours. Septal thickening is the CT sign of interstitial edema; "Medical material" is a device or suture.
# The other ten CT-RATE labels (emphysema, hernia, calcification ...) have no counterpart among the 14 findings.
SAME = {
    "Medical material": "support devices",
    "Cardiomegaly": "cardiomegaly",
    "Atelectasis": "atelectasis",
    "Lung nodule": "lung lesion",
    "Lung opacity": "lung opacity",
    "Pleural effusion": "pleural effusion",
    "Consolidation": "consolidation",
    "Interlobular septal thickening": "edema",
}


def read_reports(path):
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        columns = [content["label_names"].index(name) for name in SAME]
        cases = content["cases"]
        return [case["report"] for case in cases], np.array(
            [[case["labels"][c] for c in columns] for case in cases]
        ).astype(bool)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path}: expected label_names and cases with report and labels ({error})") from error


def labeler_study(args, train, held):
    """The rule-based labeler against the hand-set labels of the file `held`, beside TF-IDF with logistic regressions fitted on `train`."""
    held_texts, truth = read_reports(held)
    columns = [FINDINGS.index(name) for name in SAME.values()]
    ruled = np.array(positives(held_texts)).astype(bool)[:, columns]
    answers = {"rules": ruled, "all positive": truth | True}
    if train:
        texts, labels = read_reports(train)
        vectors = TfidfVectorizer(ngram_range=(1, 3), min_df=2, sublinear_tf=True)
        x, held_x = vectors.fit_transform(texts), vectors.transform(held_texts)
        learned = [
            LogisticRegression(C=10, class_weight="balanced", max_iter=1000)
            .fit(x, labels[:, c])
            .predict(held_x)
            for c in range(len(SAME))
        ]
        answers[f"TF-IDF + logistic on the {len(texts)}"] = np.stack(learned, axis=1).astype(bool)
    scores = {name: finding_scores(truth, answer, list(SAME)) for name, answer in answers.items()}
    print(
        f"labeler on {len(truth)} real reports, {len(SAME)} findings: "
        + "; ".join(
            f"{name} macro-F1 {score['macro']['F1']:.3f}, micro-F1 {score['micro']['F1']:.3f}"
            for name, score in scores.items()
        )
    )
    for finding, row in scores["rules"]["per_finding"].items():
        print(
            f"  {finding:32s} {row['count']:3d} cases  "
            + "  ".join(
                f"{name} F1 {score['per_finding'][finding]['F1']:.3f}" for name, score in scores.items()
            )
        )
    write_result(
        args.out,
        "labeler on real reports",
        "macro-F1",
        scores["rules"]["macro"]["F1"],
        {name: score["macro"]["F1"] for name, score in scores.items() if name != "rules"},
        bootstrap(lambda t, p: finding_scores(t, p, list(SAME))["macro"]["F1"], truth, ruled),
        note=f"{len(truth)} CT-RATE reports of {held.name}, the {len(SAME)} of 18 labels with a counterpart here; no training; "
        f"micro-F1 {scores['rules']['micro']['F1']:.2f}",
        details=scores,
    )


def report_model(args, train, held):
    """A small language model on the real reports of `train`: perplexity per token on those of `held`, beside a unigram model's."""
    out = Path(args.out) / "llm_real"
    steps = 4 if args.smoke else args.steps
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "dia_pangu" / "warm_llm.py"),
            "--reports",
            str(train),
            "--eval-reports",
            str(held),
            "--make",
            "4",
            "--vocab-size",
            "1500",
            "--max-steps",
            str(steps),
            "--per-device-train-batch-size",
            "8",
            "--logging-steps",
            "20",
            "--out",
            str(out),
            "--overwrite",
        ],
        check=True,
    )
    trained = json.loads((out / "metrics.json").read_text())
    tokenizer = load_tokenizer(out / "model")
    texts, held = (read_reports(path)[0] for path in (train, held))
    counts = Counter(token for text in texts for token in tokenizer(text).input_ids)
    total = sum(counts.values()) + len(tokenizer)
    ids = [token for text in held for token in tokenizer(text).input_ids]
    unigram = math.exp(-np.mean([math.log((counts[token] + 1) / total) for token in ids]))
    write_result(
        args.out,
        "report model on real text",
        "perplexity per token, lower is better",
        trained["perplexity"],
        {"unigram": unigram, "uniform": len(tokenizer)},
        note=f"{len(texts)} training reports, {len(held)} held out, {steps} steps of 8 reports, texts cut at 512 tokens",
    )


def volumes(args):
    """Real files through reading, preparation and the model, with pictures."""
    folder = Path(args.data_root) / "ct"
    files = sorted(p for p in (folder / "volumes").glob("*.nii.gz") if not p.name.endswith("_seg.nii.gz"))
    if not find_spec("pydicom"):
        print("dicom_series left out: reading DICOM needs pydicom (pip install pydicom)")
    elif (folder / "dicom_series").is_dir():
        files.append(folder / "dicom_series")
    figures, facts = [], {}
    for path in files:
        name = path.name.split(".")[0]
        hu, spacing = read_hu(path)
        prepared = load_volume(path, Grid())
        filled = np.flatnonzero(prepared[0].amax((0, 1)).numpy() > 0.5)
        figure, axes = new_figure(3, 6, 1.6, 1.6)
        for line, channel, window in zip(axes, prepared.numpy(), ("lung", "soft tissue", "bone")):
            for axis, k in zip(line, np.linspace(filled[0], filled[-1], 6).astype(int)):
                axis.imshow(channel[:, :, k], cmap="gray", vmin=0, vmax=1)
                axis.set_axis_off()
                axis.set_title(f"{window}, slice {k + 1}", fontsize=7)
        steps = " x ".join(f"{step:.2f}" for step in spacing)
        figure.suptitle(
            f"{name}: {hu.shape} voxels of {steps} mm, HU {hu.min():.0f} to {hu.max():.0f}", fontsize=9
        )
        picture = save_figure(figure, Path(args.out) / "figures" / f"real_{name}.png")
        figures.append((picture, f"{name}: three windows of the model's input"))
        facts[name] = {
            "shape": hu.shape,
            "spacing_mm": spacing,
            "hu": [float(hu.min()), float(hu.max())],
            "slices": int(len(filled)),
        }
        print(name, facts[name])
        subprocess.run(
            [
                sys.executable,
                str(ROOT / "dia_pangu" / "test.py"),
                "--ckpt-path",
                args.ckpt_path,
                "--lang-encoder-path",
                args.lang_encoder_path,
                "--volume",
                str(path),
                "--max-new-tokens",
                "60",
                "--out",
                str(Path(args.out) / f"real-{name}"),
            ],
            check=True,
        )
    right = landmarks(folder / "volumes")
    if not right:
        print(
            f"{folder / 'volumes'}: no *_seg.nii.gz with organs named left or right, so that sides are not checked"
        )
        return
    write_result(
        args.out,
        "organs on their side after reading",
        "share of named organs",
        sum(right.values()) / len(right),
        {"chance": 0.5},
        None,
        figures,
        "Organs of the segmented volume named left or right, liver and spleen, and the vertebrae at the back. "
        "Volumes and a DICOM series also pass ViT and --volume; the model has seen phantoms alone, so its reports of them mean "
        "nothing",
        {"files": facts, "organs": right},
    )


def landmarks(folder) -> dict:
    """Organ -> whether its centre lies where it should after `read_hu`, from the segmentations beside the volumes."""
    out = {}
    for path in sorted(folder.glob("*_seg.nii.gz")):
        names = json.loads((folder / path.name.replace("_seg.nii.gz", "_seg_labels.json")).read_text())
        labels, _ = read_hu(path)  # (H front to back, W right to left, D)
        for number, name in names.items():
            where = np.argwhere(labels == int(number))
            if not len(where):
                continue
            middle = where.mean(0) / labels.shape
            if name.endswith(("_left", "_right")) or name in ("liver", "spleen"):
                out[name] = bool((middle[1] < 0.5) == (name.endswith("_right") or name == "liver"))
            elif name.startswith("vertebrae"):
                out[name] = bool(middle[0] > 0.5)
    return out


def main(args):
    if not (Path(args.data_root) / "ct").is_dir():
        raise UserError(f"{args.data_root}: no folder ct/ in it; DATA_ROOT is the folder that holds ct/")
    reports = sorted(
        (Path(args.data_root) / "ct").glob("ct_reports_*.json"), reverse=True
    )  # val before others
    train = next((path for path in reports if path.name == "ct_reports_train.json"), None)
    held = next((path for path in reports if path != train), None)
    if held:
        labeler_study(args, train, held)
    volumes(args)
    if train and held:
        report_model(args, train, held)
    else:
        print(
            "the language model on real reports is left out: it needs ct_reports_train.json and another ct_reports_*.json"
        )


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-root", required=True, help="folder that holds ct/")
    parser.add_argument("--ckpt-path", required=True, help="folder that train.py wrote")
    parser.add_argument("--lang-encoder-path", required=True, help="folder of the language model")
    parser.add_argument("--out", required=True, help="folder for figures/ and results/")
    parser.add_argument("--steps", type=int, default=150, help="of the report model (default %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few steps only")
    return parser.parse_args()


if __name__ == "__main__":
    run(main, parse_args())
