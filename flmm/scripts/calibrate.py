"""Calibrate a trained head: is a phrase's object there at all (presence), and what IoU to expect (score)?

    python flmm/scripts/calibrate.py --config CONFIG --data DATA --head runs/flmm/train/head.safetensors

Asks the model for the phrases of validation pictures, alone and in their captions, and for phrases that these
pictures do not hold: another picture's, with one word exchanged, invented words. Writes calibration.json
beside the head, where test.py and the demos find it, and reliability.png. Half of the pictures are fitted at
first and the other half scored, so the numbers that it prints are of pictures that were not fitted; what is
written is fitted on all.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np
import torch
from accelerate import Accelerator

from common.arguments import Parser, number
from common.errors import UserError, run
from common.figures import new_figure, save_figure
from common.run import one_process, progress
from flmm.build import add_config_arguments, build_dataset, family_of, load_trained, read_config
from flmm.data.absent import absent_phrases
from flmm.data.samples import SampleBuilder, caption_of_phrases
from flmm.evaluation import phrase_rows
from flmm.models.calibration import Calibration, auc, phrase_features
from flmm.models.flmm import extract

TOGETHER = 8  # questions in one forward pass


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_config_arguments(parser)
    parser.add_argument("--head", type=Path, required=True, help="trained head, .safetensors or .pth")
    parser.add_argument("--split", default="val", help="part of the configuration's data to calibrate on")
    parser.add_argument(
        "--records", type=number(int, 4), default=200, help="number of captions, the first ones"
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, help="random seed of the absent phrases")
    return parser.parse_args(argv)


def questions(record, others, rng, lead=""):
    """[(pieces, which phrase counts, its number in the record or None, kind)] to ask about one picture. lead:
    of the base, before phrases that are asked alone."""
    texts = [info["text"].strip() for info in record["mask_infos"]]
    # gRefCOCO has expressions of nothing
    truths = [
        (None, "no target") if info.get("no_target") else (k, "present")
        for k, info in enumerate(record["mask_infos"])
    ]
    asked = [(record["pieces"], k, *truth) for k, truth in enumerate(truths)]
    for k, (text, truth) in enumerate(zip(texts, truths)):
        asked.append((caption_of_phrases([text], lead), 0, *truth))
        if truth[0] is None:
            continue
        for kind, absent in absent_phrases(text, texts, others, rng).items():
            asked.append((caption_of_phrases([absent], lead), 0, None, kind))
            changed = [(absent, n) if n == k else (piece, n) for piece, n in record["pieces"]]
            asked.append((changed, k, None, kind))
    return asked


@torch.no_grad()
def ask(base, head, sam_encoder, record, asked):
    """Rows (features, present, IoU, kind) of the questions about one picture."""
    build, rows = SampleBuilder.of(base, sam_encoder), []
    samples = [build({**record, "pieces": pieces, "masks": None}) for pieces, _, _, _ in asked]
    for start in range(0, len(asked), TOGETHER):
        features = extract(base, sam_encoder, samples[start : start + TOGETHER], likelihood=True)
        outputs = head(features)
        for feature, output, (_, k, true, kind) in zip(features, outputs, asked[start:]):
            iou = 0.0
            if true is not None:
                one = {name: output[name] for name in ("pred_masks", "sam_pred_masks", "scores")}
                one = {name: value if value is None else value[k : k + 1] for name, value in one.items()}
                truth = torch.from_numpy(record["masks"][true][None])
                iou = phrase_rows(one, truth, record.get("ignore"))[0]["iou"]
            rows.append((phrase_features(feature, output)[k], true is not None, iou, kind))
    return rows


def tell(rows, calibration):
    """{name: number} of a calibration on rows that it was not fitted on."""
    features = torch.stack([r[0] for r in rows])
    presence, score = calibration(features)
    present = torch.tensor([r[1] for r in rows])
    ious = torch.tensor([r[2] for r in rows])
    numbers = {"presence_auc": auc(presence[present], presence[~present])}
    for kind in sorted({r[3] for r in rows} - {"present"}):
        of_kind = torch.tensor([r[3] == kind for r in rows])
        numbers[f"presence_auc, {kind}"] = auc(presence[present], presence[of_kind])
    numbers["score_iou_correlation"] = float(np.corrcoef(score[present], ious[present])[0, 1])
    numbers["presence_error"] = expected_error(presence, present.float())
    numbers["score_error"] = expected_error(score[present], ious[present])
    return numbers


def in_bins(predicted, true, bins=10):
    """[(mean prediction, mean outcome, share of all)] of the bins of the prediction that hold any."""
    where = (predicted * bins).long().clamp(max=bins - 1)
    parts = [where == b for b in where.unique()]
    return [(float(predicted[p].mean()), float(true[p].mean()), float(p.float().mean())) for p in parts]


def expected_error(predicted, true):
    """Mean distance between prediction and outcome over bins of the prediction, weighted by their size."""
    return sum(abs(said - happened) * share for said, happened, share in in_bins(predicted, true))


def draw_reliability(rows, calibration, path):
    """Prediction against outcome in ten bins, for presence and for the score of what is present."""
    features, present = torch.stack([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    presence, score = calibration(features)
    ious = torch.tensor([r[2] for r in rows])
    figure, axes = new_figure(1, 2, width=4.2)
    for axis, title, predicted, true in (
        (axes[0], "presence", presence, present.float()),
        (axes[1], "score of what is there", score[present], ious[present]),
    ):
        said, happened, _ = zip(*in_bins(predicted, true))
        axis.plot([0, 1], [0, 1], color="grey", linewidth=1)
        axis.plot(said, happened, "o-")
        axis.set(xlabel="predicted", ylabel="happened", title=title, xlim=(0, 1), ylim=(0, 1))
    save_figure(figure, path)


def main(args):
    # Data and configuration are checked before the base is loaded.
    config, accelerator = read_config(args.config, args.set), Accelerator()
    one_process(accelerator.num_processes, "a head is calibrated")
    family_of(config)
    data = build_dataset(config, args.split, args.data)
    base, head, sam_encoder, report = load_trained(config, args.head, accelerator.device)
    accelerator.print(report)

    # Ask about every picture what it holds and what it does not.
    rng = np.random.default_rng(args.seed)
    records = [data.record(i) for i in range(min(args.records, len(data)))]
    texts = sorted({info["text"].strip() for record in records for info in record["mask_infos"]})
    if len(texts) < 2 or len({record["file_name"] for record in records}) < 4:
        raise UserError(f"--split {args.split}: has too few pictures to calibrate on; at least 4 are needed")
    pictures = {}  # a picture with several captions lies in one half with all of them
    for record in progress(records, accelerator, desc="asking"):
        found = ask(base, head, sam_encoder, record, questions(record, texts, rng, base.lead))
        pictures.setdefault(record["file_name"], []).extend(found)
    rows = list(pictures.values())

    # Fit one half of the pictures and score the other; then fit all.
    if not all(any(row[1] for part in rows[k::2] for row in part) for k in (0, 1)):
        raise UserError(
            f"--split {args.split}: half of its pictures have no phrase of what is there; take others"
        )

    def fit(parts, **about):
        flat = [row for part in parts for row in part]
        features, present = torch.stack([r[0] for r in flat]), torch.tensor([r[1] for r in flat])
        return Calibration.fit(features, present, torch.tensor([r[2] for r in flat]), about)

    held_out = [row for part in rows[1::2] for row in part]
    half = fit(rows[::2])
    numbers = tell(held_out, half)
    folder = Path(args.head).parent
    draw_reliability(held_out, half, folder / "reliability.png")
    fit(rows, split=args.split, pictures=len(rows), **numbers).save(folder / "calibration.json")
    for name, value in numbers.items():
        print(f"{name}: {value:.3f}")
    print(f"wrote {folder / 'calibration.json'} and {folder / 'reliability.png'}")


if __name__ == "__main__":
    run(main, parse_args())
