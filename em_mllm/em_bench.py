"""Score answers to EM-Bench (MERLIN, arXiv 2603.08174) as its authors do, and as it should be done.

    python em_mllm/convert.py merlin Modulation.jsonl Anti_CJ.jsonl --out data/em_bench
    python em_mllm/test.py --model ... --task-dir data/em_bench --out runs/em_bench
    python em_mllm/em_bench.py --predictions runs/em_bench/predictions.jsonl --out runs/em_bench/scores
    python em_mllm/em_bench.py --results FOLDER --out scores       # of <task>.json as MERLIN writes them

The published summary leaves empty answers out, compares first characters, and averages accuracies (0 to 100)
with ROUGE-L and BLEU (0 to 1). The mended one counts empty answers as wrong, compares the letters that the
answers state, and keeps the scales apart.
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np

from common.arguments import Parser
from common.checkpoint import atomic_json
from common.errors import UserError, run
from common.files import check, reading
from em_mllm.options import stated_letter
from em_mllm.scores import Words, wilson
from em_mllm.signal_file import read_json_text

OPEN = ("Anti_CJ", "Anti_RJ", "CJS", "RJS")  # tasks of open questions, by the names of their files


def parse_args(argv=None):
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--results", type=Path, help="folder of <task>.json with model_response and answer")
    source.add_argument("--predictions", type=Path, help="predictions.jsonl of test.py, tasks apart by name")
    parser.add_argument("--out", type=Path, required=True, help="folder for scores.json")
    return parser.parse_args(argv)


def read_results(folder: Path) -> dict[str, list[dict]]:
    """{task: [{"answer", "model_response"}]} of the .json files of a folder."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"{folder}: holds no .json; give the folder of one checkpoint's answers")
    tasks = {}
    for path in files:
        items = read_json_text(path)
        check(items, [{"model_response?": str, "answer?": str}], path)
        tasks[path.stem] = items
    return tasks


def read_predictions(path: Path) -> dict[str, list[dict]]:
    """The same of a predictions.jsonl."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the predictions.jsonl that test.py wrote")
    tasks = {}
    with reading(path, "file of predictions"):
        items = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines()]
    check(items, [{"task": str}], path)
    for item in items:
        tasks.setdefault(item["task"], []).append({"model_response": item.get("text"), **item})
    return tasks


def published(tasks: dict) -> dict:
    """The numbers of MERLIN's summarize_results.py: {task_Accuracy (0 to 100), task_ROUGE-L, task_BLEU (0 to
    1), Overall_Avg_Score}."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_score.rouge_scorer import RougeScorer

    rouge, smooth, metrics = RougeScorer(["rougeL"], use_stemmer=True), SmoothingFunction().method1, {}
    for task, items in tasks.items():
        pairs = [(i.get("answer") or "", i.get("model_response") or "") for i in items]
        pairs = [(answer, response) for answer, response in pairs if answer and response]
        if not pairs:
            continue
        if task in OPEN:
            scores = [rouge.score(a, r)["rougeL"].fmeasure for a, r in pairs]
            metrics[f"{task}_ROUGE-L"] = float(np.mean(scores))
            scores = [sentence_bleu([a.split()], r.split(), smoothing_function=smooth) for a, r in pairs]
            metrics[f"{task}_BLEU"] = float(np.mean(scores))
        else:
            metrics[f"{task}_Accuracy"] = 100 * float(np.mean([a[0] == r[0] for a, r in pairs]))
    if metrics:
        metrics["Overall_Avg_Score"] = float(np.mean(list(metrics.values())))
    return metrics


def key_letter(text: str) -> str | None:
    """The letter of an answer key, which may stand before anything, as in "A signal"."""
    return stated_letter(text) or (match[1] if (match := re.match(r"\s*([A-Z])\b", text)) else None)


def mended(tasks: dict) -> dict:
    """{"choice": {task: ...}, "open": {task: ...}} and the means over the tasks of each kind: accuracy with
    its interval, ROUGE-L and BLEU, all from 0 to 1; an empty answer is wrong."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import BLEU

    rouge, bleu = RougeScorer(["rougeL"], tokenizer=Words()), BLEU(tokenize="zh", effective_order=True)
    out = {"choice": {}, "open": {}}
    for task, items in tasks.items():
        pairs = [(i["answer"], i.get("model_response") or "") for i in items if i.get("answer")]
        about = {"count": len(pairs), "empty": sum(not r.strip() for _, r in pairs)}
        about["without_key"] = len(items) - len(pairs)
        if not pairs:
            continue
        if task.replace("-", "_") in OPEN or not any(key_letter(answer) for answer, _ in pairs):
            about["rougeL"] = float(np.mean([rouge.score(a, r)["rougeL"].fmeasure for a, r in pairs]))
            about["bleu"] = float(np.mean([bleu.sentence_score(r, [a]).score / 100 for a, r in pairs]))
            out["open"][task] = about
            continue
        hits = [key_letter(a) is not None and key_letter(a) == stated_letter(r) for a, r in pairs]
        about["unread"] = sum(bool(r.strip()) and stated_letter(r) is None for _, r in pairs)
        about["accuracy"], about["interval"] = float(np.mean(hits)), wilson(sum(hits), len(hits))
        out["choice"][task] = about
    for kind, names in (("choice", ("accuracy",)), ("open", ("rougeL", "bleu"))):
        for name in names if out[kind] else ():
            out[f"mean_{name}"] = float(np.mean([about[name] for about in out[kind].values()]))
    return out


def main(args):
    tasks = read_results(args.results) if args.results else read_predictions(args.predictions)
    scores = {"published": published(tasks), "mended": mended(tasks)}
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_json(args.out / "scores.json", scores)
    print("\n".join(f"published {k}: {v:.4f}" for k, v in scores["published"].items()))
    print("\n".join(f"mended {k}: {v:.4f}" for k, v in scores["mended"].items() if isinstance(v, float)))


if __name__ == "__main__":
    run(main, parse_args())
