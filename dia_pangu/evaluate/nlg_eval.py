"""Score a csv of reports: BLEU, METEOR, ROUGE-L, CIDEr, and the 14 findings. Upstream: utils/nlg_eval.py, evaluate/Evaluate.py.

    python dia_pangu/evaluate/nlg_eval.py --csv results.csv --out scores.json

Any csv with the columns `Ground Truth` and `Pred` works; no model is needed. BLEU_1 ... CIDEr at the top of the json follow the
published tables: words are what stands between spaces, case and punctuation kept (Chinese: jieba words), METEOR is the 1.5
jar. The same scores in the usual convention (lower case, punctuation apart; sacrebleu, rouge-score) stand under "standard".
BLEU hardly tells a model from a retrieved report when reports are alike: read the finding scores first.
"""

import argparse
import ast
import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # repository root: every way of starting this file finds it

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider_scorer import CiderScorer
from pycocoevalcap.meteor import meteor as meteor_package
from pycocoevalcap.rouge.rouge import Rouge

from common.checkpoint import atomic_write
from common.errors import UserError, run
from dia_pangu.evaluate.findings import bootstrap, finding_scores, micro_f1
from dia_pangu.evaluate.labeler import CheXbert, language_of, positives
from dia_pangu.src.Dataset.prompt import FINDINGS

METEOR_SECONDS = 600  # the jar needs about a second for 100 reports


def words(text: str, language: str) -> str:
    """One line with words between single spaces; NUL and line breaks are no words. Chinese is cut by jieba."""
    text = " ".join(text.replace("\0", " ").split())
    if language != "cn":
        return text
    import jieba

    jieba.setLogLevel("ERROR")
    return " ".join(word for word in jieba.lcut(text.replace(" ", "")) if word.strip())


def bleu(truths, predictions) -> tuple[list[float], list[list[float]]]:
    """Corpus BLEU-1..4 with the closest reference length, and the same per sample."""
    scorer = BleuScorer(n=4)
    for truth, prediction in zip(truths, predictions):
        scorer += (prediction, [truth])
    return scorer.compute_score(option="closest", verbose=0)


def rouge_l(truths, predictions) -> tuple[float, list[float]]:
    """Mean ROUGE-L F with beta 1.2 on a single-space split, and per sample."""
    scorer = Rouge()
    samples = [
        float(scorer.calc_score([prediction], [truth])) for truth, prediction in zip(truths, predictions)
    ]
    return float(np.mean(samples)), samples


def cider(truths, predictions) -> tuple[float, list[float]]:
    """CIDEr-D with document frequencies from these references, and per sample."""
    scorer = CiderScorer(n=4, sigma=6.0)
    for truth, prediction in zip(truths, predictions):
        scorer += (prediction, [truth])
    score, samples = scorer.compute_score()
    return float(score), [float(value) for value in samples]


def meteor(truths, predictions, language: str = "en") -> float | None:
    """METEOR 1.5 corpus score, or None without Java. The jar reads files: its dialogue form waits for ever on an empty line."""
    java, jar = shutil.which("java"), Path(meteor_package.__file__).parent / "meteor-1.5.jar"
    if java is None or not jar.is_file():
        return None
    with tempfile.TemporaryDirectory() as folder:
        files = {"pred": predictions, "truth": truths}
        for name, lines in files.items():
            (Path(folder) / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        shutil.copy(jar, folder)  # METEOR cannot find its data from a path with a space or beyond ASCII
        (Path(folder) / "data").symlink_to(jar.parent / "data")
        options = ["-l", "en", "-norm"] if language == "en" else ["-l", "other"]
        command = [java, "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", jar.name, "pred", "truth", *options]
        try:
            result = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=METEOR_SECONDS, encoding="utf-8"
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"METEOR did not end within {METEOR_SECONDS} s; leave it out with --no-meteor"
            ) from None
    found = re.findall(r"Final score:\s+([0-9.eE-]+|NaN)", result.stdout)
    if not found:
        said = (result.stderr or result.stdout).strip().splitlines() or ["no output"]
        raise UserError(f"METEOR failed: {said[-1]}; leave it out with --no-meteor")
    return 0.0 if found[-1] == "NaN" else float(found[-1])


def published_scores(
    truths, predictions, language: str = "en", with_meteor: bool = True
) -> tuple[dict, dict]:
    """The scores of the published tables and the per-sample ROUGE_L and CIDEr. METEOR is None where Java is absent."""
    truths, predictions = ([words(text, language) for text in texts] for texts in (truths, predictions))
    scores = {f"BLEU_{n}": float(value) for n, value in enumerate(bleu(truths, predictions)[0], 1)}
    samples = {}
    scores["METEOR"] = meteor(truths, predictions, language) if with_meteor else None
    scores["ROUGE_L"], samples["ROUGE_L"] = rouge_l(truths, predictions)
    scores["CIDEr"], samples["CIDEr"] = cider(truths, predictions)
    return scores, samples


def standard_scores(truths, predictions, language: str) -> dict:
    """Usual convention: sacrebleu (13a, lower case; Chinese: zh) scaled to 0..1, and rouge-score's ROUGE-L F1 on words."""
    import sacrebleu
    from rouge_score import rouge_scorer

    truths, predictions = (
        [" ".join(text.replace("\0", " ").split()) for text in texts] for texts in (truths, predictions)
    )
    corpus = sacrebleu.corpus_bleu(
        predictions, [truths], lowercase=True, tokenize="zh" if language == "cn" else "13a"
    )
    if language == "cn":  # rouge-score's own tokenizer drops every Chinese character

        class Words:
            def tokenize(self, text):
                return words(text, "cn").split()

        scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Words())
    else:
        scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    rows = [scorer.score(truth, prediction) for truth, prediction in zip(truths, predictions)]
    return {
        "sacreBLEU": corpus.score / 100,
        **{name: float(np.mean([row[name].fmeasure for row in rows])) for name in rows[0]},
    }


def parse_labels(text: str) -> list[int] | None:
    """GT_labels as upstream prints them, `tensor([0, 1, ...])`, or as a JSON list; None where there are none."""
    found = re.search(r"\[[^\[\]]*\]", text or "")
    if not found:
        return None
    try:
        labels = [int(value) for value in ast.literal_eval(found.group())]
    except (ValueError, SyntaxError, TypeError):
        return None
    return labels if len(labels) == len(FINDINGS) else None


def clinical_scores(truths, predictions, labeler=positives, draws: int = 500) -> dict:
    """Finding scores of predicted against true reports, both labelled by `labeler`, with an interval of micro-F1."""
    truth, predicted = np.array(labeler(truths)).astype(bool), np.array(labeler(predictions)).astype(bool)
    scores = finding_scores(truth, predicted)
    scores["micro"]["F1_interval"] = bootstrap(micro_f1, truth, predicted, draws=draws)
    return scores


def read_csv(path) -> list[dict]:
    csv.field_size_limit(2**30)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError:
        text = Path(path).read_bytes().decode("gb18030", errors="replace")
        print(f"{path}: not UTF-8; read as GB18030", file=sys.stderr)
    rows = list(csv.DictReader(text.replace("\0", " ").splitlines(keepends=True)))
    missing = [name for name in ("Ground Truth", "Pred") if rows and name not in rows[0]]
    if not rows or missing:
        raise UserError(
            f"{path}: "
            + (f"no column {missing[0]!r}; it has {', '.join(map(str, rows[0]))}" if rows else "no rows")
        )
    return rows


def score_csv(path, language=None, labeler=positives, with_meteor: bool = True, draws: int = 500) -> dict:
    """All scores of one csv."""
    rows = read_csv(path)
    truths, predictions = [row["Ground Truth"] or "" for row in rows], [row["Pred"] or "" for row in rows]
    language = language or language_of(" ".join(truths))
    scores, samples = published_scores(truths, predictions, language, with_meteor)
    scores["intervals"] = {
        name: bootstrap(np.mean, np.array(values), draws=draws) for name, values in samples.items()
    }
    scores["standard"] = standard_scores(truths, predictions, language)
    scores["findings"] = clinical_scores(truths, predictions, labeler, draws)
    given = [parse_labels(row.get("GT_labels", "")) for row in rows]
    if all(given):  # the labels of the data set instead of the labeler's reading of the true report
        scores["findings_against_GT_labels"] = finding_scores(given, labeler(predictions))
    scores["rows"], scores["language"] = len(rows), language
    scores["empty_predictions"] = sum(not text.strip() for text in predictions)
    scores["convention"] = (
        "published: words between spaces, case and punctuation kept" if language == "en" else "jieba words"
    )
    if scores["METEOR"] is None:
        scores["METEOR_note"] = (
            "absent: Java or the jar was not found" if with_meteor else "left out on request"
        )
    return scores


def show(scores: dict):
    """Print the scores as a table."""
    print(
        f"{scores['rows']} reports ({scores['language']}), {scores['empty_predictions']} empty predictions; {scores['convention']}"
    )
    names = ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "METEOR", "ROUGE_L", "CIDEr")
    print(
        "  ".join(
            f"{name} {'absent' if scores[name] is None else format(scores[name], '.4f')}" for name in names
        )
    )
    if scores["METEOR"] is None:
        print(f"METEOR {scores['METEOR_note']}")
    print(f"{'finding':28s} {'count':>5s} {'P':>6s} {'R':>6s} {'F1':>6s}")
    found = scores["findings"]
    for name, row in [
        *found["per_finding"].items(),
        *((key, found[key]) for key in ("macro", "micro", "example")),
    ]:
        print(f"{name:28s} {row.get('count', ''):>5} {row['P']:6.3f} {row['R']:6.3f} {row['F1']:6.3f}")
    print("BLEU hardly separates a model from a retrieved report here: read the finding scores first.")


def main(args):
    if bool(args.chexbert) != bool(args.bert):
        raise UserError("--chexbert (weights) and --bert (folder of bert-base-uncased) go together")
    labeler = CheXbert(args.chexbert, args.bert) if args.chexbert else positives
    scores = score_csv(args.csv, args.language, labeler, not args.no_meteor, args.draws)
    scores["labeler"] = "CheXbert" if args.chexbert else "rules"
    if args.out:
        atomic_write(args.out, json.dumps(scores, indent=1, ensure_ascii=False))
    show(scores)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--csv", required=True, help="file with the columns Ground Truth and Pred (and GT_labels, if there)"
    )
    parser.add_argument("--out", help="json file to write")
    parser.add_argument("--language", choices=("en", "cn"), help="default: from the reports")
    parser.add_argument("--chexbert", help="CheXbert weights instead of the rule-based labeler (English)")
    parser.add_argument(
        "--bert", help="folder with configuration and tokenizer of bert-base-uncased, for --chexbert"
    )
    parser.add_argument("--no-meteor", action="store_true", help="leave METEOR out")
    parser.add_argument("--draws", type=int, default=500, help="bootstrap draws (default %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    run(main, parse_args())
