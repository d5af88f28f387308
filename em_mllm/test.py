"""Ask a trained model: a test set with its scores and pictures, recordings of any format, or a competition
file.

    python em_mllm/test.py --model runs/em_mllm/base/model --task-dir data/em_mllm/test --out runs/test
    python em_mllm/test.py --model runs/em_mllm/base/model --iq capture.sigmf-meta --question "What is it?"
    python em_mllm/test.py --model ... --task-files round1.h5 round1.json --submission answers.json
    python em_mllm/test.py --validate answers.json --task-files round1.h5 round1.json
    python em_mllm/test.py --model ... --task-dir test --calibrate-dir val --out runs/test
    python em_mllm/test.py --model ... --iq captures/ --calibration runs/test/calibration.json --out runs/ask

A four-choice answer is read twice: from generated text (the letter in brackets, else the option that the text
names, else the likeliest) and by the likelihood of the four complete answers. Writes out/metrics.json,
predictions.jsonl, and figures/*.png with a .csv beside each; with --calibrate-dir calibration.json; of
recordings answers.jsonl. The model's folder is only read.
"""

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from common.arguments import Parser, number, refuse
from common.checkpoint import atomic_json, atomic_write
from common.errors import UserError, run
from common.files import read_json
from common.llm import add_trust_argument
from common.run import progress
from em_mllm.answering import ask
from em_mllm.dataset import (
    QuestionCollator,
    QuestionDataset,
    check_points,
    indices,
    read_questions,
    refuse_shared,
    task_pairs,
)
from em_mllm.iq_io import BLOCK, FORMATS, MANY, find_recordings, needs_format, open_recording
from em_mllm.model import base_folder, load_model, read_notes
from em_mllm.options import extract_letter, looks_like_choice, parse_options, stated_letter
from em_mllm.prepare import SignalSpec
from em_mllm.recordings import answer_recordings
from em_mllm.scores import HIGH_SNR_DB, choose_threshold, draw, fit_temperature, score
from em_mllm.signal_file import DEFAULT_FS, HERTZ
from em_mllm.submission import validate_submission, write_submission


def parse_args(argv=None):
    parser = Parser(__doc__)
    count = number(int, 1)

    # every use: the trained model, and how it is asked
    parser.add_argument("--model", type=Path, help="the model/ folder that train.py wrote")
    parser.add_argument(
        "--llm-model-path", type=Path, help="where the language model is now, if it has moved since training"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="number format of the language model; without it that of its training",
    )
    parser.add_argument("--batch-size", type=count, default=64, help="questions asked at a time")
    parser.add_argument("--max-new-tokens", type=count, default=24, help="largest number of generated tokens")

    parser.add_argument(
        "--calibration", type=Path, help="calibration.json of an earlier --calibrate-dir, to answer with"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for metrics, predictions and pictures, or answers.jsonl; replaced if it holds such "
        "results",
    )
    add_trust_argument(parser)

    add_test_set_arguments(parser.add_argument_group("a test set"))
    add_recording_arguments(parser.add_argument_group("recordings"))
    return parser.parse_args(argv)


def add_test_set_arguments(group):
    """Questions from files, and what is made of their answers."""
    # questions from files, as in training; one that cannot be used stops the test, or the accuracies of two
    # tests would be over different questions
    group.add_argument("--task-dir", type=Path, help="folder in which every x.h5 has its x.json")
    group.add_argument("--task-files", type=Path, nargs="+", help="instead of it: h5 json h5 json ...")
    group.add_argument(
        "--limit",
        type=number(int, 0),
        default=0,
        help="ask the first n questions of each file of the test; 0: all",
    )
    group.add_argument(
        "--skip-bad", action="store_true", help="leave out and count unusable questions and signals"
    )

    # how much of the accuracy comes from the signal, and how far an answer can be trusted. The calibration
    # needs questions of its own: fitted to those of the test, it would promise too much
    group.add_argument(
        "--wrong-signal",
        action="store_true",
        help="control: also ask every question about a signal of another class",
    )
    group.add_argument(
        "--calibrate-dir",
        type=Path,
        help="validation folder on which the temperature of the confidence is fitted, and the confidence "
        "below which the answer is that it cannot tell; written to --out",
    )
    group.add_argument(
        "--target-accuracy",
        type=number(float, 0, 1),
        default=0.95,
        help="accuracy that the answers given on the validation folder are to have",
    )

    # the competition's answer file
    group.add_argument("--submission", type=Path, help="write the competition's answer file here")
    group.add_argument("--team-name", default="team", help="name of the team in the answer file")
    group.add_argument("--model-name", default="em_mllm", help="name of the model in the answer file")
    group.add_argument("--validate", type=Path, help="check an answer file against the questions and stop")


def add_recording_arguments(group):
    """Signals without a question file: one question about each."""
    group.add_argument("--iq", type=Path, nargs="+", help=f"recordings, or folders of them: {FORMATS}")
    group.add_argument(
        "--iq-format",
        help="how raw samples are stored whose suffix does not say it: cs16, cf32, ..., or SigMF's names",
    )
    group.add_argument(
        "--question",
        default="What is the modulation type of this signal?",
        help="what to ask; options as (A) ... (B) ... give a choice",
    )
    group.add_argument(
        "--index", type=number(int, 0), default=0, help="which signal of a file that holds many, from 0"
    )
    group.add_argument(
        "--fs", type=HERTZ, help="sampling rate in Hz, which a file that does not state it needs"
    )

    # a capture is longer than what the encoder takes, and mostly silence
    group.add_argument(
        "--window",
        type=number(int, 1),
        help="points per window of a long recording; without it as many as the signals of training had",
    )
    group.add_argument(
        "--windows",
        type=number(int, 1),
        default=16,
        help="largest number of windows to ask about, the strongest ones",
    )


# ---- asking


def answer_set(
    model, tokenizer, data: QuestionDataset, accelerator, batch_size, max_new_tokens, wordings=None, swap=None
):
    """Predictions for every question, in order, with task, truth, class and SNR.

    wordings: of complete answers, see `ask`. swap: {row: row whose signal is shown instead}; then only these
    rows are asked.
    """
    # each process asks its part of the rows; the parts are put together in the order of the questions
    collate = QuestionCollator(model.signal_encoder.config.patch_size[0], tokenizer.pad_token_id)
    snr = [f.column("snr") if "snr" in f.columns else None for f in data.files]
    out = []
    with accelerator.split_between_processes(list(range(len(data)) if swap is None else swap)) as mine:
        for start in progress(range(0, len(mine), batch_size), accelerator, desc="asking", unit="batch"):
            # the control keeps text and options of the question and shows another signal
            rows = mine[start : start + batch_size]
            items = [data[r] for r in rows]
            if swap is not None:
                shown = [data[swap[r]] for r in rows]
                items = [{**item, "iq": s["iq"], "fs": s["fs"]} for item, s in zip(items, shown)]

            batch = {k: v.to(accelerator.device) for k, v in collate(items).items()}
            records = [data.records[r] for r in rows]
            answers = ask(model, tokenizer, batch, records, max_new_tokens, wordings)

            # what the scores are sorted by; an SNR only where the question is about one signal
            for r, record, answer in zip(rows, records, answers):
                index, level = record["iq_index_in_h5"], snr[data.file_of[r]]
                known = level is not None and isinstance(index, int) and np.isfinite(level[index])
                answer |= {
                    "task": data.tasks[data.task_of[r]],
                    "answer": record.get("answer"),
                    "snr_db": float(level[index]) if known else None,
                }
                # competition files have no answers: no truth then
                if record.get("answer") and "options" in answer:
                    answer["truth"] = extract_letter(record["answer"], answer["options"])
                    answer["class"] = answer["options"].get(answer["truth"])
                out.append(answer)
    return gather_object(out)


def other_signals(data: QuestionDataset, seed=0) -> dict:
    """For each question with options another question's row whose signal is of another class: of the same
    task where there is one, else of any; another signal where all are of one class. UserError where there is
    none."""

    def classes(file) -> list:
        # without labels its signals count as a class each: any other one will do
        if "label" not in file.columns:
            return list(range(len(file)))
        # by name, because class 3 of one file may be class 5 of another
        names = dict(enumerate(file.classes or ()))
        return [names.get(number, number) for number in file.column("label").tolist()]

    labels = list(map(classes, data.files))
    records = [data.records[row] for row in range(len(data.records))]
    shown = np.array([(owner, indices(r)[0]) for r, owner in zip(records, data.file_of)])
    label = np.array([labels[owner][index] for owner, index in shown], object)

    # drawn from a seed, so that two tests of a model show it the same wrong signals
    rng, swap, rows = np.random.default_rng(seed), {}, np.arange(len(records))
    for row, record in enumerate(records):
        if parse_options(record):
            elsewhere = (shown != shown[row]).any(1)  # also where labels are nan, and so unlike themselves
            wrong = elsewhere & (label != label[row])
            pools = (rows[which] for which in (wrong & (data.task_of == data.task_of[row]), wrong, elsewhere))
            if (others := next(filter(len, pools), None)) is not None:
                swap[row] = int(rng.choice(others))
    # a control that swaps nothing would repeat the scores and look like one
    if not swap:
        raise UserError(
            "--wrong-signal has no effect: no two questions, one of them with options; leave it out"
        )
    return swap


# ---- a test set


# options by the use that they belong to; check_options refuses those of the others
ONE = ("question", "index", "fs", "window", "windows", "iq_format")
TESTED = ("limit", "skip_bad", "wrong_signal", "calibrate_dir", "target_accuracy")
ASKED = ("llm_model_path", "trust_remote_code", "dtype", "batch_size", "max_new_tokens", "calibration")


def check_options(args):
    """Refuse what is missing, what would have no effect, and an --out that holds other files."""
    # each of the three uses has options of its own
    submits = ["submission", "team_name", "model_name"]
    if args.task_dir:
        refuse(args, ["task_files"], "beside --task-dir")

    # an answer file is checked against the questions alone
    if args.validate:
        refuse(args, ["model", "iq", "out", *submits, *ONE, *TESTED, *ASKED], "beside --validate")
        return

    # recordings
    if args.model is None:
        raise UserError("--model is missing; give the model/ folder that train.py wrote")
    if args.iq:
        refuse(args, ["task_dir", "task_files", *TESTED, *submits], "beside --iq")
        check_recordings(args)
        return

    # a test set
    refuse(args, ONE, "without --iq")
    if not args.submission:
        refuse(args, ["team_name", "model_name"], "without --submission")
    if args.calibrate_dir:
        refuse(args, ["calibration"], "beside --calibrate-dir, which makes one")
    else:
        refuse(args, ["target_accuracy"], "without --calibrate-dir")
    if args.out is None:
        refuse(args, ["calibrate_dir", "calibration", "wrong_signal"], "without --out")
        if args.submission is None:
            raise UserError(
                "nothing to write: give --out for scores and pictures, or --submission, or ask about "
                "recordings with --iq"
            )
    check_out(args.out, "metrics.json")


def check_out(out, name: str):
    """Refuse a folder that holds other files than an earlier result called `name`."""
    if out and out.exists() and any(out.iterdir()) and not (out / name).exists():
        raise UserError(f"{out} holds other files; choose another --out")


def check_recordings(args):
    """Name a bad file before the model is loaded, and options that none of the files needs."""
    # only a format that may hold many signals has an index, and only some do not say how they are stored
    paths = find_recordings(args.iq)
    if not any(path.suffix.lower() in MANY for path in paths):
        refuse(args, ["index"], "on recordings that hold one signal")
    if not any(needs_format(path) for path in paths):
        refuse(args, ["iq_format"], "on recordings whose suffix says how they are stored")

    # only options have a confidence
    if not parse_options({"question": args.question}):
        refuse(args, ["calibration"], "on a question without options")

    # of several a bad one is named and passed over later on, a single one is the whole errand
    if len(paths) == 1:
        recording = open_recording(paths[0], args.index, args.iq_format)
        recording.read(0, min(BLOCK, recording.length))
    check_out(args.out, "answers.jsonl")


def read_calibration(path, notes: dict) -> dict:
    """{"temperature", "threshold"} of a file that --calibrate-dir wrote; without one, nothing is doubted."""
    # without a file only a temperature counts that an earlier edition wrote into the model's notes
    if path is None:
        return {"temperature": notes.get("temperature", 1.0)}
    return read_json(path, {"temperature": float, "threshold": float})


def write_scores(args, data, answers, metrics):
    """Write metrics, predictions and pictures to --out, and print the numbers."""
    # each answer as a line, for whoever wants to look at single ones
    lines = [json.dumps(a, ensure_ascii=False) + "\n" for a in answers]
    atomic_write(args.out / "predictions.jsonl", "".join(lines))
    atomic_json(args.out / "metrics.json", metrics)

    # none of an earlier test may stay beside these numbers
    shutil.rmtree(args.out / "figures", ignore_errors=True)
    draw(answers, metrics, args.out / "figures")

    # one line of what a reader asks first; the accuracy never without its interval and chance
    if "accuracy" in metrics:
        low, high = metrics["interval"]
        parts = [
            f"four-choice accuracy {metrics['accuracy']:.3f} [{low:.3f}, {high:.3f}] of "
            f"{metrics['four_choice']} (chance {metrics['chance']:.2f})"
        ]
        if metrics["high_snr_count"]:
            parts.append(f"at SNR >= {HIGH_SNR_DB:g} dB {metrics['accuracy_high_snr']:.3f}")
        parts.append(f"by likelihood {metrics['accuracy_by_likelihood']:.3f}")
        parts.append(f"valid letters {metrics['valid_letters']:.1%}")
        if "coverage" in metrics:
            covered = metrics["coverage"]
            parts.append(f"answered {covered['coverage']:.1%} with accuracy {covered['accuracy'] or 0:.3f}")
        for name, what in (("unread", "options"), ("keys_unread", "true answers")):
            if metrics[name]:
                parts.append(f"{what} not read in {metrics[name]} questions")
        if "wrong_signal" in metrics:
            parts.append(f"with wrong signals {metrics['wrong_signal']['accuracy']:.3f}")
        print(", ".join(parts))

    # open answers are compared as texts, so their scores stand apart
    if "open" in metrics:
        values = {k: f"{v:.3f}" if isinstance(v, float) else v for k, v in metrics["open"].items()}
        print("open questions: " + ", ".join(f"{k} {v}" for k, v in values.items()))
    print(f"results in {args.out}")


def load(args, accelerator):
    """The model on its device, its tokenizer and its notes."""
    # wrong options are told before the language model takes its minutes
    notes = read_notes(args.model)
    base_folder(args.model, notes, args.llm_model_path)
    if args.dtype == notes["dtype"]:
        refuse(args, ["dtype"], f"on a model trained in {args.dtype}")
    if notes.get("load_in_4bit"):
        refuse(args, ["dtype"], "on a language model in 4-bit numbers")

    # with the base that the folder names, or the one given in its place
    model, tokenizer = load_model(args.model, args.llm_model_path, args.trust_remote_code, args.dtype)
    return model.to(accelerator.device), tokenizer, notes


def read_held(args, data: QuestionDataset, options: dict) -> QuestionDataset:
    """The questions of --calibrate-dir: all of them, about other signals than those of the test."""
    # other signals: a threshold chosen on the test's own would flatter its coverage
    held = QuestionDataset(task_pairs(args.calibrate_dir), **options)
    refuse_shared(data.files, held.files, "--calibrate-dir", "test")

    # told before the questions are asked, which may take hours
    for row in range(len(held.records)):
        record = held.records[row]
        choice = parse_options(record)
        if choice and extract_letter(record.get("answer") or "", choice):
            return held
    raise UserError(
        f"--calibrate-dir {args.calibrate_dir}: no question has options and an answer among them, to "
        "which the confidence could be fitted; give validation questions with answers"
    )


def calibrate(answers: list[dict], target: float) -> dict:
    """The temperature and the threshold that answers to validation questions give."""
    # temperature first: the threshold is one of the confidence that it gives
    known = [a for a in answers if a.get("truth")]
    temperature = fit_temperature(known)
    return {"temperature": temperature, **choose_threshold(known, temperature, target)}


def fill_unread(data: QuestionDataset, answers: list[dict]) -> int:
    """Give every question with options that could not be read the letter that its generated text states, or
    A; returns how many there are."""
    # without a letter for each of them the answer file is not valid
    count = 0
    for row, answer in enumerate(answers):
        if "pred" not in answer and looks_like_choice(data.records[row]):
            answer["pred"] = stated_letter(answer["text"]) or "A"
            count += 1
    return count


def submit(args, data, answers):
    """Write the answer file and say what it holds and what not."""
    # every question with options gets a letter, or the whole file would be refused
    unread = fill_unread(data, answers)
    write_submission(args.submission, answers, args.team_name, args.model_name)

    # in words what the file does not hold
    left = sum("pred" not in a for a in answers)
    said = [f"{args.submission}: {len(answers) - left} answers"]
    if unread:
        said.append(
            f"options of {unread} questions could not be read: the letter in the text, or A, stands there"
        )
    if left:
        said.append(f"{left} open questions have no place in it")
    if data.skipped:
        said.append(f"{sum(data.skipped.values())} questions left out by --skip-bad")
    print("; ".join(said))


def main(args):
    # an answer file is checked without a model
    check_options(args)
    if args.validate:
        pairs = task_pairs(args.task_dir, args.task_files)
        print(validate_submission(args.validate, [r for _, path in pairs for r in read_questions(path)]))
        return

    # the model, and what it was trained to read
    accelerator = Accelerator()  # as many processes as torchrun started, each with the whole model
    if args.iq and not accelerator.is_main_process:
        return  # recordings are asked one after the other, and their answers go to one file
    model, tokenizer, notes = load(args, accelerator)
    # the same signal path for a test set and for a recording: one specification, kept with the model
    spec = SignalSpec.from_json(notes.get("signal"))
    calibration = read_calibration(args.calibration, notes)
    if args.iq:
        answer_recordings(model, tokenizer, args, notes, spec, calibration)
        return

    # the questions, laid out as in training; the answers stay out of the text
    options = dict(
        tokenizer=tokenizer,
        max_length=notes.get("max_length", 512),
        with_answers=False,
        chat=notes.get("chat", False),
        skip_bad=args.skip_bad,
        default_fs=notes.get("default_fs", DEFAULT_FS),
        signal=spec,
    )
    data = QuestionDataset(task_pairs(args.task_dir, args.task_files), limit=args.limit, **options)
    held = read_held(args, data, options) if args.calibrate_dir else None
    check_points(model.signal_encoder.config, data.files + (held.files if held else []), spec)

    # the answer file knows a question by its id alone
    ids = [data.records[r].get("id") for r in range(len(data.records))]
    if args.submission and (wrong := [i for i in ids if type(i) is not int]):
        raise UserError(
            f"--submission: the id {wrong[0]!r} of a question is no whole number; number them all"
        )
    if args.submission and len(set(ids)) < len(ids):
        raise UserError(
            "--submission: an id stands twice in these questions; give one question file with --task-files"
        )

    # how sure an answer has to be, from validation questions; never kept in the model's folder
    how, extra = (accelerator, args.batch_size, args.max_new_tokens, notes.get("wordings")), {}
    if held:
        told = answer_set(model, tokenizer, held, *how)
        calibration = calibrate(told, args.target_accuracy)
        extra["validation"] = score(told, calibration)

    # the answers, and the control: the same questions about signals of other classes
    swap = other_signals(data) if args.wrong_signal else None
    answers = answer_set(model, tokenizer, data, *how)
    if args.wrong_signal:
        # a model that listens falls to chance here; what stays above it comes from the texts
        control = score(answer_set(model, tokenizer, data, *how, swap=swap))
        shown = ("accuracy", "accuracy_high_snr", "valid_letters", "letters_given")
        extra["wrong_signal"] = {name: control[name] for name in shown if name in control}
    # the other processes have sent their answers
    if not accelerator.is_main_process:
        return

    # files; chance is the mean of 1 / options, which need not be four
    if args.out:
        metrics = score(answers, calibration) | {"skipped": data.skipped, "unread": data.unread} | extra
        # no score holds them: the true answer names no option
        metrics["keys_unread"] = sum(a.get("truth", "") is None for a in answers)
        choice = [1 / len(a["options"]) for a in answers if "options" in a]
        if choice:
            metrics["chance"] = float(np.mean(choice))
        write_scores(args, data, answers, metrics)
        if args.calibrate_dir:
            atomic_json(args.out / "calibration.json", calibration)
    # the answer file is for the competition, the scores above are for the reader
    if args.submission:
        submit(args, data, answers)


if __name__ == "__main__":
    run(main, parse_args())
