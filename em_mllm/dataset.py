"""Signals and questions from disk: `x.h5` (IQ_data, label) and `x.json` (question, answer) as in the seed;
nothing is held in memory.

    modulation.h5     IQ_data float32 (Num, T, 2); label float32 (Num, 1); attributes fs (Hz), classes
                      (JSON list); optional (Num, 1): snr, pulse_width, pulse_time_delay, pri, num_pulses, isr
    modulation.json   [{"id", "question", "answer" (absent in test files), "iq_index_in_h5", "h5_path"}, ...]

Every random choice is a function of (seed, epoch, sample), so that the number of processes and a resume do
not change it.
"""

import json
from collections import Counter
from dataclasses import dataclass
from inspect import getmodule, getsource
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from common.arguments import number
from common.errors import UserError
from common.files import inside
from common.index import remember, scan
from em_mllm.em_foundation.models.embedder import mae_scores
from em_mllm.em_foundation.utils.utils import (
    encoder_tokens,
    first_fit,
    log_spectra,
    pack_sequence,
    with_special_patches,
)
from em_mllm.options import asked, language, looks_like_choice, parse_options, stated_letter, wording
from em_mllm.prepare import AS_RECORDED, SignalSpec, as_learned, check_done, check_rate, points_read, prepare
from em_mllm.shards import open_signals
from em_mllm.signal_file import DEFAULT_FS, SignalFile, cache_folder, read_json_text

MANY = 2000  # questions of one file from which what was found in them is remembered


def add_augmentation_arguments(group):
    """Add the flags of what is done to a training signal, anew in each epoch."""
    group.add_argument(
        "--noise-db",
        type=number(float, -200, 200),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="augmentation: white noise at an SNR drawn uniformly from LOW to HIGH dB, after a random phase",
    )
    group.add_argument(
        "--shift-hz",
        type=number(float, 0),
        default=0.0,
        help="augmentation: frequency shift by up to this many Hz up or down, and a random phase",
    )
    group.add_argument("--roll", action="store_true", help="augmentation: circular shift by a random offset")
    group.add_argument(
        "--phase", action="store_true", help="augmentation: turn the carrier by a random phase"
    )
    group.add_argument(
        "--conjugate",
        action="store_true",
        help="augmentation: mirror the spectrum of every other signal; not where a class is told by the "
        "direction of a sweep or by its side band",
    )


@dataclass(frozen=True)
class Augmentation:
    """What is done to the recorded samples of a training signal; the defaults do nothing. Gain needs none:
    every signal is scaled to its peak."""

    noise_db: tuple | None = None
    shift_hz: float = 0.0
    roll: bool = False
    phase: bool = False
    conjugate: bool = False

    @staticmethod
    def of(args) -> "Augmentation":
        """From the flags of `add_augmentation_arguments`."""
        noise = tuple(args.noise_db) if args.noise_db is not None else None
        if noise and noise[0] > noise[1]:
            raise UserError(f"--noise-db {noise[0]:g} {noise[1]:g}: LOW is above HIGH; swap them")
        return Augmentation(noise, args.shift_hz, args.roll, args.phase, args.conjugate)

    def changes_waves(self) -> bool:
        """Whether it does more than to begin the signal elsewhere: then it needs I and Q."""
        return self.noise_db is not None or bool(self.shift_hz) or self.phase or self.conjugate

    def __call__(self, iq: np.ndarray, fs: float, rng: np.random.Generator, noisy=True) -> np.ndarray:
        """iq (T, 2) at `fs` Hz with all that is drawn from `rng`; noisy False leaves out the noise alone."""
        if self.conjugate and rng.uniform() < 0.5:
            iq = iq * np.array([1, -1], iq.dtype)
        if self.noise_db is not None or self.shift_hz or self.phase:
            iq = turn(iq, fs, rng, self.shift_hz)
        if self.roll:
            iq = np.roll(iq, int(rng.integers(len(iq))), 0)
        if noisy and self.noise_db is not None:
            iq = add_noise(iq, rng, self.noise_db)
        return iq


def signal_spec(files: list[SignalFile]) -> SignalSpec:
    """The specification of what a model learns from these training files."""
    views = {file.done for file in files} - {AS_RECORDED} or {AS_RECORDED}
    if len(views) > 1:
        (one, by), (other, by_other) = sorted(views)[:2]
        raise UserError(f"the files hold views {one} x {by} and {other} x {by_other}; train on one of them")
    (kind, factor) = views.pop()
    share = {file: factor if file.done == AS_RECORDED else 1 for file in files}
    points = max(file.points // share[file] for file in files)
    rates = tuple(sorted({rate / share[file] for file in files for rate in file.rates()}))
    return SignalSpec(points, view=kind, factor=factor, rates=rates)


def check_augmentation(files: list[SignalFile], augmentation: Augmentation):
    """Raise UserError where waves are to be changed of rows that are waves no more."""
    for file in files:
        if augmentation.changes_waves() and file.done != AS_RECORDED:
            raise UserError(
                f"{file.path}: its rows are magnitude and frequency, or averages; of the augmentations only "
                "--roll works on them, leave out the others"
            )


def check_rates(files: list[SignalFile], signal: SignalSpec):
    """Say of each rate of the files that is far from those that `signal` names what becomes of it."""
    for file in files:
        for rate in file.rates():
            check_rate(signal, rate, file.path, file.done)


def check_points(config, files: list[SignalFile], signal: SignalSpec):
    """Raise UserError where signals, read as `signal` says, are longer than an encoder's positions."""
    longest = (config.num_positions - config.num_special) * config.patch_size[0]
    for file in files:
        if max(points_read(signal, file.points, rate, file.done) for rate in file.rates()) > longest:
            factor = signal.factor if file.done == AS_RECORDED else 1
            raise UserError(
                f"{file.path}: IQ_data has signals of {file.points} points, the encoder takes "
                f"{longest * factor}; cut them, or pre-train an encoder with a larger max_seq_len"
            )


def refuse_shared(files: list[SignalFile], others: list[SignalFile], option: str, what="training"):
    """Raise UserError when a file of signals, followed through links, is among the `what` files and for
    `option`."""
    shared = {f.path.resolve() for f in files} & {f.path.resolve() for f in others}
    if shared:
        raise UserError(f"{option}: {min(shared)} is among the {what} files, too; give other signals")


class Records:
    """A list of JSON objects as one byte string and offsets: a tenth of the objects' memory, and forked
    workers share it."""

    def __init__(self, records):
        encoded = [json.dumps(r, ensure_ascii=False).encode() for r in records]
        self.ends = np.cumsum([0] + [len(e) for e in encoded])
        self.bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        return json.loads(self.bytes[self.ends[i] : self.ends[i + 1]].tobytes())


def indices(record: dict) -> list[int]:
    """The rows of the signals that a record is about."""
    index = record["iq_index_in_h5"]
    return index if isinstance(index, list) else [index]


class Chosen(NamedTuple):
    """A pair that the user put together: the questions are about these signals, whatever file they name."""

    h5: Path
    questions: Path


def task_pairs(task_dir=None, task_files=None) -> list[tuple[Path, Path]]:
    """The (h5, json) pairs of --task-dir (every x.h5 with x.json beside it), or of --task-files (h5 json h5
    json ...), which are `Chosen`."""
    if task_dir:
        folder = Path(task_dir)
        if not folder.is_dir():
            raise UserError(f"--task-dir {folder}: no such folder")
        signals = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".h5", ".tar"))
        pairs = [(p, p.with_suffix(".json")) for p in signals]
        if not pairs:
            raise UserError(f"--task-dir {folder}: holds no .h5 file and no .tar")
    elif task_files:
        if len(task_files) % 2:
            raise UserError(
                f"--task-files: {len(task_files)} files given; give h5 and json in turn: a.h5 a.json b.h5 "
                "b.json"
            )
        pairs = [Chosen(Path(a), Path(b)) for a, b in zip(task_files[::2], task_files[1::2])]
    else:
        raise UserError(
            "no data: give --task-dir (a folder of x.h5 with x.json beside it) or --task-files (h5 json h5 "
            "json ...)"
        )
    for h5, questions in pairs:
        for path in (h5, questions):
            if not path.is_file():
                raise UserError(f"{path}: no such file; every x.h5 needs its x.json")
    return pairs


def read_questions(path: Path) -> list[dict]:
    """The records of a question file, with the fields that every record must have checked, and each question
    with its options, wherever they stand."""
    records = read_json_text(path)
    if not isinstance(records, list):
        raise UserError(
            f"{path}: holds a {type(records).__name__}, expected a list of questions; wrap the objects in [ ]"
        )
    if not records:
        raise UserError(f"{path}: the list of questions is empty")
    for n, r in enumerate(records):
        where = f"{path}: item {n}"
        if not isinstance(r, dict):
            raise UserError(
                f"{where} is a {type(r).__name__}, expected an object with question, answer, iq_index_in_h5"
            )
        if not isinstance(r.get("question"), str) or not r["question"].strip():
            raise UserError(f"{where}: question is missing or not text")
        for name in ("answer", "h5_path"):
            if not isinstance(r.get(name), (str, type(None))):
                raise UserError(f"{where}: {name} is a {type(r[name]).__name__}, expected text")
        index = r.get("iq_index_in_h5")
        indices = index if isinstance(index, list) else [index]
        if not indices or any(type(i) is not int for i in indices):
            raise UserError(
                f"{where}: iq_index_in_h5 is {index!r}, expected a whole number or a list of them"
            )
        r["question"] = asked(r)
    return records


def encode_text(tokenizer, question: str, answer: str | None, chat: bool = False) -> tuple[list[int], int]:
    """Token ids of question + eos + answer + eos (as the seed), or of the chat template's turns; and how many
    belong to the prompt.

    answer None: the prompt alone. Only the answer and its end token are learned. Control tokens such as
    <IQ_START> that stand in a question or an answer are text like any other.
    """
    if chat:
        if not tokenizer.chat_template:
            raise UserError("--chat-template: this tokenizer has none; leave the option out")
        prompt = encode_chat(tokenizer, question)
    else:
        prompt = tokenizer(question, split_special_tokens=True)["input_ids"]
        if prompt[-1:] != [tokenizer.eos_token_id]:
            prompt = prompt + [tokenizer.eos_token_id]
    if answer is None:
        return prompt, len(prompt)
    ids = tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return prompt + ids + [tokenizer.eos_token_id], len(prompt)


def encode_chat(tokenizer, question: str) -> list[int]:
    """The user's turn by the tokenizer's chat template, up to where the answer begins."""

    def lay_out(content):
        turns, how = [{"role": "user", "content": content}], dict(tokenize=False, enable_thinking=False)
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, **how)

    def encode(text, plain):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]

    if not any(token in question for token in control_tokens(tokenizer)):
        return encode(lay_out(question), plain=False)
    # the template's own control tokens stay, those of the question are text
    mark = "\ue000"
    before, _, after = lay_out(mark).partition(mark)
    return encode(before, plain=False) + encode(question, plain=True) + encode(after, plain=False)


def control_tokens(tokenizer) -> list[str]:
    """The texts that a tokenizer reads as control tokens."""
    added = tokenizer.added_tokens_decoder.values()
    return [str(token) for token in added if getattr(token, "special", True)]


def turn(iq: np.ndarray, fs: float, rng: np.random.Generator, shift_hz: float) -> np.ndarray:
    """iq (T, 2) turned by a random phase and shifted by up to +-shift_hz."""
    start, shift = rng.uniform(0, 2 * np.pi), rng.uniform(-shift_hz, shift_hz)
    z = (iq[:, 0] + 1j * iq[:, 1]) * np.exp(1j * (start + 2 * np.pi * shift / fs * np.arange(len(iq))))
    return np.stack([z.real, z.imag], 1).astype(np.float32)


def add_noise(iq: np.ndarray, rng: np.random.Generator, noise_db) -> np.ndarray:
    """iq (T, 2) with white noise noise_db = (low, high) dB below its mean power."""
    level = np.sqrt(np.mean(iq.astype(float) ** 2) * 10 ** (-rng.uniform(*noise_db) / 10))
    return (iq + level * rng.standard_normal(iq.shape)).astype(np.float32)


class QuestionDataset(Dataset):
    """Questions about signals, read from (h5, json) pairs.

    questions_per_signal: 0 makes every question an item; n > 0 makes every signal an item, with n of its
    questions drawn anew each epoch and the signal encoded once for all of them. An item is {"iq": [(T, 2)
    ...], "fs": [...], "texts": [(ids, prompt length) ...], "rows": [...]}. augmentation: what is done to the
    signals, anew each epoch. signal: the specification of the model that is asked; without it the one that
    these files give, to be kept with the model they train. Everything is checked here, before anything is
    written: `skip_bad` leaves out what is wrong and counts it in `skipped`. `unread` counts the questions
    with options that could not be read; `wordings` are the commonest wordings of answers with options.
    """

    def __init__(
        self,
        pairs,
        tokenizer,
        max_length=512,
        with_answers=True,
        questions_per_signal=0,
        seed=0,
        chat=False,
        skip_bad=False,
        augmentation=Augmentation(),
        default_fs=DEFAULT_FS,
        limit=0,
        signal: SignalSpec | None = None,
    ):
        self.tokenizer, self.chat, self.with_answers = tokenizer, chat, with_answers
        self.seed, self.epoch, self.augmentation = seed, 0, augmentation
        self.questions_per_signal, self.default_fs = questions_per_signal, default_fs
        self.files, self.tasks, self.skipped, self.unread = [], [], {}, 0
        known, records, self.file_of, self.task_of, signals, wordings = {}, [], [], [], [], {}
        for pair in pairs:
            h5, path = pair
            task = len(self.tasks)
            self.tasks.append(path.stem)
            questions = read_questions(path)[: limit or None]
            owners = self.open_all(known, pair, questions)
            looked = self.look(path, questions, owners, max_length, limit)
            for n, (r, owner) in enumerate(zip(questions, owners)):
                why = looked["why"][n]
                if why and not skip_bad:
                    raise UserError(
                        f"{path}: item {n} (id {r.get('id')}): {why}; mend it, or leave such items out with "
                        "--skip-bad"
                    )
                if why:
                    self.skipped[why.split(",")[0]] = self.skipped.get(why.split(",")[0], 0) + 1
                    continue
                records.append(r)
                self.unread += looked["unread"][n]
                if looked["wording"][n]:
                    wordings.setdefault(looked["language"][n], Counter())[looked["wording"][n]] += 1
                self.file_of.append(owner)
                self.task_of.append(task)
                signals.append((owner, *indices(r)))
        if not records:
            raise UserError(f"{pairs[0][1]}: no usable question is left of {sum(self.skipped.values())}")
        self.wordings = {key: count.most_common(1)[0][0] for key, count in sorted(wordings.items())}
        self.prepare_for(signal)
        self.records = Records(records)
        self.file_of, self.task_of = np.array(self.file_of, np.int32), np.array(self.task_of, np.int32)
        groups = {}
        for row, owned in enumerate(signals):
            groups.setdefault(owned if questions_per_signal else row, []).append(row)
        self.rows = np.concatenate(list(groups.values()))
        self.ends = np.cumsum([0] + [len(g) for g in groups.values()])

    def prepare_for(self, signal: SignalSpec | None):
        """Read the signals as `signal` says (None: as these files give it), and say what is unlike
        training."""
        self.signal = signal_spec(self.files) if signal is None else signal
        check_augmentation(self.files, self.augmentation)
        for file in self.files:
            check_done(self.signal, file.done, file.path)
        check_rates(self.files, self.signal)

    def open_all(self, known, pair, questions) -> list[int]:
        """For each record the number of its signal file.

        In a folder a record's own h5_path beside the json wins over the file of the same name. A `Chosen`
        pair wins over what the records say, unless they name several files.
        """
        h5, path = pair
        named = {r.get("h5_path") or None for r in questions}
        if isinstance(pair, Chosen) and len(named - {None}) <= 1:
            return [self.open(known, path, h5, None, 0)] * len(questions)
        return [self.open(known, path, h5, r.get("h5_path"), n) for n, r in enumerate(questions)]

    def open(self, known, json_path, paired, named, n) -> int:
        """Number of the signal file of one record: its own h5_path beside the json, else the paired file."""
        path = inside(json_path.parent, named) if named else paired
        real = path.resolve()  # one file under two names holds the same signals
        if real not in known:
            if not path.is_file():
                raise UserError(
                    f"{json_path}: item {n}: h5_path {named} is not in {json_path.parent}; put it there or "
                    "correct the field"
                )
            self.files.append(open_signals(path, self.default_fs))
            self.files[-1].pack()
            self.files[-1].bad = self.files[-1].bad_signals()
            known[real] = len(self.files) - 1
        return known[real]

    def look(self, path: Path, questions: list, owners: list, max_length: int, limit: int) -> dict:
        """What is known of each question before a run: why it cannot be used ("" where it can), whether it
        has options that cannot be read, and of an answer with options its wording and language.

        For many questions it is remembered until a file, the tokenizer or an option changes.
        """

        def inspect():
            rows = []
            for r, owner, (ids, _) in zip(questions, owners, self.encode(questions)):
                options = parse_options(r)
                template = wording(r["answer"], options) if options and r.get("answer") else None
                why = self.fault(r, owner, options, len(ids), max_length)
                unread = looks_like_choice(r) and not options
                rows.append((why, unread, template or "", language(r["question"])))
            return dict(zip(("why", "unread", "wording", "language"), map(np.array, zip(*rows))))

        if len(questions) < MANY:
            found = inspect()
        else:
            files = scan([path, *{self.files[owner].path for owner in owners}], ("",))
            code = [getsource(getmodule(part)) for part in (parse_options, encode_text)]  # of this edition
            about = [tokenizer_words(self.tokenizer), self.with_answers, self.chat, max_length, limit, *code]
            found = remember(inspect, files, about, cache_folder())
        return {name: column.tolist() for name, column in found.items()}

    def encode(self, questions):
        answers = [r.get("answer") if self.with_answers else None for r in questions]
        return [encode_text(self.tokenizer, r["question"], a, self.chat) for r, a in zip(questions, answers)]

    def fault(self, record, owner, options, length, max_length) -> str:
        """What is wrong with a record, or an empty string. The text up to the comma is the kind that
        --skip-bad counts."""
        file = self.files[owner]
        for i in indices(record):
            if not 0 <= i < len(file):
                return (
                    f"index past the end, iq_index_in_h5 {i} but {file.path.name} holds {len(file)} signals"
                )
            if i in file.bad:
                return f"unusable signal, IQ_data[{i}] of {file.path.name} {file.bad[i]}"
        if self.with_answers and not record.get("answer"):
            return "no answer, training needs one"
        if length > max_length:
            return f"text too long, {length} tokens but --max-length is {max_length}"
        letter = stated_letter(record.get("answer") or "") if options else None
        if self.with_answers and letter and letter not in options:
            given = ", ".join(sorted(options))
            return f"unknown letter, the answer says ({letter}) but the options are {given}"
        return ""

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def name(self, row: int) -> str:
        """What a message calls a question: its file and its id."""
        return f"{self.tasks[self.task_of[row]]}.json id {self.records[row].get('id')}"

    def signals_of(self, i: int) -> set[tuple[int, int]]:
        """The signals of item i, as (number of the file, row in the file)."""
        return {
            (int(self.file_of[row]), k)
            for row in self.rows[self.ends[i] : self.ends[i + 1]]
            for k in indices(self.records[row])
        }

    def signal_at(self, row: int) -> tuple[np.ndarray, float]:
        """The first signal of question `row` as the encoder reads it, not augmented, and its rate in Hz."""
        file, k = self.files[self.file_of[row]], indices(self.records[row])[0]
        return prepare(file.read(k), file.rate(k), self.signal, file.done)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        rows = self.rows[self.ends[i] : self.ends[i + 1]]
        rng = np.random.default_rng((self.seed, self.epoch, i))
        if self.questions_per_signal and len(rows) > self.questions_per_signal:
            rows = rng.choice(rows, self.questions_per_signal, replace=False)
        records = [self.records[r] for r in rows]
        file = self.files[self.file_of[rows[0]]]
        augment = lambda iq, fs: self.augmentation(iq, fs, rng)
        signals = [
            prepare(file.read(k), file.rate(k), self.signal, file.done, augment) for k in indices(records[0])
        ]
        return {
            "iq": [iq for iq, _ in signals],
            "fs": [fs for _, fs in signals],
            "texts": self.encode(records),
            "rows": rows.tolist(),
        }


def tokenizer_words(tokenizer) -> str:
    """All that decides what a tokenizer makes of a text."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    words = inner.to_str() if inner is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return f"{type(tokenizer).__name__}\n{words}\n{tokenizer.special_tokens_map}\n{tokenizer.chat_template}"


def collate_iq(signals, patch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Signals (T_i, 2) -> (S, T, 2) zero padded to whole patches, and their lengths (S,)."""
    lengths = torch.tensor([len(x) for x in signals])
    out = torch.zeros(len(signals), -(-int(lengths.max()) // patch) * patch, 2)
    for i, x in enumerate(signals):
        out[i, : len(x)] = torch.as_tensor(x)
    return out, lengths


def collate_text(texts, prompt_lengths, pad_id: int):
    """Token lists -> ids, attention_mask, labels (B, L), right padded; labels are -100 over the prompt and
    the padding."""
    longest = max(len(t) for t in texts)
    ids = torch.full((len(texts), longest), pad_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (t, n) in enumerate(zip(texts, prompt_lengths)):
        ids[i, : len(t)], mask[i, : len(t)] = torch.tensor(t), 1
        labels[i, n : len(t)] = torch.tensor(t[n:])
    return ids, mask, labels


class QuestionCollator:
    """Items of QuestionDataset -> keyword arguments of MultiModalModel.forward, and "rows" (which question
    each row is).

    legacy: labels are the raw ids, question and padding included, as in the starter kit.
    """

    def __init__(self, patch: int, pad_id: int, legacy: bool = False):
        self.patch, self.pad_id, self.legacy = patch, pad_id, legacy

    def __call__(self, items):
        iq, lengths = collate_iq([x for item in items for x in item["iq"]], self.patch)
        pairs = [pair for item in items for pair in item["texts"]]
        ids, mask, labels = collate_text([t for t, _ in pairs], [n for _, n in pairs], self.pad_id)
        most = max(len(item["iq"]) for item in items)
        index, start = [], 0
        for item in items:
            here = list(range(start, start + len(item["iq"])))
            index += [here + [-1] * (most - len(here))] * len(item["texts"])
            start += len(here)
        return {
            "iq": iq,
            "iq_lengths": lengths,
            "fs": torch.tensor([f for item in items for f in item["fs"]], dtype=torch.float32),
            "signal_index": torch.tensor(index),
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.clone() if self.legacy else labels,
            "rows": torch.tensor([r for item in items for r in item["rows"]]),
        }


def signal_files(paths, option: str = "--data") -> list[str]:
    """The .h5 files and tar shards among `paths`, folders searched to any depth."""
    files = [file.path for path in paths for file in scan([path], (".h5", ".tar"), option)]
    if not files:
        raise UserError(f"{paths[0]}: holds no .h5 file and no tar shard")
    return list(dict.fromkeys(files))


class SignalDataset(Dataset):
    """Labelled (or unlabelled) signals of several .h5 files for the encoder alone.

    columns: which per-signal values to give with each signal ("label", "snr", "pri", ...). Item: {"iq" (T,
    2), "fs", "index", columns}, with `clean` also "clean", the same without the noise, and with `second` also
    "second", another draw of the augmentation. augmentation: what is done to the signals, anew each epoch.
    learned: the signals that their reader learned from (`SignalSpec.to_json`), whose view these get; see
    `as_learned`. Rows as recorded stand beside rows of a view in the same view.
    """

    def __init__(
        self,
        paths,
        columns=(),
        skip_bad=False,
        seed=0,
        augmentation=Augmentation(),
        clean=False,
        second=False,
        learned: dict | None = None,
    ):
        self.clean, self.second = clean, second
        self.files = [open_signals(p) for p in paths]
        self.seed, self.epoch, self.augmentation, self.skipped = seed, 0, augmentation, {}
        self.signal = as_learned(signal_spec(self.files), learned)
        check_rates(self.files, SignalSpec.from_json(learned) if learned else self.signal)
        check_augmentation(self.files, augmentation)
        owner, index, self.columns = [], [], {name: [] for name in columns}
        for f, file in enumerate(self.files):
            file.pack()
            bad = file.bad_signals()
            if bad and not skip_bad:
                i = min(bad)
                raise UserError(
                    f"{file.path}: IQ_data[{i}] {bad[i]} ({len(bad)} such signals); mend them, or leave them "
                    "out with --skip-bad"
                )
            for why in bad.values():
                self.skipped[why] = self.skipped.get(why, 0) + 1
            good = np.setdiff1d(np.arange(len(file)), list(bad))
            owner.append(np.full(len(good), f))
            index.append(good)
            for name, values in self.columns.items():
                # a column that a file lacks is nan there: tasks differ in what they know
                known = name in file.columns
                values.append(file.column(name)[good] if known else np.full(len(good), np.nan))
        self.owner, self.index = np.concatenate(owner), np.concatenate(index)
        if not len(self.index):
            raise UserError(f"{self.files[0].path}: no usable signal is left of {sum(self.skipped.values())}")
        self.columns = {name: np.concatenate(values) for name, values in self.columns.items()}

    def __len__(self):
        return len(self.index)

    def points(self) -> np.ndarray:
        """Points of every signal after the view."""
        lengths = []
        for f, file in enumerate(self.files):
            factor = self.signal.factor if file.done == AS_RECORDED else 1
            lengths.append(file.lengths()[self.index[self.owner == f]] // factor)
        return np.concatenate(lengths)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, i):
        file, row = self.files[self.owner[i]], self.index[i]
        recorded, rate = file.read(row), file.rate(row)

        def look(noisy: bool = True, draw=()):
            rng = np.random.default_rng((self.seed, self.epoch, i, *draw))
            augment = lambda iq, fs: self.augmentation(iq, fs, rng, noisy)
            return prepare(recorded, rate, self.signal, file.done, augment)

        iq, fs = look()
        item = {"iq": iq, "fs": fs, "index": i, **{k: v[i] for k, v in self.columns.items()}}
        if self.clean:
            item["clean"] = look(noisy=False)[0]
        if self.second:
            item["second"] = look(draw=(1,))[0]
        return item


class PackedSignals(Dataset):
    """Rows of several signals for MAE pre-training; item i is row i of this epoch's plan.

    Each epoch the signals are shuffled, cut to a random length of at least min_points (0: kept whole) and
    packed first-fit, `window` signals at a time, into rows of `room` tokens. Plan, cuts and mask scores
    depend on (seed, epoch) alone.
    """

    def __init__(
        self, signals: SignalDataset, config, room: int, min_points=0, seed=0, window=256, shuffle=True
    ):
        self.signals, self.config, self.room, self.min_points = signals, config, room, min_points
        self.seed, self.window, self.shuffle = seed, window, shuffle
        self.set_epoch(0)

    def set_epoch(self, epoch: int):
        self.epoch = epoch
        self.signals.set_epoch(epoch)
        rng = np.random.default_rng((self.seed, epoch))
        patch, special = self.config.patch_size[0], self.config.num_special

        # the order of the signals, and how many points of each
        order = rng.permutation(len(self.signals)) if self.shuffle else np.arange(len(self.signals))
        longest = (self.config.num_positions - special) * patch
        points = np.minimum(self.signals.points()[order], longest)
        if self.min_points:  # log-uniform: as many short signals as long ones
            low = np.minimum(self.min_points, points)
            points = (low * (points / low) ** rng.uniform(size=len(points))).astype(int)
        counts = points // patch
        if counts.min() < 1:
            raise UserError(f"signals of {points.min()} points are shorter than one patch of {patch}")
        tokens = counts + special
        if tokens.max() > self.room:
            raise UserError(
                f"a signal of {counts.max() * patch} points takes {tokens.max()} tokens, a row has "
                f"{self.room}; raise --row-tokens"
            )

        # the rows, `window` signals at a time
        rows = []
        for start in range(0, len(order), self.window):
            fitted = first_fit(tokens[start : start + self.window], self.room)
            rows += [[start + k for k in row] for row in fitted]
        rows = [rows[k] for k in rng.permutation(len(rows))] if self.shuffle else rows
        self.members = np.concatenate(rows)
        self.ends = np.cumsum([0] + [len(r) for r in rows])
        self.order, self.counts = order, counts
        self.start = rng.uniform(size=len(order))
        self.efficiency = float(tokens.sum() / (len(rows) * self.room))

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        patch, spectra, views = self.config.patch_size[0], [], {}
        for k in self.members[self.ends[i] : self.ends[i + 1]]:
            item = self.signals[int(self.order[k])]
            length = self.counts[k] * patch
            first = int(self.start[k] * (len(item["iq"]) - length + 1))
            rate = self.config.in_fs_unit(item["fs"]) if self.config.use_fs else None
            kinds = [kind for kind in ("iq", "clean", "second") if kind in item]
            cut = {kind: item[kind][first : first + length] for kind in kinds}
            for kind, iq in cut.items():
                views.setdefault(kind, []).append(with_special_patches(iq, patch, rate))
            if self.config.spectrum_weight:
                spectra.append(torch.from_numpy(log_spectra(cut.get("clean", cut["iq"]))))
        packed = {kind: pack_sequence([parts], patch, self.room * patch) for kind, parts in views.items()}
        patches, positions, ids = packed["iq"]
        sample_ids = torch.full((1, self.room), -1)
        sample_ids[0, : len(ids[0])] = ids[0]
        seed = np.random.SeedSequence((self.seed, self.epoch, i)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        row = {
            "patches": patches[0],
            "patch_positions": positions[0],
            "sample_ids_seq": sample_ids[0],
            "noise": mae_scores(sample_ids, self.config.num_special, generator)[0],
        }
        for kind, name in (("clean", "target"), ("second", "second")):
            if kind in packed:
                row[name] = packed[kind][0][0]
        if spectra:
            row["spectrum"] = torch.zeros(self.room, len(spectra[0]))
            row["spectrum"][(positions[0] == 0) & (sample_ids[0] >= 0)] = torch.stack(spectra)
        return row


ENCODER_INPUTS = ("samples", "patch_positions", "sample_ids_seq")


def encoder_inputs(batch: dict, device=None) -> dict:
    """What the encoder takes of a batch of SignalCollator, on `device`."""
    return {k: batch[k].to(device) for k in ENCODER_INPUTS}


class SignalCollator:
    """Items of SignalDataset -> encoder inputs (one signal a row), "index" and the columns.

    teacher: configuration of a teacher, for whom "teacher" holds the same of the signals without the noise.
    """

    def __init__(self, config, teacher=None):
        self.config, self.teacher = config, teacher and SignalCollator(teacher)

    def __call__(self, items):
        iq, lengths = collate_iq([item["iq"] for item in items], self.config.patch_size[0])
        tokens = encoder_tokens(self.config, iq, lengths, torch.tensor([item["fs"] for item in items]))
        others = [k for k in items[0] if k not in ("iq", "fs", "clean", "second")]
        extra = {k: torch.tensor(np.array([item[k] for item in items])) for k in others}
        if self.teacher is not None:
            extra["teacher"] = self.teacher([{**item, "iq": item["clean"]} for item in items])
        return dict(zip(ENCODER_INPUTS, tokens)) | extra
