"""Ask a trained model: a test set with its scores and pictures, one recording of any format, or a competition
file.

    python em_mllm/test.py --model runs/em_mllm/base/model --task-dir data/em_mllm/test --out runs/test
    python em_mllm/test.py --model runs/em_mllm/base/model --iq capture.sigmf-meta --question "What is it?"
    python em_mllm/test.py --model ... --task-files round1.h5 round1.json --submission answers.json
    python em_mllm/test.py --validate answers.json --task-files round1.h5 round1.json

A four-choice answer is read twice: from generated text (the letter in brackets, else the option that the text
names, else the likeliest) and by the likelihood of the four complete answers. Writes out/metrics.json,
predictions.jsonl, and figures/*.png with a .csv beside each.
"""

import json
import re
import shutil
import sys
from pathlib import Path

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from common.arguments import Parser, number, refuse
from common.checkpoint import atomic_json, atomic_write
from common.errors import UserError, run
from common.llm import add_trust_argument
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
from em_mllm.iq_io import FORMATS, read_iq, windows
from em_mllm.model import load_model, read_notes
from em_mllm.scores import HIGH_SNR_DB, draw, fit_temperature, score
from em_mllm.submission import validate_submission, write_submission


def parse_args(argv=None):
    parser = Parser(__doc__)
    count = number(int, 1)
    parser.add_argument("--model", type=Path, help="the model/ folder that train.py wrote")
    parser.add_argument(
        "--llm-model-path", type=Path, help="where the language model is now, if it has moved since training"
    )
    add_trust_argument(parser)
    data = parser.add_argument_group("a test set")
    data.add_argument("--task-dir", type=Path, help="folder in which every x.h5 has its x.json")
    data.add_argument("--task-files", type=Path, nargs="+", help="instead of it: h5 json h5 json ...")
    data.add_argument(
        "--out",
        type=Path,
        help="folder for metrics, predictions and pictures; replaced if it holds such results",
    )
    data.add_argument(
        "--limit", type=number(int, 0), default=0, help="ask the first n questions of each file; 0: all"
    )
    data.add_argument(
        "--skip-bad", action="store_true", help="leave out and count unusable questions and signals"
    )
    data.add_argument("--batch-size", type=count, default=64, help="questions asked at a time")
    data.add_argument("--max-new-tokens", type=count, default=24, help="largest number of generated tokens")
    data.add_argument(
        "--wrong-signal",
        action="store_true",
        help="control: also ask every question about a signal of another class",
    )
    data.add_argument(
        "--calibrate-dir",
        type=Path,
        help="validation folder to fit the temperature of the confidence on; without it the model's own, or "
        "1",
    )
    data.add_argument("--submission", type=Path, help="write the competition's answer file here")
    data.add_argument("--team-name", default="team", help="name of the team in the answer file")
    data.add_argument("--model-name", default="em_mllm", help="name of the model in the answer file")
    data.add_argument("--validate", type=Path, help="check an answer file against the questions and stop")
    one = parser.add_argument_group("one recording")
    one.add_argument("--iq", type=Path, help=f"a recording: {FORMATS}")
    one.add_argument(
        "--question",
        default="What is the modulation type of this signal?",
        help="what to ask; options as (A) ... (B) ... give a choice",
    )
    one.add_argument(
        "--index", type=number(int, 0), default=0, help="which signal of a file that holds many, from 0"
    )
    one.add_argument(
        "--fs",
        type=float,
        help="sampling rate in Hz where the file does not say; without it that of training",
    )
    one.add_argument(
        "--window",
        type=count,
        help="points per window of a long capture; without it 1024, or the encoder's most",
    )
    one.add_argument(
        "--windows", type=count, default=16, help="largest number of windows to ask about, the strongest ones"
    )
    return parser.parse_args(argv)


# ---- reading answers


def extract_letter(text: str, options: dict) -> str | None:
    """The letter that `text` answers with: in brackets, else alone at the start, else of the one option that
    it names; else None."""
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


@torch.no_grad()
def ask(model, tokenizer, batch, records, max_new_tokens):
    """Generate for one collated batch and score the options of its four-choice questions; one dict per
    record."""
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
    """For each four-choice question another question's row whose signal has a different label (of the same
    task where there is one)."""
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


# ---- one recording


def answer_recording(model, tokenizer, args, notes):
    """Ask about each window of a recording; print the answers, and what they say together."""
    iq, fs = read_iq(args.iq, args.index)
    config = model.signal_encoder.config
    longest = (config.num_positions - config.num_special) * config.patch_size[0]
    points = args.window or min(longest, 1024)
    if not config.patch_size[0] <= points <= longest:
        raise UserError(f"--window {points}: the encoder takes {config.patch_size[0]} to {longest} points")
    fs = args.fs or fs or notes.get("default_fs", DEFAULT_FS)

    # the strongest windows, all with the same question
    cut = windows(iq, points, args.windows)
    record = {"id": 0, "question": args.question}
    collate = QuestionCollator(config.patch_size[0], tokenizer.pad_token_id)
    prompt = encode_text(tokenizer, args.question, None, notes.get("chat", False))
    items = [
        {"iq": [scale_to_peak(w - w.mean(0))], "fs": [fs], "texts": [prompt], "rows": [0]} for _, w in cut
    ]
    answers = ask(model, tokenizer, collate(items), [record] * len(items), args.max_new_tokens)
    print(f"{args.iq}: {len(iq)} samples at {fs:g} Hz, {len(cut)} window(s) of {min(points, len(iq))} asked")
    print(args.question)
    for (start, _), answer in zip(cut, answers):
        print(f"  {start / fs:10.6f} s  {answer['text']}")

    # together: the mean of the log-likelihoods (windows are not independent), or the commonest answer
    if "pred" in answers[0]:
        mean = torch.stack([torch.tensor(a["scores"]).log_softmax(0) for a in answers]).mean(0)
        probability = (mean / notes.get("temperature", 1.0)).softmax(0)
        best = int(probability.argmax())
        letter, name = list(answers[0]["options"].items())[best]
        print(f"answer: ({letter}) {name}, confidence {float(probability[best]):.2f}")
    else:
        texts = [a["text"] for a in answers]
        most = max(set(texts), key=texts.count)
        print(f"answer: {most} ({texts.count(most)} of {len(texts)} windows)")


# ---- a test set


def check_options(args):
    """Refuse what is missing, what would have no effect, and an --out that holds other files."""
    one = ["question", "index", "fs", "window", "windows"]
    many = ["task_dir", "task_files", "limit", "skip_bad", "batch_size", "wrong_signal", "calibrate_dir"]
    writes = ["out", "submission", "team_name", "model_name"]
    if args.validate:
        refuse(args, ["model", "iq", *one, "out", "submission", "wrong_signal"], "beside --validate")
        return
    if args.model is None:
        raise UserError("--model is missing; give the model/ folder that train.py wrote")
    if args.iq:
        refuse(args, [*many, *writes], "beside --iq")
        return
    refuse(args, one, "without --iq")
    if not args.submission:
        refuse(args, ["team_name", "model_name"], "without --submission")
    if args.task_dir:
        refuse(args, ["task_files"], "beside --task-dir")
    if args.out is None and args.submission is None:
        raise UserError(
            "nothing to write: give --out for scores and pictures, or --submission, or ask about one "
            "recording "
            "with --iq"
        )
    if (
        args.out
        and args.out.exists()
        and any(args.out.iterdir())
        and not (args.out / "metrics.json").exists()
    ):
        raise UserError(f"{args.out} holds other files; choose another --out")


def write_scores(args, data, answers, metrics):
    """Write metrics, predictions and pictures to --out, and print the numbers."""
    lines = [json.dumps(a, ensure_ascii=False) + "\n" for a in answers]
    atomic_write(args.out / "predictions.jsonl", "".join(lines))
    atomic_json(args.out / "metrics.json", metrics)
    # none of an earlier test may stay beside these numbers
    shutil.rmtree(args.out / "figures", ignore_errors=True)
    draw(answers, metrics, args.out / "figures")
    if "accuracy" in metrics:
        low, high = metrics["interval"]
        parts = [
            f"four-choice accuracy {metrics['accuracy']:.3f} [{low:.3f}, {high:.3f}] of "
            f"{metrics['four_choice']} "
            f"(chance {metrics['chance']:.2f})"
        ]
        if metrics["high_snr_count"]:
            parts.append(f"at SNR >= {HIGH_SNR_DB:g} dB {metrics['accuracy_high_snr']:.3f}")
        parts.append(f"by likelihood {metrics['accuracy_by_likelihood']:.3f}")
        parts.append(f"valid letters {metrics['valid_letters']:.1%}")
        if "wrong_signal" in metrics:
            parts.append(f"with wrong signals {metrics['wrong_signal']['accuracy']:.3f}")
        print(", ".join(parts))
    if "open" in metrics:
        values = {k: f"{v:.3f}" if isinstance(v, float) else v for k, v in metrics["open"].items()}
        print("open questions: " + ", ".join(f"{k} {v}" for k, v in values.items()))
    print(f"results in {args.out}")


def main(args):
    # an answer file is checked without a model
    check_options(args)
    if args.validate:
        pairs = task_pairs(args.task_dir, args.task_files)
        print(validate_submission(args.validate, [r for _, path in pairs for r in read_questions(path)]))
        return

    # one recording; a bad file is named before the model is loaded
    notes = read_notes(args.model)
    if args.iq:
        read_iq(args.iq, args.index)
        model, tokenizer = load_model(args.model, args.llm_model_path, args.trust_remote_code)
        answer_recording(model, tokenizer, args, notes)
        return

    # the model and the questions
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
    ids = {data.records[r].get("id") for r in range(len(data.records))}
    if args.submission and len(ids) < len(data.records):
        raise UserError(
            "--submission: an id stands twice in these questions; give one question file with --task-files"
        )

    # the temperature of the confidence, fitted on validation questions and kept with the model
    how = (accelerator, args.batch_size, args.max_new_tokens)
    temperature, extra = notes.get("temperature", 1.0), {}
    if args.calibrate_dir:
        held = QuestionDataset(task_pairs(args.calibrate_dir), **options)
        held = answer_set(model, tokenizer, held, *how)
        temperature = fit_temperature([a for a in held if a.get("truth")])
        extra["validation"] = score(held, temperature)
        if accelerator.is_main_process:
            atomic_json(args.model / "multimodal.json", {**notes, "temperature": temperature})

    # the answers, and the control: the same questions about signals of other classes
    answers = answer_set(model, tokenizer, data, *how)
    if args.wrong_signal:
        control = score(answer_set(model, tokenizer, data, *how, swap=other_signals(data)))
        shown = ("accuracy", "accuracy_high_snr", "valid_letters", "letters_given")
        extra["wrong_signal"] = {name: control[name] for name in shown if name in control}
    if not accelerator.is_main_process:
        return

    # files
    if args.submission:
        write_submission(args.submission, answers, args.team_name, args.model_name)
        print(f"{args.submission}: {sum('pred' in a for a in answers)} answers")
    if args.out:
        metrics = score(answers, temperature) | {"skipped": data.skipped} | extra
        choice = [1 / len(a["options"]) for a in answers if "options" in a]
        if choice:
            metrics["chance"] = float(np.mean(choice))
        write_scores(args, data, answers, metrics)


if __name__ == "__main__":
    run(main, parse_args())
