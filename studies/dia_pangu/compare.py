r"""Gather a model's results, its controls and the baselines into one table, one picture and the summary.

    python studies/dia_pangu/compare.py --data data/dia_pangu --model runs/dia_pangu/test-none \
        --control "blank volume=runs/dia_pangu/test-blank" \
        --baselines runs/dia_pangu/baselines --out runs/dia_pangu
"""

import csv
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np

from common.arguments import Parser
from common.checkpoint import atomic_json
from common.errors import UserError, run
from common.figures import new_figure, save_figure
from common.files import read_json
from common.intervals import bootstrap
from dia_pangu.evaluate.findings import finding_scores, micro_f1
from dia_pangu.evaluate.labeler import language_of, positives
from dia_pangu.evaluate.nlg_eval import bleu, read_csv, words
from dia_pangu.src.Dataset.prompt import FINDINGS
from studies.dia_pangu.locations import location_scores, reported
from studies.summary import write_result

CHANCE = {"side": 1 / 2, "place": 1 / 3}


@dataclass
class Row:
    """One line of the table; None stands where a method has no such score."""

    diagnosis_micro: float | None = None
    diagnosis_macro: float | None = None
    report_micro: float | None = None
    report_macro: float | None = None
    bleu_1: float | None = None
    bleu_4: float | None = None


@dataclass
class Tested:
    """One folder of test.py: rows of dia-pangu.csv, findings as {id: {finding: row}}, four bool arrays (N,
    14), the scores."""

    rows: list
    findings: dict
    labels: np.ndarray  # of the data set
    statuses: np.ndarray  # the model's diagnosis
    truth: np.ndarray  # what the true report states
    told: np.ndarray  # what the model's report states
    scores: dict  # "diagnosis" and "report", see finding_scores


def read_findings(folder) -> dict:
    """Read findings.csv as {id: {finding: row}}."""
    out = {}
    with open(Path(folder) / "findings.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            out.setdefault(row["ID"], {})[row["finding"]] = row
    return out


def read_tested(folder) -> Tested:
    """Read a folder of test.py and score its diagnosis and its reports."""
    rows, findings = read_csv(Path(folder) / "dia-pangu.csv"), read_findings(folder)
    labels = np.array([json.loads(row["GT_labels"]) for row in rows]).astype(bool)
    statuses = np.array([[findings[row["ID"]][f]["status"] == "1" for f in FINDINGS] for row in rows])
    truth = np.array(positives([row["Ground Truth"] for row in rows])).astype(bool)
    told = np.array(positives([row["Pred"] for row in rows])).astype(bool)
    scores = {"diagnosis": finding_scores(labels, statuses), "report": finding_scores(truth, told)}
    return Tested(rows, findings, labels, statuses, truth, told, scores)


def corpus_bleu(rows) -> tuple[float, float]:
    """Return BLEU-1 and BLEU-4 of a CSV's rows in the published convention."""
    language = language_of(rows[0]["Ground Truth"])
    truths, predictions = ([words(row[key], language) for row in rows] for key in ("Ground Truth", "Pred"))
    corpus = bleu(truths, predictions)[0]
    return float(corpus[0]), float(corpus[3])


def table_row(scores: dict, rows=None) -> Row:
    """Return a line of the table from scores by kind ("diagnosis", "report") and, if there are reports,
    their CSV rows."""
    row = Row()
    if "diagnosis" in scores:
        micro, macro = scores["diagnosis"]["micro"]["F1"], scores["diagnosis"]["macro"]["F1"]
        row.diagnosis_micro, row.diagnosis_macro = micro, macro
    if "report" in scores:
        row.report_micro, row.report_macro = scores["report"]["micro"]["F1"], scores["report"]["macro"]["F1"]
    if rows:
        row.bleu_1, row.bleu_4 = corpus_bleu(rows)
    return row


def make_table(model: Tested, controls: dict, baselines: dict, folder) -> dict[str, Row]:
    """Return {name: Row} of the model, its controls and the baselines, whose reports lie in `folder`."""
    table = {name: table_row(t.scores, t.rows) for name, t in {"model": model, **controls}.items()}
    for name, scores in baselines.items():
        file = Path(folder) / f"{name}.csv"
        table[name] = table_row(scores, read_csv(file) if file.is_file() else None)
    return table


def print_table(table: dict[str, Row]):
    """Print the table, and what to read in it."""
    width = max(map(len, table))
    print(f"{'':{width}s} diagnosis micro macro   report micro macro   BLEU-1 BLEU-4")
    for name, row in table.items():
        cells = ("    -" if value is None else f"{value:.3f}" for value in asdict(row).values())
        print(f"{name:{width}s} " + "  ".join(cells))
    print(
        "BLEU hardly separates a model from retrieval here, because the reports share their sentences: "
        "judge by the scores of the findings."
    )


def reported_places(tested: Tested) -> dict:
    """Return {id: {finding: {side, place}}} in the words of the reports, for the findings that they state."""
    return {
        row["ID"]: {f: reported(row["Pred"], f) for f, stated in zip(FINDINGS[:-1], told) if stated}
        for row, told in zip(tested.rows, tested.told)
    }


def locate_findings(attributes: dict, model: Tested, controls: dict) -> dict:
    """Return the accuracy of side and place by the evidence map, by the reports' words, and by the
    controls' words."""
    here = {row["ID"]: attributes[row["ID"]] for row in model.rows}
    mapped = {
        name: {f: row for f, row in found.items() if row["status"] == "1"}
        for name, found in model.findings.items()
    }
    location = {
        "evidence map": location_scores(here, mapped),
        "report's own words": location_scores(here, reported_places(model)),
    }
    for name, control in controls.items():
        location[f"words, {name}"] = location_scores(here, reported_places(control))
    for name, scores in location.items():
        parts = []
        for what, chance in CHANCE.items():
            accuracy = scores[what]["accuracy"]
            shown = "-" if accuracy is None else f"{accuracy:.3f}"
            parts.append(f"{what} {shown} of {scores[what]['count']} (chance {chance:.2f})")
        print(f"{name}: {', '.join(parts)}")
    return location


def draw_findings(model: Tested, baselines: dict, path) -> Path:
    """Draw the F1 of each finding: the model's diagnosis, the model's report, the linear model on voxels."""
    per_finding = {
        "model, diagnosis": model.scores["diagnosis"]["per_finding"],
        "model, report": model.scores["report"]["per_finding"],
        "linear on voxels": baselines["linear"]["diagnosis"]["per_finding"],
    }
    figure, axis = new_figure(1, 1, 9.5, 4)
    at, width = np.arange(len(FINDINGS)), 0.27
    for k, (name, scores) in enumerate(per_finding.items()):
        axis.bar(at + width * k, [scores[f]["F1"] for f in FINDINGS], width, label=name)
    counts = per_finding["model, diagnosis"]
    names = [f"{f} ({counts[f]['count']})" for f in FINDINGS]
    axis.set_xticks(at + width, names, rotation=40, ha="right")
    axis.set(ylabel="F1", title="Held-out volumes; number of cases in brackets", ylim=(0, 1))
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return save_figure(figure, path)


def write_results(out, table, model: Tested, location, details, picture, evidence):
    """Write the rows of the summary: findings of the volume, findings of the report, side and place."""

    def others(field):
        scores = {name: getattr(row, field) for name, row in table.items() if name != "model"}
        return {name: value for name, value in scores.items() if value is not None}

    write_result(
        out,
        "findings of a volume",
        "micro-F1",
        table["model"].diagnosis_micro,
        others("diagnosis_micro"),
        bootstrap(micro_f1, model.labels, model.statuses),
        [(picture, "F1 by finding")],
        f"{len(model.labels)} held-out phantoms, one training seed; the interval is over these volumes; "
        "thresholds calibrated on validation",
        details,
    )
    bleu_model, bleu_nearest = table["model"].bleu_4, table["nearest"].bleu_4
    write_result(
        out,
        "findings of the report",
        "micro-F1",
        table["model"].report_micro,
        others("report_micro"),
        bootstrap(micro_f1, model.truth, model.told),
        [(path, "evidence maps") for path in evidence],
        f"Read from the generated text by the rule-based labeler; BLEU-4 {bleu_model:.2f} against "
        f"{bleu_nearest:.2f} for retrieval hardly separates",
        headline=True,
    )
    for what, chance in CHANCE.items():
        accuracy = {name: scores[what]["accuracy"] for name, scores in location.items()}
        accuracy = {name: value for name, value in accuracy.items() if value is not None}
        if "evidence map" in accuracy:
            write_result(
                out,
                f"{what} of a finding by the evidence map",
                "accuracy",
                accuracy.pop("evidence map"),
                {"chance": chance, **accuracy},
                note=f"{location['evidence map'][what]['count']} findings that are present and were found",
            )


def main(args):
    model, controls = read_tested(args.model), {}
    for pair in args.control:
        name, _, folder = pair.partition("=")
        if not folder:
            raise UserError(f"--control {pair}: write it as name=folder")
        controls[name] = read_tested(folder)
    baselines = read_json(Path(args.baselines) / "baselines.json", dict)
    attributes = read_json(Path(args.data) / "attributes.json", dict)

    table = make_table(model, controls, baselines, args.baselines)
    print_table(table)
    location = locate_findings(attributes, model, controls)
    picture = draw_findings(model, baselines, Path(args.out) / "figures" / "findings.png")
    details = {
        "table": {name: asdict(row) for name, row in table.items()},
        "location": location,
        "per_finding": {kind: model.scores[kind]["per_finding"] for kind in ("diagnosis", "report")},
    }
    atomic_json(Path(args.out) / "figures" / "findings.json", details)
    evidence = sorted((Path(args.model) / "evidence").glob("*.png"))[:2]
    write_results(args.out, table, model, location, details, picture, evidence)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, help="folder of make_data.py, for attributes.json")
    add("--model", required=True, help="folder that test.py wrote")
    add("--control", nargs="*", default=[], metavar="NAME=FOLDER", help="further folders of test.py")
    add("--baselines", required=True, help="folder of baselines.py")
    add("--out", required=True, help="folder for figures/ and results/")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args())
