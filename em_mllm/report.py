"""Rows of the closing table from the metrics that the runs of run_builtin.sh left.   python em_mllm/report.py builtin|real --runs
runs/em_mllm"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root: every way of starting this file finds it

from common.errors import UserError, run
from common.summary import write_result


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=("builtin", "real"))
    parser.add_argument("--runs", type=Path, required=True, help="the folder that holds joint/, cnn/, ... or rtl433/, rtl433_joint/")
    parser.add_argument("--smoke", action="store_true", help="say that the numbers mean nothing")
    return parser.parse_args()


def read(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path}: missing; run run_builtin.sh to its end first")
    return json.loads(path.read_text())


def builtin(runs: Path, note: str):
    joint, control, cnn = (
        read(runs / "joint/test/metrics.json"),
        read(runs / "joint_random/test/metrics.json"),
        read(runs / "cnn/metrics.json"),
    )
    mae, few = read(runs / "pretrain/metrics.json")["mse_hidden"], read(runs / "fewshot/metrics.json")
    pictures = [
        (runs / "joint/test/figures/accuracy_snr.png", "four-choice accuracy against SNR"),
        (runs / "joint/test/figures/confusion.png", "chosen option for each class"),
    ]
    for key, title, interval in (
        ("accuracy_high_snr", "four-choice questions, SNR >= 10 dB", "high_snr_interval"),
        ("accuracy", "four-choice questions, all SNR", "interval"),
    ):
        write_result(
            runs,
            title,
            "accuracy",
            joint[key],
            {
                "chance": joint["chance"],
                "wrong signal": joint["wrong_signal"][key],
                "random encoder, same joint training": control[key],
                "CNN on the same IQ": cnn["four_choice"][key],
            },
            joint[interval],
            pictures if key == "accuracy_high_snr" else [],
            f"{joint['four_choice']} questions on signals of another seed{note}",
            {"by_likelihood": joint["accuracy_by_likelihood"], "by_task": joint["by_task"], "by_snr": joint["by_snr"]},
        )
    write_result(
        runs,
        "valid letters in generated answers",
        "share",
        joint["valid_letters"],
        {"random encoder, same joint training": control["valid_letters"]},
    )
    write_result(
        runs,
        "open questions",
        "exact match",
        joint["open"]["exact"],
        {"random encoder, same joint training": control["open"]["exact"]},
        note=f"ROUGE-L {joint['open']['rougeL']:.3f}, BLEU {joint['open']['bleu']:.3f}{note}",
    )
    write_result(
        runs,
        "MAE reconstruction of hidden patches",
        "MSE, lower is better",
        mae["model"],
        {k: v for k, v in mae.items() if k != "model"},
        figures=[(runs / "pretrain/figures/reconstruction.png", "true, seen and reconstructed I")],
    )
    shots, curve = list(few["curves"]["probe, pre-trained"].items())[-1]
    write_result(
        runs,
        f"linear probe, {shots} labels per class",
        "accuracy",
        curve["accuracy"],
        {"chance": few["chance"], "random encoder": few["curves"]["probe, random"][shots]["accuracy"]},
        figures=[(runs / "fewshot/figures/fewshot.png", "accuracy against labels per class")],
        note=f"15 modulations, all SNR{note}",
    )


def real(runs: Path, note: str):
    study = read(runs / "rtl433/metrics.json")
    ours, few, unseen = study["conditions"]["encoder, pre-trained"], study["few_captures"], study["unseen_devices"]
    for level in ("clean", "0dB", "-10dB"):
        write_result(
            runs,
            f"device of a capture, {level}",
            "accuracy",
            ours[level],
            {
                "largest class": study["chance"],
                **{name: scores[level] for name, scores in study["conditions"].items() if name != "encoder, pre-trained"},
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
    for condition in ("clean", "0dB"):
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


def main(args):
    note = "; smoke run, the numbers mean nothing" if args.smoke else "; one seed"
    (builtin if args.study == "builtin" else real)(args.runs, note)
    print(f"results in {args.runs / 'results'}")


if __name__ == "__main__":
    run(main, parse_args())
