r"""Real reports: the rule-based labeler against labels set by hand, or language models in bits per character.

    python studies/dia_pangu/real_reports.py --reports ct_reports_val.json \
        --train-reports ct_reports_train.json --out runs/dia_pangu

With --language-models trained=runs/llm/model zero-shot=SmolLM2 it is the models. The files hold
{"label_names": [...], "cases": [{"report": ..., "labels": [...]}]} with the 18 labels of CT-RATE.
"""

import math
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from common.arguments import Parser
from common.errors import UserError, run
from common.files import read_json
from common.intervals import bootstrap
from common.llm import load_llm
from common.run import progress
from dia_pangu.evaluate.findings import finding_scores
from dia_pangu.evaluate.labeler import LABELS_18, positives_18
from dia_pangu.src.Dataset.prompt import GUIDES, ReportText
from dia_pangu.src.Model.pangu import load_tokenizer
from studies.summary import write_result


def read_reports(path) -> tuple[list[str], np.ndarray]:
    """Return the reports of a file and their labels (N, 18), bool, in the order of LABELS_18."""
    content = read_json(path, {"label_names": [str], "cases": [{"report": str, "labels": [int]}]})
    missing = [name for name in LABELS_18 if name not in content["label_names"]]
    if missing:
        raise UserError(f"{path}: field label_names has no {missing[0]!r}; it needs CT-RATE's 18 names")
    columns = [content["label_names"].index(name) for name in LABELS_18]
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
    ruled = np.array(positives_18(texts)).astype(bool)
    answers = {"rules": ruled, "all positive": np.ones_like(truth)}
    if train_reports:
        train_texts, train_labels = read_reports(train_reports)
        name = f"TF-IDF + logistic on the {len(train_texts)}"
        answers[name] = learned_labeler(train_texts, train_labels, texts)
    scores = {name: finding_scores(truth, answer, LABELS_18) for name, answer in answers.items()}
    for name, score in scores.items():
        macro, micro = score["macro"]["F1"], score["micro"]["F1"]
        print(
            f"{len(truth)} reports, {len(LABELS_18)} findings, {name}: macro-F1 {macro:.3f} micro-F1 "
            f"{micro:.3f}"
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
        bootstrap(lambda t, p: finding_scores(t, p, LABELS_18)["macro"]["F1"], truth, ruled),
        note=f"{len(truth)} CT-RATE reports of {Path(reports).name}, all {len(LABELS_18)} labels; the rules "
        f"were written on other reports; micro-F1 {scores['rules']['micro']['F1']:.2f}",
        details=scores,
    )
    return scores


FIRST = 1500  # characters of a report that a language model is scored on, the same for every tokenizer


@torch.no_grad()
def bits_per_character(folder, texts, batch: int = 8) -> np.ndarray:
    """Return (N, 2): the bits that the language model of a folder needs for the beginning of each text behind
    the guide, and its characters."""
    model, tokenizer = load_llm(folder, torch.float32), load_tokenizer(folder)
    rows, guide = model.get_input_embeddings().num_embeddings, GUIDES["en"]
    writer = ReportText(tokenizer, rows, 0)
    prompt = writer.ids(guide)
    out = []
    for first in progress(range(0, len(texts), batch), desc=f"bits of {Path(folder).name}"):
        some = [text[:FIRST] for text in texts[first : first + batch]]
        ids = [writer.ids(f"{guide} {text}") for text in some]
        padded = writer.pad([{"lang_x": row, "attention_mask": [1] * len(row)} for row in ids])
        logits = model(input_ids=padded["lang_x"], attention_mask=padded["attention_mask"]).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2).float(), padded["lang_x"][:, 1:], reduction="none")
        counted = padded["attention_mask"][:, 1:].clone()
        counted[:, : len(prompt) - 1] = 0
        bits = (losses * counted).sum(1) / math.log(2)
        out += [(float(bit), len(text) + 1) for bit, text in zip(bits, some)]
    return np.array(out)


def unigram_bits(folder, texts, other_texts) -> float:
    """Return the bits per character of `other_texts` under the token frequencies of `texts`, each plus 1,
    with the tokenizer of a folder."""
    tokenizer = load_tokenizer(folder)
    counts = Counter(token for text in texts for token in tokenizer(text).input_ids)
    total = sum(counts.values()) + len(tokenizer)
    ids = [token for text in other_texts for token in tokenizer(text[:FIRST]).input_ids]
    bits = -sum(math.log2((counts[token] + 1) / total) for token in ids)
    return bits / sum(len(text[:FIRST]) for text in other_texts)


def language_study(out, models: dict, reports, train_reports) -> dict:
    """Score language models on the held-out reports in bits per character; the first of `models`, {name:
    folder}, is the one that the others are controls of."""
    texts, train_texts = read_reports(reports)[0], read_reports(train_reports)[0]
    found = {name: bits_per_character(folder, texts) for name, folder in models.items()}
    mean = lambda rows: float(rows[:, 0].sum() / rows[:, 1].sum())
    scores = {name: mean(rows) for name, rows in found.items()}
    name, *others = models
    controls = {other: scores[other] for other in others}
    controls["unigram"] = unigram_bits(models[name], train_texts, texts)
    for other, score in {**scores, "unigram": controls["unigram"]}.items():
        print(f"{other}: {score:.3f} bits per character")
    write_result(
        out,
        "report model on real text",
        "bits per character, lower is better",
        scores[name],
        controls,
        bootstrap(mean, found[name]),
        note=f"{name}; the first {FIRST} characters of {len(texts)} held-out reports",
    )
    return scores


def main(args):
    models = dict(pair.partition("=")[::2] for pair in args.language_models)
    if models and not args.train_reports:
        raise UserError("--language-models needs --train-reports, on which the unigram model is counted")
    if models:
        language_study(args.out, models, args.reports, args.train_reports)
    else:
        labeler_study(args.out, args.reports, args.train_reports)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--reports", required=True, help="JSON file of the reports to score")
    add("--train-reports", help="JSON file of other reports, on which the controls are fitted")
    add(
        "--language-models",
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="language models to score in bits per character; the first is the result, the others its "
        "controls",
    )
    add("--out", type=Path, required=True, help="folder for results/")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args())
