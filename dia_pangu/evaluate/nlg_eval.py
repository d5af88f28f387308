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
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider_scorer import CiderScorer
from pycocoevalcap.meteor import meteor as meteor_package

from common.arguments import Parser, number
from common.checkpoint import atomic_csv, atomic_json
from common.errors import UserError, run
from common.intervals import bootstrap
from dia_pangu.evaluate.findings import crg_score, finding_scores, micro_f1, score_intervals
from dia_pangu.evaluate.labeler import LABELS_18, CheXbert, language_of, positives, positives_18
from dia_pangu.src.Dataset.prompt import FINDINGS, LANGUAGES

METEOR_SECONDS = 600  # the jar needs about a second for 100 reports


def words(text: str, language: str) -> str:
    """Return one line with single spaces between the words, without NUL; jieba splits Chinese."""
    text = " ".join(text.replace("\0", " ").split())
    if language != "cn":
        return text
    import jieba

    jieba.setLogLevel("ERROR")
    return " ".join(word for word in jieba.lcut(text.replace(" ", "")) if word.strip())


def fed(scorer, truths, predictions):
    """Return a scorer of pycocoevalcap with the pairs of texts in it."""
    for truth, prediction in zip(truths, predictions):
        scorer += (prediction, [truth])
    return scorer


def bleu(truths, predictions) -> tuple[list[float], list[list[float]]]:
    """Return corpus BLEU-1 to BLEU-4 with the closest reference length, and the same per sample."""
    return fed(BleuScorer(n=4), truths, predictions).compute_score(option="closest", verbose=0)


def bleu_intervals(truths, predictions, language: str, draws: int) -> dict:
    """Return the intervals of corpus BLEU-1 to BLEU-4, from draws of the reports' n-gram counts."""
    truths, predictions = ([words(text, language) for text in texts] for texts in (truths, predictions))
    parts = fed(BleuScorer(n=4), truths, predictions).ctest
    lengths = np.array([[part["testlen"], part["reflen"][0]] for part in parts], float)
    correct, guess = (np.array([part[key] for part in parts], float) for key in ("correct", "guess"))

    def corpus(lengths, correct, guess, n: int) -> float:
        shares = (correct.sum(0)[:n] + 1e-15) / (guess.sum(0)[:n] + 1e-9)
        ratio = lengths[:, 0].sum() / max(lengths[:, 1].sum(), 1e-9)
        return float(shares.prod() ** (1 / n) * min(1.0, np.exp(1 - 1 / max(ratio, 1e-9))))

    return {
        f"BLEU_{n}": bootstrap(lambda *rows, n=n: corpus(*rows, n), lengths, correct, guess, draws=draws)
        for n in range(1, 5)
    }


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
    score, samples = fed(CiderScorer(n=4, sigma=6.0), truths, predictions).compute_score()
    return float(score), [float(value) for value in samples]


# METEOR's alpha, beta, gamma, delta and the weights of its four kinds of match, as the jar has them.
METEOR_PARAMETERS = {
    "en": (0.85, 0.2, 0.6, 0.75, (1.0, 0.6, 0.8, 0.6)),
    "cn": (0.75, 1.4, 0.7, 0.5, (1.0, 0.0, 0.0, 0.0)),
}


def meteor_score(counts: np.ndarray, language: str) -> float:
    """Return METEOR 1.5 of texts from their summed counts (N, 23): words and function words of test and
    reference, for each kind of match the content and the function words of both, chunks, matched words."""
    alpha, beta, gamma, delta, weights = METEOR_PARAMETERS[language]
    # A pair of equal texts is one chunk, which the jar does not count as broken.
    total, equal = counts.sum(0), counts[:, 20] == 1
    for text in (0, 1):
        equal &= counts[:, 4 + text : 20 : 2].sum(1) == counts[:, text]
    matches, matched = total[4:20].reshape(4, 2, 2), total[21:].mean()  # kind, content or function, text
    shares = []
    for text in (0, 1):
        words, function = total[text], total[2 + text]
        hits = np.dot(weights, delta * matches[:, 0, text] + (1 - delta) * matches[:, 1, text])
        shares.append(hits / max(delta * (words - function) + (1 - delta) * function, 1e-9))
    precision, recall = shares
    if precision * recall == 0:
        return 0.0
    broken = (total[20] - equal.sum()) / matched
    return float((1 - gamma * broken**beta) / (alpha / recall + (1 - alpha) / precision))


def meteor_counts(truths, predictions, language: str = "en") -> np.ndarray | None:
    """Return the counts (N, 23) of each pair of texts that METEOR 1.5 is computed from, or None without Java.

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
        command = [java, "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", jar.name, "pred", "truth"]
        try:
            result = subprocess.run(
                [*command, *options, "-ssOut"],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=METEOR_SECONDS,
                encoding="utf-8",
            )
        except subprocess.TimeoutExpired:
            raise UserError(
                f"METEOR did not end within {METEOR_SECONDS} s; leave it out with --no-meteor"
            ) from None
    rows = [line.split() for line in result.stdout.splitlines() if re.match(r"[\d.]+ ", line)]
    if len(rows) != len(truths) or any(len(row) != 23 for row in rows):
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no output"]
        raise UserError(f"METEOR failed: {lines[-1]}; leave it out with --no-meteor")
    return np.array(rows, float)


def meteor(truths, predictions, language: str = "en") -> float | None:
    """Return the corpus score of METEOR 1.5, or None without Java."""
    counts = meteor_counts(truths, predictions, language)
    return None if counts is None else meteor_score(counts, language)


def published_scores(
    truths, predictions, language: str = "en", with_meteor: bool = True
) -> tuple[dict, dict]:
    """Return the published tables' scores (METEOR: None without Java), and per sample ROUGE_L, CIDEr and the
    counts of METEOR."""
    raw = truths, predictions
    truths, predictions = ([words(text, language) for text in texts] for texts in raw)
    scores = {f"BLEU_{n}": float(value) for n, value in enumerate(bleu(truths, predictions)[0], 1)}
    samples = {}
    counts = meteor_counts(truths, predictions, language) if with_meteor else None
    scores["METEOR"] = None if counts is None else meteor_score(counts, language)
    # Upstream splits at single spaces here, and at any white space for the other scores.
    spaced = raw if language == "en" else (truths, predictions)
    scores["ROUGE_L"], samples["ROUGE_L"] = rouge_l(*spaced)
    scores["CIDEr"], samples["CIDEr"] = cider(truths, predictions)
    return scores, samples | ({} if counts is None else {"METEOR": counts})


def standard_scores(truths, predictions, language: str, draws: int) -> dict:
    """Return the scores of sacrebleu (13a, lower case; Chinese: zh; 0 to 1) and rouge-score's F1, and their
    intervals."""
    from sacrebleu.metrics import BLEU

    truths, predictions = (
        [" ".join(text.replace("\0", " ").split()) for text in texts] for texts in (truths, predictions)
    )
    # Corpus BLEU of any draw of reports comes from their counts, which effective_order leaves as they are.
    scorer = BLEU(lowercase=True, tokenize="zh" if language == "cn" else "13a", effective_order=True)
    single = [scorer.sentence_score(told, [true]) for true, told in zip(truths, predictions)]
    counts = np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in single])

    def corpus(rows) -> float:
        total = rows.sum(0).tolist()
        return BLEU.compute_bleu(total[:4], total[4:8], *total[8:]).score / 100

    split = default_words if language == "en" else lambda text: words(text, "cn").split()
    rows = [standard_rouge(split(truth), split(prediction)) for truth, prediction in zip(truths, predictions)]
    rouge = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    intervals = {name: bootstrap(np.mean, values, draws=draws) for name, values in rouge.items()}
    return {
        "sacreBLEU": corpus(counts),
        **{name: float(values.mean()) for name, values in rouge.items()},
        "intervals": {"sacreBLEU": bootstrap(corpus, counts, draws=draws), **intervals},
    }


def default_words(text: str) -> list[str]:
    """Return the words of an English text as rouge-score splits it: lower case, letters and digits alone."""
    from rouge_score import tokenize

    return tokenize.tokenize(text, None)


def standard_rouge(one: list[str], two: list[str]) -> dict:
    """Return rouge-score's F1 of single words, of pairs of words, and of the longest common subsequence."""
    pairs = list(zip(one, one[1:])), list(zip(two, two[1:]))
    hits = {
        "rouge1": (sum((Counter(one) & Counter(two)).values()), one, two),
        "rouge2": (sum((Counter(pairs[0]) & Counter(pairs[1])).values()), *pairs),
        "rougeL": (common_length(one, two), one, two),
    }
    return {
        name: 2 * n / (len(first) + len(second)) if n else 0.0 for name, (n, first, second) in hits.items()
    }


def parse_labels(text: str) -> list[int] | None:
    """Return the 14 labels of a JSON list or of upstream's `tensor([0, 1, ...])`, or None."""
    found = re.search(r"\[[^\[\]]*\]", text or "")
    if not found:
        return None
    try:
        labels = [int(int(value) == 1) for value in ast.literal_eval(found.group())]  # 1 is present
    except (ValueError, SyntaxError, TypeError):
        return None
    return labels if len(labels) == len(FINDINGS) else None


def clinical_scores(truth, predicted, names=FINDINGS, draws: int = 500) -> dict:
    """Return finding scores of labels (N, len(names)), with an interval for each F1, and the CRG score."""
    truth, predicted = np.array(truth).astype(bool), np.array(predicted).astype(bool)
    scores = finding_scores(truth, predicted, names)
    intervals = score_intervals(truth, predicted, draws)
    scores["CRG"] = {"value": crg_score(truth, predicted), "interval": intervals["CRG"]}
    for name in ("micro", "macro", "macro_occurring", "example"):
        scores[name]["F1_interval"] = intervals[name]
    for row, interval in zip(scores["per_finding"].values(), intervals["per_finding"]):
        row["F1_interval"] = interval
    return scores


def sameness(truths, predictions, labeler=positives, draws: int = 500) -> dict:
    """Return how alike the predictions are, and how much of their score another patient's report would have.

    distinct: different predictions as a share of all. commonest: share of the most frequent one. micro_F1 and
    other_patient: against the own and against the next patients' true reports (the mean of five shifts);
    survives: their quotient, near 1 for reports that say the same of everyone.
    """
    truth, told = np.array(labeler(truths)).astype(bool), np.array(labeler(predictions)).astype(bool)
    counts, own = Counter(predictions), micro_f1(truth, told)
    shifts = [s for s in (1, 2, 3, 5, 8) if s < len(told)] or [0]

    def another(truth, *others) -> float:
        return float(np.mean([micro_f1(truth, other) for other in others]))

    def survives(truth, told, *others) -> float:
        own = micro_f1(truth, told)
        return another(truth, *others) / own if own else float("nan")

    others = [np.roll(told, s, axis=0) for s in shifts]
    return {
        "distinct": len(counts) / max(1, len(predictions)),
        "commonest": max(counts.values()) / max(1, len(predictions)),
        "micro_F1": own,
        "other_patient": another(truth, *others),
        "other_patient_interval": bootstrap(another, truth, *others, draws=draws),
        "survives": survives(truth, told, *others),
        "survives_interval": bootstrap(survives, truth, told, *others, draws=draws),
    }


def paired_test(rows, others, language: str, labeler=positives, draws: int = 500, seed: int = 0) -> dict:
    """Compare two CSVs of the same patients: the difference of micro-F1 and of ROUGE_L with a paired
    interval, and the share of random exchanges of single reports that give as large a difference (a
    permutation test).
    """
    ours, theirs = ([row["Pred"] or "" for row in part] for part in (rows, others))
    truths = [row["Ground Truth"] or "" for row in rows]
    labels = [np.array(labeler(texts)).astype(bool) for texts in (truths, ours, theirs)]
    if language == "cn":
        truths, ours, theirs = ([words(text, "cn") for text in texts] for texts in (truths, ours, theirs))
    rouge = [np.array(rouge_l(truths, texts)[1])[:, None] for texts in (ours, theirs)]
    mean = lambda truth, values: float(values.mean())
    scores = {"micro_F1": (micro_f1, *labels), "ROUGE_L": (mean, np.zeros_like(rouge[0]), *rouge)}
    rng, out = np.random.default_rng(seed), {}
    for name, (score, truth, one, two) in scores.items():
        gain = lambda t, a, b, score=score: score(t, a) - score(t, b)
        found, larger = gain(truth, one, two), 0
        for _ in range(draws):
            swap = rng.random((len(truth), 1)) < 0.5
            drawn = gain(truth, np.where(swap, two, one), np.where(swap, one, two))
            larger += abs(drawn) >= abs(found) - 1e-12
        interval = bootstrap(gain, truth, one, two, draws=draws)
        out[name] = {"difference": found, "interval": interval, "p": (larger + 1) / (draws + 1)}
    return out


def same_patients(path, rows, other_path) -> list[dict]:
    """Return the rows of another CSV in the order of `rows`, matched by ID where both have it."""
    others = read_csv(other_path)
    if all("ID" in part[0] for part in (rows, others)):
        by_id = {row["ID"]: row for row in others}
        missing = [row["ID"] for row in rows if row["ID"] not in by_id]
        if missing or len(by_id) != len(rows):
            raise UserError(f"{other_path}: is about other patients than {path} (ID {(missing or ['?'])[0]})")
        return [by_id[row["ID"]] for row in rows]
    if len(rows) != len(others):
        raise UserError(
            f"{other_path}: has {len(others)} rows, {path} {len(rows)}; both need the same patients"
        )
    return others


def read_csv(path) -> list[dict]:
    """Return the rows of a CSV with `Ground Truth` and `Pred`; what is not UTF-8 is read as GB18030."""
    csv.field_size_limit(2**30)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError:
        text = Path(path).read_bytes().decode("gb18030", errors="replace")
        print(f"{path}: not UTF-8; read as GB18030", file=sys.stderr)
    # Lines as csv knows them: str.splitlines would also end a row at a form feed or U+2028 in a report.
    rows = list(csv.DictReader(io.StringIO(text.replace("\0", " "), newline="")))
    if not rows:
        raise UserError(f"{path}: no rows; the file needs a header and one row per report")
    for name in ("Ground Truth", "Pred"):
        if name not in rows[0]:
            raise UserError(f"{path}: no column {name!r}; it has {', '.join(map(str, rows[0]))}")
    if not any((row["Ground Truth"] or "").strip() for row in rows):
        raise UserError(
            f"{path}: column Ground Truth is empty in every row; there is nothing to compare with"
        )
    return rows


def score_rows(rows, language=None, labeler=positives, with_meteor: bool = True, draws: int = 500) -> dict:
    """Return all scores of the rows of a CSV; arguments as for `published_scores` and `clinical_scores`."""
    truths, predictions = [row["Ground Truth"] or "" for row in rows], [row["Pred"] or "" for row in rows]
    language = language or language_of(" ".join(truths))
    scores, samples = published_scores(truths, predictions, language, with_meteor)
    scores["intervals"] = {
        name: bootstrap(np.mean, np.array(samples[name]), draws=draws) for name in ("ROUGE_L", "CIDEr")
    }
    scores["intervals"] |= bleu_intervals(truths, predictions, language, draws)
    if "METEOR" in samples:
        found = bootstrap(lambda rows: meteor_score(rows, language), samples["METEOR"], draws=draws)
        scores["intervals"]["METEOR"] = found
    scores["standard"] = standard_scores(truths, predictions, language, draws)
    told = labeler(predictions)
    scores["findings"] = clinical_scores(labeler(truths), told, FINDINGS, draws)
    scores["sameness"] = sameness(truths, predictions, labeler, draws)
    if labeler is positives:
        found = positives_18(truths), positives_18(predictions)
        scores["findings_18"] = clinical_scores(*found, LABELS_18, draws)
    given = [parse_labels(row.get("GT_labels", "")) for row in rows]
    if all(given):  # the labels of the data set instead of the labeler's reading of the true report
        scores["findings_against_GT_labels"] = clinical_scores(given, told, FINDINGS, draws)
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
    shown = {name: "absent" if scores[name] is None else f"{scores[name]:.4f}" for name in names}
    print("  ".join(f"{name} {value}" for name, value in shown.items()))
    if scores["METEOR"] is None:
        print(f"METEOR {scores['METEOR_note']}")
    print(f"{'finding':28s} {'count':>5s} {'P':>6s} {'R':>6s} {'F1':>6s}")
    found = scores["findings"]
    means = {key: found[key] for key in ("macro", "macro_occurring", "micro", "example")}
    for name, row in {**found["per_finding"], **means}.items():
        print(f"{name:28s} {row.get('count', ''):>5} {row['P']:6.3f} {row['R']:6.3f} {row['F1']:6.3f}")
    same = scores["sameness"]
    share = f"{same['survives']:.0%}" if same["micro_F1"] else "nothing"
    print(
        f"CRG {found['CRG']['value']:.3f}; {same['distinct']:.0%} distinct reports, {share} of the micro-F1 "
        "survives another patient's report"
    )
    for name, test in scores.get("against", {}).items():
        low, high = test["interval"]
        print(
            f"{name}: {test['difference']:+.4f} [{low:+.4f}, {high:+.4f}] against the other, p "
            f"{test['p']:.3f}"
        )
    print("BLEU hardly separates a model from a retrieved report: read the scores of the findings first.")


def main(args):
    if bool(args.chexbert) != bool(args.bert):
        raise UserError("--chexbert (weights) and --bert (folder of bert-base-uncased) go together")
    labeler = CheXbert(args.chexbert, args.bert) if args.chexbert else positives
    rows = read_csv(args.csv)
    scores = score_rows(rows, args.language, labeler, not args.no_meteor, args.draws)
    scores["labeler"] = "CheXbert" if args.chexbert else "rules"
    if args.against:
        others = same_patients(args.csv, rows, args.against)
        scores["against"] = paired_test(rows, others, scores["language"], labeler, args.draws)
    if args.radeval:  # reference and hypothesis under the names of RadEval's arguments
        lines = [{"refs": row["Ground Truth"] or "", "hyps": row["Pred"] or ""} for row in rows]
        atomic_csv(args.radeval, lines)
    if args.out:
        atomic_json(args.out, scores)
    show(scores)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--csv", required=True, help="file with the columns Ground Truth and Pred, and perhaps GT_labels")
    add("--out", help="JSON file to write")
    add("--language", choices=LANGUAGES, help="language of the reports, if it is not to be detected")
    add("--chexbert", help="CheXbert weights, instead of the rule-based labeler; English only")
    add("--bert", help="folder with configuration and tokenizer of bert-base-uncased, for --chexbert")
    add("--against", help="CSV of another model on the same patients, for a paired test")
    add("--radeval", help="CSV to write for RadEval (RadGraph, GREEN, RaTEScore): columns refs and hyps")
    add("--no-meteor", action="store_true", help="leave METEOR out")
    add("--draws", type=number(int, 1), default=500, help="resamples of the bootstrap intervals")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args())
