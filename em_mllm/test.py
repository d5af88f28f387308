"""Ask a trained model: a test set with its scores and pictures, one recording of any format, or a competition file.

    python em_mllm/test.py --model runs/em_mllm/base/model --task-dir data/em_mllm/test --out runs/em_mllm/base/test
    python em_mllm/test.py --model runs/em_mllm/base/model --iq capture.sigmf-meta --question "What is the modulation type of this signal?"
    python em_mllm/test.py --model ... --task-files round1.h5 round1.json --submission round1_answers.json --team-name us
    python em_mllm/test.py --validate round1_answers.json --task-files round1.h5 round1.json

A four-choice answer is read twice: from generated text (the letter in brackets, else the option that the text names, else the
likeliest) and by the likelihood of the four complete answers. Writes out/metrics.json, predictions.jsonl, and figures/*.png with a .csv
beside each.
"""

import argparse
import json
import re
import shutil
import sys
from datetime import datetime
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from common.checkpoint import atomic_write
from common.errors import UserError, run
from common.figures import new_figure, save_figure
from common.run import progress
from em_mllm.dataset import (
    DEFAULT_FS,
    QuestionCollator,
    QuestionDataset,
    encode_text,
    parse_options,
    read_questions,
    task_pairs,
)
from em_mllm.em_foundation.utils.utils import scale_to_peak
from em_mllm.figures import draw_confusion
from em_mllm.iq_io import FORMATS, read_iq, windows
from em_mllm.model import load_model, read_notes

HIGH_SNR_DB = 10.0


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="the model/ folder that train.py wrote")
    parser.add_argument(
        "--llm-model-path", type=Path, help="where the base LLM is now, if it has moved since training"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code in the LLM folder"
    )
    data = parser.add_argument_group("a test set")
    data.add_argument("--task-dir", type=Path, help="folder in which every x.h5 has its x.json")
    data.add_argument("--task-files", type=Path, nargs="+", help="h5 json h5 json ...")
    data.add_argument(
        "--out",
        type=Path,
        help="folder for metrics, predictions and pictures (replaced if it holds such results)",
    )
    data.add_argument("--limit", type=int, default=0, help="only the first n questions of each file")
    data.add_argument(
        "--skip-bad", action="store_true", help="leave out and count unusable questions and signals"
    )
    data.add_argument("--batch-size", type=int, default=64, help="questions at a time (default 64)")
    data.add_argument("--max-new-tokens", type=int, default=24, help="most tokens to generate (default 24)")
    data.add_argument(
        "--wrong-signal",
        action="store_true",
        help="control: also ask every question about a signal of another class",
    )
    data.add_argument(
        "--calibrate-dir",
        type=Path,
        help="validation folder on which the confidence temperature is fitted (default: none, temperature 1)",
    )
    data.add_argument("--submission", type=Path, help="write the competition's answer file here")
    data.add_argument("--team-name", default="team", help="for the answer file (default team)")
    data.add_argument("--model-name", default="em_mllm", help="for the answer file (default em_mllm)")
    data.add_argument("--validate", type=Path, help="check an answer file against the questions and stop")
    one = parser.add_argument_group("one recording")
    one.add_argument("--iq", type=Path, help=f"a recording: {FORMATS}")
    one.add_argument(
        "--question",
        default="What is the modulation type of this signal?",
        help="what to ask; options as (A) ... (B) ... give a choice",
    )
    one.add_argument(
        "--index", type=int, default=0, help="which signal of a file that holds many (default 0)"
    )
    one.add_argument(
        "--fs",
        type=float,
        help="sampling rate in Hz, where the file does not say (default: the training default)",
    )
    one.add_argument(
        "--window",
        type=int,
        help="points per window of a long capture (default: 1024, or the encoder's most)",
    )
    one.add_argument(
        "--windows", type=int, default=16, help="most windows to ask about, the strongest (default 16)"
    )
    return parser.parse_args()


# ---- reading answers


def extract_letter(text: str, options: dict) -> str | None:
    """The letter that `text` answers with: in brackets, else alone at the start, else of the one option that it names; else None."""
    found = [a for a in re.findall(r"[(（]\s*([A-Z])\s*[)）]", text) if a in options]
    if found:
        return found[0]
    start = re.match(r"\s*([A-Z])(?![A-Za-z0-9])", text)
    if start and start.group(1) in options:
        return start.group(1)
    named = [
        a
        for a, name in options.items()
        if re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", text)
    ]
    longest = [
        a for a in named if not any(options[a] != options[b] and options[a] in options[b] for b in named)
    ]
    return longest[0] if len(longest) == 1 else None


def candidate(question: str, letter: str, name: str) -> str:
    """A complete answer in the language of the question, in the seed's words."""
    return (
        f"正确答案是：({letter}) {name}"
        if re.search(r"[\u4e00-\u9fff]", question)
        else f"The correct answer is: ({letter}) {name}"
    )


class Words:
    """Tokenizer for ROUGE: each Chinese character, and each run of letters and digits."""

    def tokenize(self, text):
        return re.findall(r"[\u4e00-\u9fff]|[A-Za-z0-9\-]+", text.lower())


@torch.no_grad()
def ask(model, tokenizer, batch, records, max_new_tokens):
    """Generate for one collated batch and score the options of its four-choice questions; one dict per record."""
    inputs = {k: batch[k] for k in ("iq", "iq_lengths", "fs", "signal_index", "input_ids", "attention_mask")}
    stop = [tokenizer.eos_token_id] + [
        i for t in ("<|im_end|>",) if (i := tokenizer.get_vocab().get(t)) is not None
    ]
    ids = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = [t.strip() for t in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    options = [parse_options(r) for r in records]
    scored = [i for i, o in enumerate(options) if o]
    likelihood = {}
    if scored:
        tails = [
            [
                tokenizer(candidate(records[i]["question"], a, n), add_special_tokens=False)["input_ids"]
                for a, n in options[i].items()
            ]
            for i in scored
        ]
        part = {k: v if k in ("iq", "iq_lengths", "fs") else v[scored] for k, v in inputs.items()}
        likelihood = dict(zip(scored, model.option_scores(options=tails, **part)))
    answers = []
    for i, (record, text) in enumerate(zip(records, texts)):
        answer = {"id": record.get("id"), "text": text}
        if options[i]:
            letters = list(options[i])
            extracted = extract_letter(text, options[i])
            best = letters[int(likelihood[i].argmax())]
            answer |= {
                "options": options[i],
                "extracted": extracted,
                "pred": extracted or best,
                "likeliest": best,
                "scores": [round(float(v), 5) for v in likelihood[i]],
            }
        answers.append(answer)
    return answers


def answer_set(model, tokenizer, data: QuestionDataset, accelerator, batch_size, max_new_tokens, swap=None):
    """Predictions for every question, in order, with task, truth, class and SNR.

    swap: {row: row whose signal is shown instead}; then only these rows are asked.
    """
    collate = QuestionCollator(model.signal_encoder.config.patch_size[0], tokenizer.pad_token_id)
    snr = [f.column("snr") if "snr" in f.columns else None for f in data.files]
    out = []
    with accelerator.split_between_processes(list(range(len(data)) if swap is None else swap)) as mine:
        for start in progress(range(0, len(mine), batch_size), accelerator, desc="asking", unit="batch"):
            rows = mine[start : start + batch_size]
            items = [data[r] for r in rows]
            for item, r in zip(items, rows):
                record = data.records[r]
                prompt = encode_text(tokenizer, record["question"], None, data.chat)
                item["texts"] = [prompt]
                if swap is not None:
                    item["iq"], item["fs"] = data[swap[r]]["iq"], data[swap[r]]["fs"]
            batch = {k: v.to(accelerator.device) for k, v in collate(items).items()}
            records = [data.records[r] for r in rows]
            for r, record, answer in zip(
                rows, records, ask(model, tokenizer, batch, records, max_new_tokens)
            ):
                index = record["iq_index_in_h5"]
                level = snr[data.file_of[r]]
                answer |= {
                    "task": data.tasks[data.task_of[r]],
                    "answer": record.get("answer"),
                    "snr_db": float(level[index]) if level is not None and isinstance(index, int) else None,
                }
                if record.get("answer") and "options" in answer:
                    answer["truth"] = extract_letter(record["answer"], answer["options"])
                    answer["class"] = answer["options"].get(answer["truth"])
                out.append(answer)
    return gather_object(out)


def other_signals(data: QuestionDataset, seed=0) -> dict:
    """For each four-choice question another question's row whose signal has a different label (of the same task where there is one)."""
    labels = [f.column("label") if "label" in f.columns else np.arange(len(f)) for f in data.files]
    first = [
        i[0] if isinstance(i := data.records[r]["iq_index_in_h5"], list) else i
        for r in range(len(data.records))
    ]
    label = np.array([labels[data.file_of[r]][first[r]] for r in range(len(first))])
    rng, swap = np.random.default_rng(seed), {}
    for r in [r for r in range(len(first)) if parse_options(data.records[r])]:
        same_task = (data.task_of == data.task_of[r]) & (label != label[r])
        swap[r] = int(
            rng.choice(
                np.nonzero(same_task)[0] if same_task.any() else np.setdiff1d(np.arange(len(first)), [r])
            )
        )
    return swap


# ---- scores


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a proportion."""
    p, z = hits / count, 1.96
    centre, half = p + z * z / (2 * count), z * np.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return (centre - half) / (1 + z * z / count), (centre + half) / (1 + z * z / count)


def accuracy(rows, key="pred") -> float:
    return float(np.mean([r[key] == r["truth"] for r in rows])) if rows else float("nan")


def fit_temperature(rows) -> float:
    """The temperature that makes softmax(scores / T) likeliest for the true letters (grid search)."""
    scores = [(torch.tensor(r["scores"]), list(r["options"]).index(r["truth"])) for r in rows]
    grid = np.exp(np.linspace(np.log(0.2), np.log(10), 60))
    return float(min(grid, key=lambda t: sum(float(-(s / t).log_softmax(0)[k]) for s, k in scores)))


def calibration_error(rows, temperature, bins=10) -> float:
    """Expected calibration error of the likelihood answer's confidence."""
    confidence = np.array([float((torch.tensor(r["scores"]) / temperature).softmax(0).max()) for r in rows])
    hit = np.array([r["likeliest"] == r["truth"] for r in rows])
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(
        sum(
            abs(hit[which == b].mean() - confidence[which == b].mean()) * (which == b).mean()
            for b in range(bins)
            if (which == b).any()
        )
    )


def open_scores(rows) -> dict:
    """ROUGE-L, BLEU and exact match of answers to open questions."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import BLEU

    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    rouge = [scorer.score(r["answer"], r["text"])["rougeL"].fmeasure for r in rows]
    bleu = BLEU(tokenize="zh", effective_order=True).corpus_score(
        [r["text"] for r in rows], [[r["answer"] for r in rows]]
    )
    same = [re.sub(r"\s", "", r["answer"]) == re.sub(r"\s", "", r["text"]) for r in rows]
    return {
        "count": len(rows),
        "rougeL": float(np.mean(rouge)),
        "bleu": bleu.score / 100,
        "exact": float(np.mean(same)),
    }


def score(answers, temperature=1.0) -> dict:
    """Everything that metrics.json holds about one pass over the questions."""
    choice = [a for a in answers if a.get("truth")]
    free = [a for a in answers if "options" not in a and a.get("answer")]
    metrics = {"questions": len(answers)}
    if choice:
        high = [a for a in choice if a["snr_db"] is not None and a["snr_db"] >= HIGH_SNR_DB]
        hits = sum(a["pred"] == a["truth"] for a in choice)
        metrics |= {
            "four_choice": len(choice),
            "accuracy": accuracy(choice),
            "interval": wilson(hits, len(choice)),
            "accuracy_by_likelihood": accuracy(choice, "likeliest"),
            "valid_letters": float(np.mean([a["extracted"] is not None for a in choice])),
            "high_snr_count": len(high),
            "accuracy_high_snr": accuracy(high),
            "accuracy_high_snr_by_likelihood": accuracy(high, "likeliest"),
            "high_snr_interval": wilson(sum(a["pred"] == a["truth"] for a in high), len(high))
            if high
            else None,
            "by_task": {
                t: accuracy([a for a in choice if a["task"] == t])
                for t in sorted({a["task"] for a in choice})
            },
            "by_class": {
                c: accuracy([a for a in choice if a["class"] == c])
                for c in sorted({a["class"] for a in choice})
            },
            "by_class_high_snr": {
                c: accuracy([a for a in high if a["class"] == c]) for c in sorted({a["class"] for a in high})
            },
            "letters_given": {
                x: sum(a["pred"] == x for a in choice) for x in sorted({a["pred"] for a in choice})
            },
            "temperature": temperature,
            "calibration_error": calibration_error(choice, temperature),
        }
        metrics["by_snr"] = {
            f"{low}": accuracy(part)
            for low in range(-30, 40, 5)
            if (part := [a for a in choice if a["snr_db"] is not None and low <= a["snr_db"] < low + 5])
        }
    if free:
        high = [a for a in free if a["snr_db"] is not None and a["snr_db"] >= HIGH_SNR_DB]
        metrics["open"] = open_scores(free) | ({"exact_high_snr": open_scores(high)["exact"]} if high else {})
    return metrics


def draw(answers, metrics, folder):
    """Accuracy against SNR, and which option was chosen for each class; numbers as .csv beside each picture."""
    choice = [a for a in answers if a.get("truth")]
    if not choice:
        return
    if metrics["by_snr"]:
        bins = {float(k): v for k, v in metrics["by_snr"].items()}
        figure, axis = new_figure()
        axis.plot([b + 2.5 for b in bins], list(bins.values()), marker="o")
        axis.axhline(np.mean([1 / len(a["options"]) for a in choice]), color="0.6", ls="--", lw=1)
        axis.set(
            xlabel="SNR (dB, 5 dB bins)",
            ylabel="accuracy",
            ylim=(0, 1.02),
            title="four-choice accuracy; dashed: chance",
        )
        save_figure(figure, folder / "accuracy_snr.png")
        atomic_write(
            folder / "accuracy_snr.csv",
            "snr_from_db,accuracy\n" + "".join(f"{b:g},{v:.4f}\n" for b, v in bins.items()),
        )
    names = sorted({n for a in choice for n in a["options"].values()})
    matrix = np.zeros((len(names), len(names)), int)
    for a in choice:
        matrix[names.index(a["class"]), names.index(a["options"][a["pred"]])] += 1
    draw_confusion(matrix, names, "share of questions", folder / "confusion.png")


# ---- the competition's file


def write_submission(path, answers, team_name, model_name):
    """{"team_name", "model_name", "evaluation_time", "answers": [{"id", "pred"}]} of the four-choice questions."""
    content = {
        "team_name": team_name,
        "model_name": model_name,
        "evaluation_time": datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
        "answers": [{"id": a["id"], "pred": a["pred"]} for a in answers if "pred" in a],
    }
    atomic_write(path, json.dumps(content, ensure_ascii=False, indent=1))


def validate_submission(path, questions) -> str:
    """Check an answer file against the question records; returns a summary, raises UserError naming the first fault."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds a {type(content).__name__}, expected an object with team_name, model_name, evaluation_time, answers"
        )
    for name in ("team_name", "model_name", "evaluation_time"):
        if not isinstance(content.get(name), str) or not content[name]:
            raise UserError(f"{path}: {name} is missing or not text")
    try:
        datetime.strptime(content["evaluation_time"], "%Y-%m-%d %H:%M:%S")
    except ValueError as error:
        raise UserError(
            f"{path}: evaluation_time is {content['evaluation_time']!r}, expected YYYY-MM-DD HH:MM:SS"
        ) from error
    if not isinstance(content.get("answers"), list):
        raise UserError(f"{path}: answers is missing or not a list")
    wanted, seen = {r.get("id"): parse_options(r) for r in questions if parse_options(r)}, set()
    for n, a in enumerate(content["answers"]):
        if not isinstance(a, dict) or type(a.get("id")) is not int:
            raise UserError(f"{path}: answers[{n}]: id is missing or not a whole number")
        if a["id"] not in wanted:
            raise UserError(f"{path}: answers[{n}]: id {a['id']} is not among the questions")
        if a["id"] in seen:
            raise UserError(f"{path}: answers[{n}]: id {a['id']} is answered twice")
        if a.get("pred") not in wanted[a["id"]]:
            raise UserError(
                f"{path}: answers[{n}] (id {a['id']}): pred is {a.get('pred')!r}, expected one of {', '.join(wanted[a['id']])}"
            )
        seen.add(a["id"])
    if missing := [i for i in wanted if i not in seen]:
        raise UserError(f"{path}: {len(missing)} questions have no answer, the first is id {missing[0]}")
    return f"{path}: valid, {len(seen)} answers"


# ---- one recording


def answer_recording(model, tokenizer, args, notes):
    """Ask about each window of a recording, print the answers and what most of them say."""
    iq, fs = read_iq(args.iq, args.index)
    config = model.signal_encoder.config
    longest = (config.num_positions - config.num_special) * config.patch_size[0]
    points = args.window or min(longest, 1024)
    if not config.patch_size[0] <= points <= longest:
        raise UserError(f"--window {points}: the encoder takes {config.patch_size[0]} to {longest} points")
    fs = args.fs or fs or notes.get("default_fs", DEFAULT_FS)
    cut = windows(iq, points, args.windows)
    record = {"id": 0, "question": args.question}
    collate = QuestionCollator(config.patch_size[0], tokenizer.pad_token_id)
    prompt = encode_text(tokenizer, args.question, None, notes.get("chat", False))
    items = [
        {"iq": [scale_to_peak(w - w.mean(0))], "fs": [fs], "texts": [prompt], "rows": [0]} for _, w in cut
    ]
    answers = ask(model, tokenizer, collate(items), [record] * len(items), args.max_new_tokens)
    print(
        f"{args.iq}: {len(iq)} samples at {fs:g} Hz, {len(cut)} window(s) of {min(points, len(iq))} asked\n{args.question}"
    )
    for (start, _), a in zip(cut, answers):
        print(f"  {start / fs:10.6f} s  {a['text']}")
    if "pred" in answers[0]:
        mean = torch.stack([torch.tensor(a["scores"]).log_softmax(0) for a in answers]).mean(
            0
        )  # a mean: windows are not independent
        share = (mean / notes.get("temperature", 1.0)).softmax(0)
        best = int(share.argmax())
        letter, name = list(answers[0]["options"].items())[best]
        print(f"answer: ({letter}) {name}, confidence {float(share[best]):.2f}")
    else:
        texts = [a["text"] for a in answers]
        most = max(set(texts), key=texts.count)
        print(f"answer: {most} ({texts.count(most)} of {len(texts)} windows)")


def main(args):
    if args.validate:
        print(
            validate_submission(
                args.validate,
                [r for _, path in task_pairs(args.task_dir, args.task_files) for r in read_questions(path)],
            )
        )
        return
    if args.model is None:
        raise UserError("--model: give the model/ folder that train.py wrote")
    notes = read_notes(args.model)
    if args.iq:
        read_iq(args.iq, args.index)  # a bad file is named before the model is loaded
        model, tokenizer = load_model(args.model, args.llm_model_path, args.trust_remote_code)
        answer_recording(model, tokenizer, args, notes)
        return
    if args.out is None and args.submission is None:
        raise UserError(
            "nothing to write: give --out for scores and pictures, or --submission, or ask about one recording with --iq"
        )
    if (
        args.out
        and args.out.exists()
        and any(args.out.iterdir())
        and not (args.out / "metrics.json").exists()
    ):
        raise UserError(f"{args.out} holds other files; choose another --out")
    accelerator = Accelerator()
    model, tokenizer = load_model(args.model, args.llm_model_path, args.trust_remote_code)
    model.to(accelerator.device)
    options = dict(
        tokenizer=tokenizer,
        max_length=notes.get("max_length", 512),
        with_answers=False,
        chat=notes.get("chat", False),
        skip_bad=args.skip_bad,
        default_fs=notes.get("default_fs", DEFAULT_FS),
        limit=args.limit,
    )
    data = QuestionDataset(task_pairs(args.task_dir, args.task_files), **options)
    if args.submission and len({data.records[r].get("id") for r in range(len(data.records))}) < len(
        data.records
    ):
        raise UserError(
            "--submission: an id stands twice in these questions; give one question file with --task-files"
        )
    common = (accelerator, args.batch_size, args.max_new_tokens)
    temperature = notes.get("temperature", 1.0)
    if args.calibrate_dir:
        held = answer_set(
            model, tokenizer, QuestionDataset(task_pairs(args.calibrate_dir), **options), *common
        )
        temperature = fit_temperature([a for a in held if a.get("truth")])
        if accelerator.is_main_process:
            atomic_write(
                args.model / "multimodal.json",
                json.dumps({**notes, "temperature": temperature}, indent=1, ensure_ascii=False),
            )
    answers = answer_set(model, tokenizer, data, *common)
    wrong = (
        answer_set(model, tokenizer, data, *common, swap=other_signals(data)) if args.wrong_signal else None
    )
    if not accelerator.is_main_process:
        return
    if args.submission:
        write_submission(args.submission, answers, args.team_name, args.model_name)
        print(f"{args.submission}: {sum('pred' in a for a in answers)} answers")
    if args.out:
        metrics = score(answers, temperature) | {"skipped": data.skipped}
        if wrong:
            control = score(wrong)
            metrics["wrong_signal"] = {
                k: control[k]
                for k in ("accuracy", "accuracy_high_snr", "valid_letters", "letters_given")
                if k in control
            }
        if args.calibrate_dir:
            metrics["validation"] = score(held, temperature)
        if any("options" in a for a in answers):
            metrics["chance"] = float(np.mean([1 / len(a["options"]) for a in answers if "options" in a]))
        atomic_write(
            args.out / "predictions.jsonl", "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers)
        )
        atomic_write(args.out / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False))
        shutil.rmtree(
            args.out / "figures", ignore_errors=True
        )  # none of an earlier test may stay beside these numbers
        draw(answers, metrics, args.out / "figures")
        if "accuracy" in metrics:
            low, high = metrics["interval"]
            print(
                f"four-choice accuracy {metrics['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {metrics['four_choice']} "
                f"(chance {metrics['chance']:.2f}), "
                + (
                    f"at SNR >= {HIGH_SNR_DB:g} dB {metrics['accuracy_high_snr']:.3f}, "
                    if metrics["high_snr_count"]
                    else ""
                )
                + f"by likelihood {metrics['accuracy_by_likelihood']:.3f}, valid letters {metrics['valid_letters']:.1%}"
                + (f", with wrong signals {metrics['wrong_signal']['accuracy']:.3f}" if wrong else "")
            )
        if "open" in metrics:
            print(
                "open questions: "
                + ", ".join(
                    f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics["open"].items()
                )
            )
        print(f"results in {args.out}")


if __name__ == "__main__":
    run(main, parse_args())
