r"""Real reports: the rule-based labeler against labels set by hand, or a language model's perplexity.

    python studies/dia_pangu/real_reports.py --reports ct_reports_val.json \
        --train-reports ct_reports_train.json --out runs/dia_pangu

With --language-model runs/dia_pangu/llm_real (a run of warm_llm.py on the training reports) it is the
perplexity. The files hold {"label_names": [...], "cases": [{"report": ..., "labels": [...]}]} with the 18
labels of CT-RATE.
"""

import math
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from common.arguments import Parser
from common.errors import UserError, run
from common.files import read_json
from common.intervals import bootstrap
from dia_pangu.evaluate.findings import finding_scores
from dia_pangu.evaluate.labeler import positives
from dia_pangu.src.Dataset.prompt import FINDINGS
from dia_pangu.src.Model.pangu import load_tokenizer
from studies.summary import write_result

# CT-RATE's label -> ours. Septal thickening is the CT sign of interstitial edema; "Medical material" is a
# device or suture. The other ten CT-RATE labels (emphysema, hernia, calcification ...) have no counterpart
# among the 14.
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


def read_reports(path) -> tuple[list[str], np.ndarray]:
    """Return the reports of a file and their labels (N, 8), bool, in the order of SAME."""
    content = read_json(path, {"label_names": [str], "cases": [{"report": str, "labels": [int]}]})
    missing = [name for name in SAME if name not in content["label_names"]]
    if missing:
        raise UserError(f"{path}: field label_names has no {missing[0]!r}; it needs CT-RATE's 18 names")
    columns = [content["label_names"].index(name) for name in SAME]
    if any(len(case["labels"]) != len(content["label_names"]) for case in content["cases"]):
        raise UserError(f"{path}: a case has more or fewer labels than label_names has names")
    labels = [[case["labels"][c] for c in columns] for case in content["cases"]]
    return [case["report"] for case in content["cases"]], np.array(labels).astype(bool)


def learned_labeler(texts, labels, other_texts) -> np.ndarray:
    """Fit TF-IDF and a balanced logistic regression per finding on `texts`; return its labels of
    `other_texts`."""
    vectors = TfidfVectorizer(ngram_range=(1, 3), min_df=2, sublinear_tf=True)
    x, other = vectors.fit_transform(texts), vectors.transform(other_texts)
    columns = []
    for c in range(labels.shape[1]):
        model = LogisticRegression(C=10, class_weight="balanced", max_iter=1000)
        columns.append(model.fit(x, labels[:, c]).predict(other))
    return np.stack(columns, axis=1).astype(bool)


def labeler_study(out, reports, train_reports=None) -> dict:
    """Score the rule-based labeler on the file `reports`, beside a labeler that is fitted on the file
    `train_reports`."""
    texts, truth = read_reports(reports)
    columns = [FINDINGS.index(name) for name in SAME.values()]
    ruled = np.array(positives(texts)).astype(bool)[:, columns]
    answers = {"rules": ruled, "all positive": np.ones_like(truth)}
    if train_reports:
        train_texts, train_labels = read_reports(train_reports)
        name = f"TF-IDF + logistic on the {len(train_texts)}"
        answers[name] = learned_labeler(train_texts, train_labels, texts)
    scores = {name: finding_scores(truth, answer, list(SAME)) for name, answer in answers.items()}
    for name, score in scores.items():
        macro, micro = score["macro"]["F1"], score["micro"]["F1"]
        print(
            f"{len(truth)} reports, {len(SAME)} findings, {name}: macro-F1 {macro:.3f} micro-F1 {micro:.3f}"
        )
    for finding, row in scores["rules"]["per_finding"].items():
        single = "  ".join(f"{name} F1 {s['per_finding'][finding]['F1']:.3f}" for name, s in scores.items())
        print(f"  {finding:32s} {row['count']:3d} cases  {single}")
    write_result(
        out,
        "labeler on real reports",
        "macro-F1",
        scores["rules"]["macro"]["F1"],
        {name: score["macro"]["F1"] for name, score in scores.items() if name != "rules"},
        bootstrap(lambda t, p: finding_scores(t, p, list(SAME))["macro"]["F1"], truth, ruled),
        note=f"{len(truth)} CT-RATE reports of {Path(reports).name}, the {len(SAME)} of 18 labels with a "
        f"counterpart here; no training; micro-F1 {scores['rules']['micro']['F1']:.2f}",
        details=scores,
    )
    return scores


def unigram_perplexity(tokenizer, texts, other_texts) -> float:
    """Return the perplexity per token on `other_texts` of a unigram model of `texts`, with 1 added to every
    count."""
    counts = Counter(token for text in texts for token in tokenizer(text).input_ids)
    total = sum(counts.values()) + len(tokenizer)
    ids = [token for text in other_texts for token in tokenizer(text).input_ids]
    return math.exp(-np.mean([math.log((counts[token] + 1) / total) for token in ids]))


def perplexity_study(out, language_model, reports, train_reports):
    """Write the perplexity of a run of warm_llm.py on `reports`, beside a unigram model of
    `train_reports`."""
    folder = Path(language_model)
    trained = read_json(folder / "metrics.json", {"perplexity": float})
    tokenizer = load_tokenizer(folder / "model")
    train_texts, texts = read_reports(train_reports)[0], read_reports(reports)[0]
    controls = {"unigram": unigram_perplexity(tokenizer, train_texts, texts), "uniform": len(tokenizer)}
    steps = read_json(folder / "config.json", {"arguments": dict})["arguments"]
    write_result(
        out,
        "report model on real text",
        "perplexity per token, lower is better",
        trained["perplexity"],
        controls,
        note=f"{len(train_texts)} training reports, {len(texts)} held out, {steps['max_steps']} steps of "
        f"{steps['batch_size']} reports, texts cut at {steps['max_length']} tokens",
    )
    print(f"perplexity {trained['perplexity']:.1f}, unigram {controls['unigram']:.1f}")


def main(args):
    if args.language_model and not args.train_reports:
        raise UserError("--language-model needs --train-reports, on which the unigram model is counted")
    if args.language_model:
        perplexity_study(args.out, args.language_model, args.reports, args.train_reports)
    else:
        labeler_study(args.out, args.reports, args.train_reports)


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--reports", required=True, help="JSON file of the reports to score")
    parser.add_argument(
        "--train-reports", help="JSON file of other reports, on which the controls are fitted"
    )
    parser.add_argument(
        "--language-model", help="run of warm_llm.py on --train-reports: score its perplexity"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results/")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args())
