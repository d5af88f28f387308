"""Write the built-in data: signals and four-choice questions in the seed's pair of files, from seeds alone.

    python em_mllm/make_data.py --out data/em_mllm --train 1500 --val 50 --test 80      # signals per class

    out/{train,val,test}/modulation.h5 + .json, radar_jamming.h5 + .json; bandwidth.* with several --fs
The three parts come from different seeds. SNR is uniform over --snr, over the full band. test/ has no signal
of the other two; its answers are kept, the competition's test files leave them out (--no-test-answers).
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import h5py
import numpy as np

from common.arguments import Parser, number
from common.checkpoint import atomic_dir
from common.errors import UserError, run
from common.run import progress
from em_mllm.em_foundation.models.configuration_em import REGRESSION_TASKS
from em_mllm.signal_file import HERTZ
from em_mllm.signals import BANDWIDTHS_HZ, RATE_TASKS, TASKS, make_band, make_signal

LETTERS = "ABCD"
ALL_TASKS = {**TASKS, **RATE_TASKS}
NOUN = {
    "modulation": ("调制类型", "modulation type"),
    "radar_jamming": ("雷达或干扰类型", "radar or jamming type"),
    "bandwidth": ("占用带宽", "occupied bandwidth"),
}
CHOICE = [
    ("请依据给出的IQ信号内容，选出最符合的{zh}{how}。{options}", "正确答案是：({letter}) {name}"),
    ("以下哪一项是该信号的{zh}？{options}", "正确答案是：({letter}) {name}"),
    ("Which option is the {en} of this IQ signal? {options}", "The correct answer is: ({letter}) {name}"),
    ("Choose the {en} that fits the signal. {options}", "The correct answer is: ({letter}) {name}"),
]
OPEN = [("该信号的{zh}是什么？", "{name}"), ("What is the {en} of this signal?", "{name}")]
SENTENCES = [
    ("该信号的{zh}是什么？", "该信号的{zh}是{name}。"),
    ("What is the {en} of this signal?", "The {en} of this signal is {name}."),
]


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not hold other data")
    parser.add_argument(
        "--train",
        type=number(int, 1),
        default=1300,
        help="training signals per modulation class; half as many per radar_jamming class",
    )
    parser.add_argument("--val", type=number(int, 1), default=40, help="validation signals per class")
    parser.add_argument("--test", type=number(int, 1), default=65, help="test signals per class")
    parser.add_argument("--points", type=number(int, 128), default=1024, help="points per signal")
    parser.add_argument(
        "--snr",
        type=number(float, -200, 200),
        nargs=2,
        default=(-10, 20),
        metavar=("LOW", "HIGH"),
        help="SNR range in dB over the full band",
    )
    parser.add_argument(
        "--fs",
        type=HERTZ,
        nargs="+",
        default=[20e6],
        help="sampling rate in Hz; of several, each signal draws one, and the bandwidth in MHz is asked "
        "about, too",
    )
    parser.add_argument("--fading", choices=("none", "rician", "rayleigh"), default="none", help="multipath")
    parser.add_argument(
        "--choice-questions", type=number(int, 0), default=2, help="four-choice questions per training signal"
    )
    parser.add_argument(
        "--open-questions", type=number(int, 0), default=2, help="open questions per training signal"
    )
    parser.add_argument("--sentences", action="store_true", help="answer open questions in whole sentences")
    parser.add_argument(
        "--test-answers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write the answers into test/*.json",
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, help="random seed")
    parser.add_argument("--overwrite", action="store_true", help="replace what make_data wrote before")
    return parser.parse_args(argv)


def four_choice(names, name: str, noun: tuple[str, str], rng: np.random.Generator) -> dict:
    """A question with the right name among up to three others of `names`, in random order. noun: what is
    asked for, (Chinese, English)."""
    others = [n for n in names if n != name]
    options = [name, *(others[i] for i in rng.choice(len(others), min(3, len(others)), replace=False))]
    options = [options[i] for i in rng.permutation(len(options))]
    question, answer = CHOICE[rng.integers(len(CHOICE))]
    shown = " ".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options))
    how = "（四选一）" if len(options) == 4 else ""
    return {
        "question": question.format(zh=noun[0], en=noun[1], options=shown, how=how),
        "answer": answer.format(letter=LETTERS[options.index(name)], name=name),
    }


def open_question(name: str, noun: tuple[str, str], rng: np.random.Generator, sentences=False) -> dict:
    """A question without options. sentences: it is answered by a whole sentence, not by the name alone."""
    question, answer = (SENTENCES if sentences else OPEN)[rng.integers(len(OPEN))]
    words = {"zh": noun[0], "en": noun[1], "name": name}
    return {"question": question.format(**words), "answer": answer.format(**words)}


def write_questions(
    path, names, labels, noun, h5_name: str, rng, choices: int, opens: int, answers=True, sentences=False
):
    """The .json of one task: for signal i of class labels[i], `choices` four-choice and `opens` open
    questions."""
    records = []
    for i, label in enumerate(labels):
        name = names[int(label)]
        items = [four_choice(names, name, noun, rng) for _ in range(choices)]
        items += [open_question(name, noun, rng, sentences) for _ in range(opens)]
        for item in items:
            if not answers:
                del item["answer"]
            records.append({"id": len(records), **item, "iq_index_in_h5": i, "h5_path": h5_name})
    path.write_text(json.dumps(records, ensure_ascii=False, indent=0), encoding="utf-8")


def write_pair(
    folder: Path, task: str, labels: np.ndarray, args, rng, choices: int, opens: int, answers=True
):
    """folder/<task>.h5 and .json: signals of the given labels, each with its questions. Written a thousand
    signals at a time."""
    names, count, rates = ALL_TASKS[task], len(labels), np.atleast_1d(args.fs)
    with h5py.File(folder / f"{task}.h5", "w") as file:
        file.attrs["classes"] = json.dumps(names)
        if len(rates) == 1:
            file.attrs["fs"] = rates[0]
        else:
            file["fs"] = rng.choice(rates, (count, 1))
        fs = np.full(count, rates[0]) if len(rates) == 1 else file["fs"][:, 0]
        data = file.create_dataset("IQ_data", (count, args.points, 2), "float32")
        for name in ("label", "snr", *REGRESSION_TASKS):
            file.create_dataset(name, (count, 1), "float32")
        blocks = range(0, count, 1000)
        for start in progress(blocks, desc=f"{folder.name.strip('.')}/{task}", unit="k signals"):
            part = slice(start, min(start + 1000, count))
            snr, made = rng.uniform(*args.snr, part.stop - start), []
            for label, level, rate in zip(labels[part], snr, fs[part]):
                how = (names[int(label)], args.points, level, rng)
                if task in RATE_TASKS:
                    made.append(make_band(*how, rate, fading=args.fading))
                else:
                    made.append(make_signal(*how, fading=args.fading))
            data[part] = np.stack([iq for iq, _ in made])
            file["label"][part, 0], file["snr"][part, 0] = labels[part], snr
            for name in REGRESSION_TASKS:
                file[name][part, 0] = [info.get(name, np.nan) for _, info in made]
    about = (folder / f"{task}.json", names, labels, NOUN[task], f"{task}.h5", rng)
    write_questions(*about, choices, opens, answers, args.sentences)


def main(args):
    if not args.choice_questions + args.open_questions:
        raise UserError("--choice-questions 0 and --open-questions 0 leave nothing to learn; raise one")
    if args.snr[0] > args.snr[1]:
        raise UserError(f"--snr {args.snr[0]:g} {args.snr[1]:g}: LOW is above HIGH; swap them")
    widest = max(BANDWIDTHS_HZ.values())
    if len(args.fs) > 1 and min(args.fs) < 1.25 * widest:
        raise UserError(
            f"--fs {min(args.fs):g}: signals of {widest / 1e6:g} MHz do not fit; of several rates the lowest "
            f"must be at least {1.25 * widest:g}"
        )
    mine = (args.out / "make_data.json").exists()
    if args.out.exists() and any(args.out.iterdir()) and not (args.overwrite and mine):
        way_out = ", or add --overwrite" if mine else ""
        raise UserError(f"{args.out} is not empty; choose another --out{way_out}")
    counts = {"train": args.train, "val": args.val, "test": args.test}
    questions = {"train": (args.choice_questions, args.open_questions), "val": (1, 0), "test": (1, 1)}
    tasks = list(ALL_TASKS) if np.size(args.fs) > 1 else list(TASKS)
    with atomic_dir(args.out) as out:
        for number, (part, per_class) in enumerate(counts.items()):
            (out / part).mkdir()
            for t, task in enumerate(tasks):
                rng = np.random.default_rng((args.seed, number, t))
                each = per_class if task != "radar_jamming" or part != "train" else max(1, per_class // 2)
                labels = rng.permutation(np.repeat(np.arange(len(ALL_TASKS[task])), each))
                answers = part != "test" or args.test_answers
                write_pair(out / part, task, labels, args, rng, *questions[part], answers)
        (out / "make_data.json").write_text(json.dumps({k: str(v) for k, v in vars(args).items()}))
    print(
        f"{args.out}: {args.train} training signals per modulation class, {args.test} test signals per "
        f"class, {args.points} points, SNR {args.snr[0]:g} to {args.snr[1]:g} dB"
    )


if __name__ == "__main__":
    run(main, parse_args())
