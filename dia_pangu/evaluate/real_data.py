"""The parts of dia_pangu that real data can test: reading CT files, the labeler, a language model on real reports.

    python dia_pangu/evaluate/real_data.py --data-root DATA_ROOT --ckpt-path runs/dia_pangu/ft --lang-encoder-path LLM --out runs/dia_pangu

DATA_ROOT/ct holds volumes/*.nii.gz, dicom_series/ and ct_reports_{train,val}.json (CT-RATE reports with 18 labels). No public
volume comes with its report, so no report of a real volume is scored; the reports of `--volume` come from a model that has
seen phantoms alone and show that the path works, not what is in the scan.
"""
import argparse
import json
import math
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root: every way of starting this file finds it

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from common.errors import UserError, run
from common.figures import new_figure, save_figure
from common.summary import write_result
from dia_pangu.evaluate.findings import bootstrap, finding_scores, micro_f1
from dia_pangu.evaluate.labeler import positives
from dia_pangu.src.Dataset.preprocess import Grid, load_volume, read_hu
from dia_pangu.src.Dataset.prompt import FINDINGS
from dia_pangu.src.Model.pangu import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
# CT-RATE's label -> ours. Septal thickening is the CT sign of interstitial edema; "Medical material" is a device or suture.
# The other ten CT-RATE labels (emphysema, hernia, calcification ...) have no counterpart among the 14 findings.
SAME = {"Medical material": "support devices", "Cardiomegaly": "cardiomegaly", "Atelectasis": "atelectasis",
        "Lung nodule": "lung lesion", "Lung opacity": "lung opacity", "Pleural effusion": "pleural effusion",
        "Consolidation": "consolidation", "Interlobular septal thickening": "edema"}


def read_reports(path):
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        columns = [content["label_names"].index(name) for name in SAME]
        cases = content["cases"]
        return [case["report"] for case in cases], np.array([[case["labels"][c] for c in columns] for case in cases]).astype(bool)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path}: expected label_names and cases with report and labels ({error})") from error


def labeler_study(args):
    """The rule-based labeler against the hand-set labels, beside TF-IDF with logistic regressions fitted on the 800."""
    folder = Path(args.data_root) / "ct"
    texts, labels = read_reports(folder / "ct_reports_train.json")
    held_texts, held = read_reports(folder / "ct_reports_val.json")
    columns = [FINDINGS.index(name) for name in SAME.values()]
    ruled = np.array(positives(held_texts)).astype(bool)[:, columns]
    vectors = TfidfVectorizer(ngram_range=(1, 3), min_df=2, sublinear_tf=True)
    x, held_x = vectors.fit_transform(texts), vectors.transform(held_texts)
    learned = np.stack([LogisticRegression(C=10, class_weight="balanced", max_iter=1000).fit(x, labels[:, c]).predict(held_x)
                        for c in range(len(SAME))], axis=1).astype(bool)
    scores, reference = finding_scores(held, ruled, list(SAME)), finding_scores(held, learned, list(SAME))
    print(f"labeler on {len(held)} real reports, {len(SAME)} findings: macro-F1 {scores['macro']['F1']:.3f}, micro-F1 "
          f"{scores['micro']['F1']:.3f}; TF-IDF + logistic: {reference['macro']['F1']:.3f}, {reference['micro']['F1']:.3f}")
    for name, row in scores["per_finding"].items():
        print(f"  {name:32s} {row['count']:3d} cases  rules F1 {row['F1']:.3f}  TF-IDF {reference['per_finding'][name]['F1']:.3f}")
    everything = finding_scores(held, held | True, list(SAME))
    write_result(args.out, "labeler on real reports", "macro-F1", scores["macro"]["F1"],
                 {"TF-IDF + logistic on the 800": reference["macro"]["F1"], "all positive": everything["macro"]["F1"]},
                 bootstrap(lambda t, p: finding_scores(t, p, list(SAME))["macro"]["F1"], held, ruled),
                 note=f"{len(held)} CT-RATE validation reports, the {len(SAME)} of 18 labels with a counterpart here; no training; "
                 f"micro-F1 {micro_f1(held, ruled):.2f} against {micro_f1(held, learned):.2f}",
                 details={"rules": scores, "tf-idf": reference})


def report_model(args):
    """A small language model on the 800 real reports: perplexity per token on the 97, beside a unigram model's."""
    folder, out = Path(args.data_root) / "ct", Path(args.out) / "llm_real"
    steps = 4 if args.smoke else args.steps
    subprocess.run([sys.executable, str(ROOT / "dia_pangu" / "warm_llm.py"), "--reports", str(folder / "ct_reports_train.json"),
                    "--eval-reports", str(folder / "ct_reports_val.json"), "--make", "4", "--vocab-size", "1500", "--max-steps", str(steps),
                    "--per-device-train-batch-size", "8", "--logging-steps", "20", "--out", str(out), "--overwrite"], check=True)
    trained = json.loads((out / "metrics.json").read_text())
    tokenizer = load_tokenizer(out / "model")
    texts, held = (read_reports(folder / f"ct_reports_{part}.json")[0] for part in ("train", "val"))
    counts = Counter(token for text in texts for token in tokenizer(text).input_ids)
    total = sum(counts.values()) + len(tokenizer)
    ids = [token for text in held for token in tokenizer(text).input_ids]
    unigram = math.exp(-np.mean([math.log((counts[token] + 1) / total) for token in ids]))
    write_result(args.out, "report model on real text", "perplexity per token, lower is better", trained["perplexity"],
                 {"unigram": unigram, "uniform": len(tokenizer)},
                 note=f"{len(texts)} training reports, {len(held)} held out, {steps} steps of 8 reports, texts cut at 512 tokens")


def volumes(args):
    """Real files through reading, preparation and the model, with pictures."""
    folder = Path(args.data_root) / "ct"
    files = sorted(p for p in (folder / "volumes").glob("*.nii.gz") if not p.name.endswith("_seg.nii.gz"))
    if find_spec("pydicom"):
        files.append(folder / "dicom_series")
    else:
        print("dicom_series left out: reading DICOM needs pydicom (pip install pydicom)")
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
        figure.suptitle(f"{name}: {hu.shape} voxels of {steps} mm, HU {hu.min():.0f} to {hu.max():.0f}", fontsize=9)
        picture = save_figure(figure, Path(args.out) / "figures" / f"real_{name}.png")
        figures.append((picture, f"{name}: three windows of the model's input"))
        facts[name] = {"shape": hu.shape, "spacing_mm": spacing, "hu": [float(hu.min()), float(hu.max())], "slices": int(len(filled))}
        print(name, facts[name])
        subprocess.run([sys.executable, str(ROOT / "dia_pangu" / "test.py"), "--ckpt-path", args.ckpt_path, "--lang-encoder-path",
                        args.lang_encoder_path, "--volume", str(path), "--max-new-tokens", "60",
                        "--out", str(Path(args.out) / f"real-{name}")], check=True)
    right = landmarks(folder / "volumes")
    if not right:
        raise UserError(f"{folder / 'volumes'}: no *_seg.nii.gz with organs named left or right")
    write_result(args.out, "organs on their side after reading", "share of named organs", sum(right.values()) / len(right), {"chance": 0.5},
                 None, figures, "Organs of the segmented volume named left or right, liver and spleen, and the vertebrae at the back. "
                 "Volumes and a DICOM series also pass ViT and --volume; the model has seen phantoms alone, so its reports of them mean "
                 "nothing",
                 {"files": facts, "organs": right})


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
    labeler_study(args)
    volumes(args)
    report_model(args)


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
