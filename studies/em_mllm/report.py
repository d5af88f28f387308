"""Rows of the closing table from the metrics that builtin.py and real.py left:

python studies/em_mllm/report.py builtin|devices|questions|smollm2 --runs runs/em_mllm
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np

from common.arguments import Parser
from common.errors import UserError, run
from em_mllm.scores import wilson
from studies.summary import write_result


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument(
        "study",
        choices=("builtin", "devices", "questions", "smollm2"),
        help="builtin: of builtin.py; the others: of real.py",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        required=True,
        help="the folder that holds seed-0/, seed-1/, ... or rtl433/, rtl433_joint/",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="the seeds that were run")
    parser.add_argument("--smoke", action="store_true", help="say that the numbers mean nothing")
    return parser.parse_args(argv)


def read(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path}: missing; run studies/em_mllm/builtin.py or real.py to its end first")
    return json.loads(path.read_text(encoding="utf-8"))


def mean(runs: list, *keys) -> float:
    """Mean over the runs of metrics[key][key]..."""
    for key in keys:
        runs = [r[key] for r in runs]
    return float(np.mean(runs))


def answers(runs: Path, first: Path, seeds: list[int], note: str, joint, control, cnn):
    """Rows of the answers of the joined model; control: without pre-training; cnn: on the same IQ."""
    pictures = [
        (first / "joint/test/figures/accuracy_snr.png", "four-choice accuracy against SNR"),
        (first / "joint/test/figures/confusion.png", "chosen option for each class"),
    ]
    for key, count, title in (
        ("accuracy_high_snr", "high_snr_count", "four-choice questions, SNR >= 10 dB"),
        ("accuracy", "four_choice", "four-choice questions, all SNR"),
    ):
        total = sum(m[count] for m in joint)
        write_result(
            runs,
            title,
            "accuracy",
            mean(joint, key),
            {
                "chance": mean(joint, "chance"),
                "wrong signal": mean(joint, "wrong_signal", key),
                "no pre-training": mean(control, key),
                "CNN on the same IQ": mean(cnn, "four_choice", key),
            },
            wilson(round(sum(m[key] * m[count] for m in joint)), total),
            pictures if key == "accuracy_high_snr" else [],
            f"{total} questions on signals of another seed{note}",
            {
                "seeds": {s: m[key] for s, m in zip(seeds, joint)},
                "by_likelihood": mean(joint, "accuracy_by_likelihood"),
            },
            headline=key == "accuracy_high_snr",
        )
    write_result(
        runs,
        "valid letters in generated answers",
        "fraction",
        mean(joint, "valid_letters"),
        {"no pre-training": mean(control, "valid_letters")},
    )
    write_result(
        runs,
        "open questions",
        "exact match",
        mean(joint, "open", "exact"),
        {"no pre-training": mean(control, "open", "exact")},
        note=f"ROUGE-L {mean(joint, 'open', 'rougeL'):.3f}, BLEU {mean(joint, 'open', 'bleu'):.3f}{note}",
    )


def builtin(runs: Path, seeds: list[int], note: str):
    """Rows of the built-in study: means over the seeds, the controls beside each."""

    def metrics(name):
        return [read(runs / f"seed-{seed}" / name / "metrics.json") for seed in seeds]

    first = runs / f"seed-{seeds[0]}"
    answers(runs, first, seeds, note, metrics("joint/test"), metrics("joint_random/test"), metrics("cnn"))
    tuned, tuned_random, mae = metrics("finetune"), metrics("finetune_random"), metrics("pretrain")
    write_result(
        runs,
        "class from the encoder alone, 23 classes",
        "accuracy",
        mean(tuned, "accuracy"),
        {"chance": mean(tuned, "chance"), "no pre-training": mean(tuned_random, "accuracy")},
        note=f"validation signals{note}",
    )
    write_result(
        runs,
        "log spectra from half of the patches",
        "MSE, lower is better",
        mean(mae, "mse_spectrum", "model"),
        {"mean spectrum": mean(mae, "mse_spectrum", "mean of these signals")},
        figures=[(first / "pretrain/figures/reconstruction.png", "true, seen and reconstructed I")],
    )
    few = metrics("fewshot")
    curves = [m["curves"] for m in few]
    for shots in list(curves[0]["probe, pre-trained"])[1:]:
        write_result(
            runs,
            f"linear probe, {shots} labels per class",
            "accuracy",
            mean(curves, "probe, pre-trained", shots, "accuracy"),
            {"chance": few[0]["chance"], "random encoder": mean(curves, "probe, random", shots, "accuracy")},
            figures=[(first / "fewshot/figures/fewshot.png", "accuracy against labels per class")],
            note=f"15 modulations, all SNR{note}",
        )


def devices(runs: Path, note: str):
    study = read(runs / "rtl433/metrics.json")
    ours, few, unseen = (
        study["conditions"]["encoder, pre-trained"],
        study["few_captures"],
        study["unseen_devices"],
    )
    for level in ("clean", "0dB", "-5dB", "-10dB"):
        write_result(
            runs,
            f"device of a capture, {level}",
            "accuracy",
            ours[level],
            {
                "largest class": study["chance"],
                **{
                    name: scores[level]
                    for name, scores in study["conditions"].items()
                    if name != "encoder, pre-trained"
                },
            },
            figures=[(runs / "rtl433/figures/devices.png", "accuracy in noise")] if level == "clean" else [],
            note=f"{study['count']} real captures of 12 devices{note}",
        )
    write_result(
        runs,
        "device from 3 captures each, clean",
        "accuracy",
        few["encoder, pre-trained, 3 captures"]["clean"],
        {
            "random start": few["encoder, random start, 3 captures"]["clean"],
            "CNN": few["CNN, 3 captures"]["clean"],
            "largest class": study["chance"],
        },
    )
    write_result(
        runs,
        "four unseen devices from 2 captures each",
        "accuracy",
        unseen["labels of the other devices, 2 captures"],
        {
            "random encoder": unseen["random, 2 captures"],
            "masked pre-training alone": unseen["masked pre-training, 2 captures"],
            "chance": 0.25,
        },
    )


def questions(runs: Path, note: str):
    for condition in ("clean", "0dB", "-10dB"):
        answers = read(runs / f"rtl433_joint/test_{condition}/metrics.json")
        write_result(
            runs,
            f"questions about a capture, {condition}",
            "accuracy",
            answers["accuracy"],
            {"chance": answers["chance"], "wrong signal": answers["wrong_signal"]["accuracy"]},
            answers["interval"],
            note=f"device, coding and keying{note}",
            details={"by_task": answers["by_task"]},
        )


def smollm2(runs: Path, note: str):
    """Rows of SmolLM2 on the questions that the tiny language model answered, and of its English."""
    for condition in ("clean", "0dB"):
        ours = read(runs / f"smollm2/test_{condition}/metrics.json")
        tiny = read(runs / f"rtl433_joint/test_{condition}/metrics.json")
        controls = {"chance": ours["chance"], "tiny language model": tiny["accuracy"]}
        if "wrong_signal" in ours:
            controls["wrong signal"] = ours["wrong_signal"]["accuracy"]
        write_result(
            runs,
            f"questions about a capture, SmolLM2-135M, {condition}",
            "accuracy",
            ours["accuracy"],
            controls,
            ours["interval"],
            note=f"{ours['four_choice']} questions; valid letters {ours['valid_letters']:.3f}{note}",
            details={"by_task": ours["by_task"], "open": ours.get("open")},
        )
    if "open" in ours:
        write_result(
            runs,
            "open questions in whole sentences, SmolLM2-135M, 0dB",
            "exact match",
            ours["open"]["exact"],
            {"tiny language model": tiny["open"]["exact"]},
            note=f"ROUGE-L {ours['open']['rougeL']:.3f}{note}",
        )
    language = read(runs / "smollm2/language/metrics.json")
    write_result(
        runs,
        "plain English after training on signals, SmolLM2-135M",
        "perplexity, lower is better",
        language["perplexity_after"],
        {"before": language["perplexity_before"]},
        note="without its adapters the model is the base"
        + (" to the bit" if language["adapters_off_equals_base"] else ": NO, it differs")
        + note,
    )


def main(args):
    note = "; smoke run, the numbers mean nothing" if args.smoke else f"; seeds {args.seeds}"
    if args.study == "builtin":
        builtin(args.runs, args.seeds, note)
    elif args.study == "devices":
        devices(args.runs, note)
    elif args.study == "smollm2":
        smollm2(args.runs, note)
    else:
        questions(args.runs, note)
    print(f"results in {args.runs / 'results'}")


if __name__ == "__main__":
    run(main, parse_args())
