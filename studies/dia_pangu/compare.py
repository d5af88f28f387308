"""Gather a model's results, its controls and the baselines into one table, one picture and the rows of the summary.

    python dia_pangu/evaluate/compare.py --data data/dia_pangu --model runs/dia_pangu/results --control blank=... \\
        --baselines runs/dia_pangu/baselines --out runs/dia_pangu
"""

import argparse
import csv
import json
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # repository root: every way of starting this file finds it

import numpy as np

from common.checkpoint import atomic_write
from common.errors import UserError, run
from common.figures import new_figure, save_figure
from studies.summary import write_result
from dia_pangu.evaluate.evidence import location_scores, said
from dia_pangu.evaluate.findings import bootstrap, finding_scores, micro_f1
from dia_pangu.evaluate.labeler import positives
from dia_pangu.evaluate.nlg_eval import bleu, read_csv, words
from dia_pangu.src.Dataset.prompt import FINDINGS


def read_findings(folder) -> dict:
    """findings.csv as {id: {finding: {status, side, place}}}."""
    out = {}
    with open(Path(folder) / "findings.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            out.setdefault(row["ID"], {})[row["finding"]] = row
    return out


def scored(folder) -> dict:
    """Diagnosis and report scores of one folder that test.py wrote, with the arrays behind them."""
    rows, found = read_csv(Path(folder) / "dia-pangu.csv"), read_findings(folder)
    labels = np.array([json.loads(row["GT_labels"]) for row in rows]).astype(bool)
    status = np.array([[found[row["ID"]][name]["status"] == "1" for name in FINDINGS] for row in rows])
    truth, told = (
        np.array(positives([row[key] for row in rows])).astype(bool) for key in ("Ground Truth", "Pred")
    )
    language = "cn" if any("\u4e00" <= c <= "\u9fff" for c in rows[0]["Ground Truth"]) else "en"
    corpus = bleu(
        [words(row["Ground Truth"], language) for row in rows], [words(row["Pred"], language) for row in rows]
    )[0]
    return {
        "rows": rows,
        "found": found,
        "arrays": (labels, status, truth, told),
        "diagnosis": finding_scores(labels, status),
        "report": finding_scores(truth, told),
        "BLEU_4": float(corpus[3]),
        "BLEU_1": float(corpus[0]),
    }


def places_said(scores: dict) -> dict:
    """{id: {finding: {side, place}}} in the words of the reports, for the findings they state."""
    told = scores["arrays"][3]
    return {
        row["ID"]: {name: said(row["Pred"], name) for name, code in zip(FINDINGS[:-1], told[i]) if code}
        for i, row in enumerate(scores["rows"])
    }


def main(args):
    model, controls = scored(args.model), {}
    for pair in args.control:
        name, _, folder = pair.partition("=")
        if not folder:
            raise UserError(f"--control {pair}: write it as name=folder")
        controls[name] = scored(folder)
    base = json.loads((Path(args.baselines) / "baselines.json").read_text())
    labels, status, truth, told = model["arrays"]
    table = {
        name: [run_[kind][mean]["F1"] for kind in ("diagnosis", "report") for mean in ("micro", "macro")]
        + [run_["BLEU_1"], run_["BLEU_4"]]
        for name, run_ in {"model": model, **controls}.items()
    }
    for name, kinds in base.items():
        row = table[name] = [float("nan")] * 6
        for k, kind in enumerate(("diagnosis", "report")):
            if kind in kinds:
                row[2 * k], row[2 * k + 1] = kinds[kind]["micro"]["F1"], kinds[kind]["macro"]["F1"]
        file = Path(args.baselines) / f"{name}.csv"
        if file.is_file():
            rows = read_csv(file)
            corpus = bleu(
                [words(r["Ground Truth"], "en") for r in rows], [words(r["Pred"], "en") for r in rows]
            )[0]
            row[4], row[5] = float(corpus[0]), float(corpus[3])
    width = max(map(len, table))
    print(f"{'':{width}s} diagnosis micro macro   report micro macro   BLEU-1 BLEU-4")
    for name, numbers in table.items():
        print(f"{name:{width}s} " + "  ".join("    -" if np.isnan(n) else f"{n:.3f}" for n in numbers))
    print(
        "BLEU hardly separates a model from retrieval here, because the reports share their sentences: judge by the finding scores."
    )

    attributes = json.loads((Path(args.data) / "attributes.json").read_text())
    here = {row["ID"]: attributes[row["ID"]] for row in model["rows"]}
    mapped = {
        name: {f: row for f, row in found.items() if row["status"] == "1"}
        for name, found in model["found"].items()
    }
    location = {
        "evidence map": location_scores(here, mapped),
        "report's own words": location_scores(here, places_said(model)),
    }
    location |= {
        f"words, {name}": location_scores(here, places_said(run_)) for name, run_ in controls.items()
    }
    for name, scores in location.items():
        print(
            f"{name}: "
            + ", ".join(
                f"{what} {'-' if scores[what]['share'] is None else format(scores[what]['share'], '.3f')} of "
                f"{scores[what]['count']} (chance {chance})"
                for what, chance in (("side", ".5"), ("place", ".33"))
            )
        )

    figure, axis = new_figure(1, 1, 9.5, 4)
    at = np.arange(len(FINDINGS))
    for k, (name, kind) in enumerate((("diagnosis", "diagnosis"), ("report", "report"))):
        axis.bar(
            at + 0.27 * k,
            [model[kind]["per_finding"][f]["F1"] for f in FINDINGS],
            0.27,
            label=f"model, {name}",
        )
    axis.bar(
        at + 0.54,
        [base["linear"]["diagnosis"]["per_finding"][f]["F1"] for f in FINDINGS],
        0.27,
        label="linear on voxels",
    )
    axis.set_xticks(
        at + 0.27,
        [f"{f} ({model['diagnosis']['per_finding'][f]['count']})" for f in FINDINGS],
        rotation=40,
        ha="right",
    )
    axis.set(ylabel="F1", title="Held-out volumes; number of cases in brackets", ylim=(0, 1))
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    picture = save_figure(figure, Path(args.out) / "figures" / "findings.png")
    evidence = sorted((Path(args.model) / "evidence").glob("*.png"))[:2]
    details = {
        "table": [[name, *(None if np.isnan(n) else n for n in numbers)] for name, numbers in table.items()],
        "location": location,
        "per_finding": {kind: model[kind]["per_finding"] for kind in ("diagnosis", "report")},
    }
    atomic_write(Path(args.out) / "figures" / "findings.json", json.dumps(details, indent=1))

    write_result(
        args.out,
        "findings of a volume",
        "micro-F1",
        table["model"][0],
        {name: row[0] for name, row in table.items() if name != "model" and not np.isnan(row[0])},
        bootstrap(micro_f1, labels, status),
        [(picture, "F1 by finding")],
        f"{len(labels)} held-out phantoms, one seed; thresholds calibrated on validation",
        details,
    )
    write_result(
        args.out,
        "findings of the report",
        "micro-F1",
        table["model"][2],
        {name: row[2] for name, row in table.items() if name != "model" and not np.isnan(row[2])},
        bootstrap(micro_f1, truth, told),
        [(path, "evidence maps") for path in evidence],
        "Read from the generated text by the rule-based labeler; BLEU-4 "
        f"{model['BLEU_4']:.2f} against {table['nearest'][5]:.2f} for retrieval hardly separates",
    )
    for what, chance in (("side", 0.5), ("place", 1 / 3)):
        shares = {
            name: scores[what]["share"]
            for name, scores in location.items()
            if scores[what]["share"] is not None
        }
        if "evidence map" in shares:
            write_result(
                args.out,
                f"{what} of a finding by the evidence map",
                "share right",
                shares.pop("evidence map"),
                {"chance": chance, **shares},
                None,
                [],
                f"{location['evidence map'][what]['count']} findings that are there and were found",
            )


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder of make_data.py, for attributes.json")
    parser.add_argument("--model", required=True, help="folder that test.py wrote")
    parser.add_argument(
        "--control", nargs="*", default=[], metavar="NAME=FOLDER", help="further folders of test.py"
    )
    parser.add_argument("--baselines", required=True, help="folder of baselines.py")
    parser.add_argument("--out", required=True, help="folder for figures/ and results/")
    return parser.parse_args()


if __name__ == "__main__":
    run(main, parse_args())
