r"""Write the impression of a real report from its findings, and judge it by what it states.

    python studies/dia_pangu/impressions.py --reports ct_reports_val.json --model runs/llm/model --out runs

In CT-RATE's reports the impression follows the findings behind a quotation mark. The model continues the
findings; the labeler reads the findings of the generated and of the true impression. Controls: the impression
of another patient, and the findings themselves in place of an impression.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch

from common.arguments import Parser, number
from common.checkpoint import atomic_csv
from common.errors import UserError, run
from common.files import read_json
from common.intervals import bootstrap
from common.llm import load_llm
from common.run import progress
from dia_pangu.evaluate.findings import micro_f1
from dia_pangu.evaluate.labeler import positives
from dia_pangu.src.Dataset.prompt import GUIDES, ReportText
from dia_pangu.src.Model.pangu import load_tokenizer
from studies.summary import write_result

MARK = ' "'  # stands between the findings and each sentence of the impression


def read_parts(path) -> list[tuple[str, str, str]]:
    """Return (id, findings, impression) of the reports of a file that have both."""
    cases = read_json(path, {"cases": [{"id": (str, int), "report": str}]})["cases"]
    parts = [(str(case["id"]), *case["report"].partition(MARK)[::2]) for case in cases]
    both = [
        (name, found.strip(), said.strip()) for name, found, said in parts if found.strip() and said.strip()
    ]
    if not both:
        raise UserError(f"{path}: no report has an impression behind a quotation mark")
    return both


@torch.no_grad()
def continue_findings(folder, findings: list[str], tokens: int, batch: int) -> list[str]:
    """Return what the language model of a folder writes behind each of the findings, greedily."""
    model, tokenizer = load_llm(folder, torch.float32), load_tokenizer(folder)
    writer = ReportText(tokenizer, model.get_input_embeddings().num_embeddings, 0)
    out = [""] * len(findings)
    order = sorted(range(len(findings)), key=lambda i: len(findings[i]))  # alike lengths together
    for first in progress(range(0, len(order), batch), desc="impressions"):
        some = order[first : first + batch]
        ids = [writer.ids(f"{GUIDES['en']} {findings[i]}{MARK}")[-900:] for i in some]
        prompt = writer.pad([{"lang_x": row, "attention_mask": [1] * len(row)} for row in ids], left=True)
        made = model.generate(
            input_ids=prompt["lang_x"],
            attention_mask=prompt["attention_mask"],
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=writer.pad_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        for i, row in zip(some, made[:, prompt["lang_x"].shape[1] :]):
            out[i] = writer.decode(row)
    return out


def main(args):
    names, findings, truths = zip(*read_parts(args.reports)[: args.limit or None])
    made = continue_findings(args.model, list(findings), args.max_new_tokens, args.batch_size)
    rows = [{"ID": n, "Ground Truth": t, "Pred": p} for n, t, p in zip(names, truths, made)]
    atomic_csv(args.out / "impressions.csv", rows)

    # What they state, by the labeler; the last finding, "no finding", is none.
    truth, told, found = (
        np.array(positives(texts)).astype(bool)[:, :13] for texts in (truths, made, findings)
    )
    other = np.roll(told, 1, axis=0)
    controls = {
        "impression of another patient": micro_f1(truth, other),
        "the findings themselves": micro_f1(truth, found),
    }
    value = micro_f1(truth, told)
    print(
        f"{len(made)} impressions: micro-F1 {value:.3f}; "
        + ", ".join(f"{k} {v:.3f}" for k, v in controls.items())
    )
    write_result(
        args.out,
        "impression from the findings of a real report",
        "micro-F1",
        value,
        controls,
        bootstrap(micro_f1, truth, told),
        note=f"{len(made)} held-out reports; findings of the generated against those of the true impression, "
        "both by the rule-based labeler",
    )


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--reports", required=True, help="JSON file of held-out reports")
    add("--model", required=True, help="folder of the language model, trained on other reports")
    add("--max-new-tokens", type=number(int, 1), default=90, help="longest impression, in tokens")
    add("--batch-size", type=number(int, 1), default=8, help="impressions written together")
    add("--limit", type=number(int, 0), default=0, help="use only the first reports; 0: all")
    add("--out", type=Path, required=True, help="folder for impressions.csv and results/")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args())
