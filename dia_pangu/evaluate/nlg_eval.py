"""Score a CSV of reports: BLEU, METEOR, ROUGE-L, CIDEr, and the 14 findings.

Upstream: utils/nlg_eval.py, evaluate/Evaluate.py.

    python dia_pangu/evaluate/nlg_eval.py --csv results.csv --out scores.json

Any CSV with the columns `Ground Truth` and `Pred` works; no model is needed. BLEU_1 to CIDEr at the top of
the JSON follow the published tables: words are what stands between spaces, with case and punctuation
(Chinese: the words of jieba), and METEOR is the 1.5 jar. The scores in the usual convention (lower case,
punctuation apart; sacrebleu, rouge-score) stand under "standard". BLEU hardly separates a model from a
retrieved report where all reports are alike: read the scores of the findings first.
"""

import ast
import csv
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider_scorer import CiderScorer
from pycocoevalcap.meteor import meteor as meteor_package

from common.arguments import Parser, number
from common.checkpoint import atomic_json
from common.errors import UserError, run
from common.intervals import bootstrap
from dia_pangu.evaluate.findings import finding_scores, micro_f1
from dia_pangu.evaluate.labeler import CheXbert, language_of, positives
from dia_pangu.src.Dataset.prompt import FINDINGS, LANGUAGES

METEOR_SECONDS = 600  # the jar needs about a second for 100 reports


def words(text: str, language: str) -> str:
    """Return one line with single spaces between the words, without NUL and line breaks; jieba splits
    Chinese."""
    text = " ".join(text.replace("\0", " ").split())
    if language != "cn":
        return text
    import jieba

    jieba.setLogLevel("ERROR")
    return " ".join(word for word in jieba.lcut(text.replace(" ", "")) if word.strip())


def bleu(truths, predictions) -> tuple[list[float], list[list[float]]]:
    """Return corpus BLEU-1 to BLEU-4 with the closest reference length, and the same per sample."""
    scorer = BleuScorer(n=4)
    for truth, prediction in zip(truths, predictions):
        scorer += (prediction, [truth])
    return scorer.compute_score(option="closest", verbose=0)


def common_length(one: list[str], two: list[str]) -> int:
    """Return the length of the longest common subsequence of two lists of words.

    Each word of `two` updates one row of the table at once, whose differences are the bits of an integer
    (Hyyro 2004).
    """
    places = {}
    for i, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << i
    full = row = (1 << len(one)) - 1
    for word in two:
        match = row & places.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return len(one) - row.bit_count()


def rouge_l(truths, predictions) -> tuple[float, list[float]]:
    """Return the mean ROUGE-L F with beta 1.2 on words between single spaces, and the value per sample.

    As upstream's split, two spaces have an empty word between them, and an empty text is one empty word.
    """
    samples = []
    for truth, prediction in zip(truths, predictions):
        one, two = truth.split(" "), prediction.split(" ")
        shared = common_length(one, two)
        recall, precision = shared / len(one), shared / len(two)
        weight = 1.2**2
        samples.append((1 + weight) * precision * recall / (recall + weight * precision) if shared else 0.0)
    return float(np.mean(samples)), samples


def cider(truths, predictions) -> tuple[float, list[float]]:
    """Return CIDEr-D with document frequencies from these references, and the value per sample."""
    scorer = CiderScorer(n=4, sigma=6.0)
    for truth, prediction in zip(truths, predictions):
        scorer += (prediction, [truth])
    score, samples = scorer.compute_score()
    return float(score), [float(value) for value in samples]


def meteor(truths, predictions, language: str = "en") -> float | None:
    """Return the corpus score of METEOR 1.5, or None without Java.

    The jar reads files here, because its interactive form waits for ever on an empty line.
    """
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
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no output"]
        raise UserError(f"METEOR failed: {lines[-1]}; leave it out with --no-meteor")
    return 0.0 if found[-1] == "NaN" else float(found[-1])


def published_scores(
    truths, predictions, language: str = "en", with_meteor: bool = True
) -> tuple[dict, dict]:
    """Return the scores of the published tables, and ROUGE_L and CIDEr per sample. METEOR is None where Java
    is absent."""
    raw = truths, predictions
    truths, predictions = ([words(text, language) for text in texts] for texts in raw)
    scores = {f"BLEU_{n}": float(value) for n, value in enumerate(bleu(truths, predictions)[0], 1)}
    samples = {}
    scores["METEOR"] = meteor(truths, predictions, language) if with_meteor else None
    # Upstream splits at single spaces here, and at any white space for the other scores.
    spaced = raw if language == "en" else (truths, predictions)
    scores["ROUGE_L"], samples["ROUGE_L"] = rouge_l(*spaced)
    scores["CIDEr"], samples["CIDEr"] = cider(truths, predictions)
    return scores, samples


def standard_scores(truths, predictions, language: str) -> dict:
    """Return the scores in the usual convention: sacrebleu (13a, lower case; Chinese: zh) in 0 to 1, and
    rouge-score's F1."""
    import sacrebleu

    truths, predictions = (
        [" ".join(text.replace("\0", " ").split()) for text in texts] for texts in (truths, predictions)
    )
    corpus = sacrebleu.corpus_bleu(
        predictions, [truths], lowercase=True, tokenize="zh" if language == "cn" else "13a"
    )
    split = default_words if language == "en" else lambda text: words(text, "cn").split()
    rows = [standard_rouge(split(truth), split(prediction)) for truth, prediction in zip(truths, predictions)]
    return {
        "sacreBLEU": corpus.score / 100,
        **{name: float(np.mean([row[name] for row in rows])) for name in rows[0]},
    }


def default_words(text: str) -> list[str]:
    """Return the words of an English text as rouge-score splits it: lower case, letters and digits alone."""
    from rouge_score import tokenize

    return tokenize.tokenize(text, None)


def standard_rouge(one: list[str], two: list[str]) -> dict:
    """Return rouge-score's F1 of single words, of pairs of words, and of the longest common subsequence."""
    grams = [[Counter(zip(*(part[k:] for k in range(n)))) for part in (one, two)] for n in (1, 2)]
    shared = [(sum((a & b).values()), sum(a.values()), sum(b.values())) for a, b in grams]
    shared.append((common_length(one, two), len(one), len(two)))
    return {
        name: 2 * hits / (first + second) if hits else 0.0
        for name, (hits, first, second) in zip(("rouge1", "rouge2", "rougeL"), shared)
    }


def parse_labels(text: str) -> list[int] | None:
    """Read GT_labels as upstream prints them, `tensor([0, 1, ...])`, or as a JSON list; return None where
    there are none."""
    found = re.search(r"\[[^\[\]]*\]", text or "")
    if not found:
        return None
    try:
        labels = [int(value) for value in ast.literal_eval(found.group())]
    except (ValueError, SyntaxError, TypeError):
        return None
    return labels if len(labels) == len(FINDINGS) else None


def clinical_scores(truths, predictions, labeler=positives, draws: int = 500) -> dict:
    """Return the finding scores of predicted against true reports, both labelled by `labeler`, with an
    interval of micro-F1."""
    truth, predicted = np.array(labeler(truths)).astype(bool), np.array(labeler(predictions)).astype(bool)
    scores = finding_scores(truth, predicted)
    scores["micro"]["F1_interval"] = bootstrap(micro_f1, truth, predicted, draws=draws)
    return scores


def read_csv(path) -> list[dict]:
    """Read a CSV with the columns `Ground Truth` and `Pred` as rows by column name; what is not UTF-8 is read
    as GB18030."""
    csv.field_size_limit(2**30)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError:
        text = Path(path).read_bytes().decode("gb18030", errors="replace")
        print(f"{path}: not UTF-8; read as GB18030", file=sys.stderr)
    rows = list(csv.DictReader(text.replace("\0", " ").splitlines(keepends=True)))
    if not rows:
        raise UserError(f"{path}: no rows; the file needs a header and one row per report")
    for name in ("Ground Truth", "Pred"):
        if name not in rows[0]:
            raise UserError(f"{path}: no column {name!r}; it has {', '.join(map(str, rows[0]))}")
    return rows


def score_csv(path, language=None, labeler=positives, with_meteor: bool = True, draws: int = 500) -> dict:
    """Return all scores of one CSV; arguments as for `published_scores` and `clinical_scores`."""
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
        f"{scores['rows']} reports ({scores['language']}), {scores['empty_predictions']} empty predictions; "
        f"{scores['convention']}"
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
    print("BLEU hardly separates a model from a retrieved report: read the scores of the findings first.")


def main(args):
    if bool(args.chexbert) != bool(args.bert):
        raise UserError("--chexbert (weights) and --bert (folder of bert-base-uncased) go together")
    labeler = CheXbert(args.chexbert, args.bert) if args.chexbert else positives
    scores = score_csv(args.csv, args.language, labeler, not args.no_meteor, args.draws)
    scores["labeler"] = "CheXbert" if args.chexbert else "rules"
    if args.out:
        atomic_json(args.out, scores)
    show(scores)


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument(
        "--csv",
        required=True,
        help="file with the columns Ground Truth and Pred, and GT_labels if there are labels",
    )
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument(
        "--language", choices=LANGUAGES, help="language of the reports, if it is not to be detected"
    )
    parser.add_argument(
        "--chexbert", help="CheXbert weights, instead of the rule-based labeler; English only"
    )
    parser.add_argument(
        "--bert", help="folder with configuration and tokenizer of bert-base-uncased, for --chexbert"
    )
    parser.add_argument("--no-meteor", action="store_true", help="leave METEOR out")
    parser.add_argument(
        "--draws", type=number(int, 1), default=500, help="resamples of the bootstrap intervals"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args())
