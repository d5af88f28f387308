"""Ask about recordings: files of any format and length, one after the other with one model.

Each is read once, piece by piece, and cut into its strongest windows, which are prepared as the signals of
training were (`prepare.prepare`, by the model's specification). Printed are the answers of the windows and
what they say together; out/answers.jsonl holds one line a window and one a recording:

    {"kind": "window", "file", "start", "seconds", "text", "answer", "probabilities"}
    {"kind": "capture", "file", "samples", "fs", "windows", "answer", "confidence", "calibrated",
     "probabilities", "agreement"}
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from common.checkpoint import atomic_path
from common.errors import UserError
from em_mllm.answering import ask
from em_mllm.dataset import QuestionCollator, encode_text
from em_mllm.iq_io import H5, MANY, find_recordings, names_of, needs_format, open_recording, strong_windows
from em_mllm.prepare import AS_RECORDED, check_done, check_rate, nearest_rate, points_read, prepare
from em_mllm.signal_file import DEFAULT_FS

CANNOT_TELL = "cannot tell"
NOT_CALIBRATED = {"temperature": 1.0}
SILENT = "(the model wrote nothing; was it trained long enough?)"


def window_points(args, recording, fs, spec, config) -> int | None:
    """Points that the encoder reads of one window: --window, else as in training; None where the recording is
    a row of a .h5, which is read whole, as in a test set."""
    longest = (config.num_positions - config.num_special) * config.patch_size[0]
    if args.window is None and recording.path.suffix.lower() in H5:
        if points_read(spec, recording.length, fs, recording.done) <= longest:
            return None
    points = args.window or spec.points or min(longest, 1024)
    if not config.patch_size[0] <= points <= longest:
        raise UserError(f"--window {points}: the encoder takes {config.patch_size[0]} to {longest} points")
    return points


def cut(args, path, notes, spec, config):
    """Open a recording and cut it; returns (recording, rate in Hz, [(first sample, samples)])."""
    default_fs = args.fs or notes.get("default_fs", DEFAULT_FS)
    # of several recordings, options are for those that need them
    index = args.index if path.suffix.lower() in MANY else 0
    recording = open_recording(path, index, args.iq_format if needs_format(path) else None, default_fs)
    fs = args.fs or recording.fs
    if not recording.stated and not args.fs:
        print(f"{path}: does not state its sampling rate; taken as {fs:g} Hz", file=sys.stderr)
    if recording.fs not in (None, fs):
        print(f"{path}: states {recording.fs:g} Hz; --fs {fs:g} is taken instead")
    if fs is None and len(spec.rates) == 1:  # what else it may be, it cannot have learned
        fs = spec.rates[0] * spec.factor
        print(f"{path}: does not say its sampling rate; taken as that of training, say another with --fs")
    if fs is None:
        raise UserError(f"{path}: does not say its sampling rate; give it in Hz with --fs")
    check_done(spec, recording.done, path)
    points = window_points(args, recording, fs, spec, config)
    samples, stride = points or recording.length, spec.stride or points
    if points and recording.done == AS_RECORDED:  # as many recorded samples as make `points` points
        near = nearest_rate(spec, fs / spec.factor) if spec.resample else None
        ratio = spec.factor * (fs / spec.factor / near if near else 1)
        samples, stride = round(points * ratio), round(stride * ratio)
    check_rate(spec, fs, path, recording.done)
    found = strong_windows(recording, samples, stride or samples, args.windows)
    if not any(window.any() for _, window in found):
        raise UserError(f"{path}: every sample is zero; nothing was recorded")
    return recording, fs, found


def ask_windows(model, tokenizer, args, notes, spec, recording, fs, found) -> list[dict]:
    """The answers about all windows of one recording, in their order."""
    config = model.signal_encoder.config
    collate = QuestionCollator(config.patch_size[0], tokenizer.pad_token_id)
    prompt = encode_text(tokenizer, args.question, None, notes.get("chat", False))
    answers, device = [], model.iq_tokens.device
    for first in range(0, len(found), args.batch_size):
        items = []
        for _, window in found[first : first + args.batch_size]:
            iq, rate = prepare(window, fs, spec, recording.done)
            items.append({"iq": [iq], "fs": [rate], "texts": [prompt], "rows": [0]})
        batch = {k: v.to(device) for k, v in collate(items).items()}
        records = [{"id": 0, "question": args.question}] * len(items)
        answers += ask(model, tokenizer, batch, records, args.max_new_tokens, notes.get("wordings"))
    return answers


def together(answers: list[dict], calibration: dict) -> dict:
    """What the windows say together: by the mean of their log-likelihoods, because they are not independent;
    without options the commonest answer."""
    if "scores" not in answers[0]:
        texts = [a["text"] for a in answers]
        most = max(set(texts), key=texts.count)
        return {"answer": most, "agreement": texts.count(most) / len(texts)}
    letters = list(answers[0]["options"])
    mean = torch.stack([torch.tensor(a["scores"]).log_softmax(0) for a in answers]).mean(0)
    probability = (mean / calibration["temperature"]).softmax(0)
    best = letters[int(probability.argmax())]
    sure = float(probability.max()) >= calibration.get("threshold", 0.0)
    return {
        "answer": best if sure else CANNOT_TELL,
        "likeliest": best,
        "name": answers[0]["options"][best],
        "confidence": float(probability.max()),
        "calibrated": calibration != NOT_CALIBRATED,
        "probabilities": dict(zip(letters, [round(float(p), 5) for p in probability])),
        "agreement": sum(a["likeliest"] == best for a in answers) / len(answers),
    }


def window_line(path, start: int, fs: float, answer: dict, calibration: dict) -> dict:
    line = dict(kind="window", file=str(path), start=start, seconds=start / fs, text=answer["text"])
    if "scores" in answer:
        probability = (torch.tensor(answer["scores"]) / calibration["temperature"]).softmax(0)
        shares = [round(float(p), 5) for p in probability]
        line |= {"answer": answer["pred"], "probabilities": dict(zip(answer["options"], shares))}
    return line


def show(path, question, recording, fs, lines, whole):
    """Print the answers of the windows and of the recording."""
    count = len(lines)
    print(f"{path}: {recording.length} samples at {fs:g} Hz, {count} window(s) asked")
    print(question)
    for line in lines:
        print(f"  {line['seconds']:10.6f} s  {line['text'] or SILENT}")
    if "likeliest" not in whole:
        print(f"answer: {whole['answer'] or SILENT} ({round(whole['agreement'] * count)} of {count} windows)")
        return
    unsure = f"{CANNOT_TELL}; likeliest " if whole["answer"] == CANNOT_TELL else ""
    sure = f"confidence {whole['confidence']:.2f}" + ("" if whole["calibrated"] else ", not calibrated")
    print(f"answer: {unsure}({whole['likeliest']}) {whole['name']}, {sure}")


@contextmanager
def lines_to(path: Path | None):
    """`with lines_to(path) as write:` a function that adds an object as a line of JSON; None: to nowhere."""
    if path is None:
        yield lambda line: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        yield lambda line: file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"answers in {path}")


def answer_recordings(model, tokenizer, args, notes, spec, calibration):
    """Ask about every recording of --iq. One that cannot be read is named, and the others are asked."""
    paths, bad, config = find_recordings(args.iq, tell=True), [], model.signal_encoder.config
    with lines_to(args.out and args.out / "answers.jsonl") as write:
        for path in paths:
            try:
                recording, fs, found = cut(args, path, notes, spec, config)
                answers = ask_windows(model, tokenizer, args, notes, spec, recording, fs, found)
            except UserError as error:
                if len(paths) == 1:
                    raise
                bad.append(path)
                print(f"error: {error}", file=sys.stderr)
                write({"kind": "error", "file": str(path), "error": str(error)})
                continue
            lines = [window_line(path, start, fs, a, calibration) for (start, _), a in zip(found, answers)]
            whole = together(answers, calibration)
            about = {"kind": "capture", "file": str(path), "samples": recording.length, "fs": fs}
            for line in (*lines, {**about, "windows": len(lines), **whole}):
                write(line)
            show(path, args.question, recording, fs, lines, whole)
    if bad:
        named = names_of(bad)
        raise UserError(f"{len(bad)} of {len(paths)} recordings could not be read: {named}; see above")
