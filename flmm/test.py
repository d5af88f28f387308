"""Score trained heads: referring segmentation, panoptic narrative grounding, ReasonSeg.

    python flmm/test.py --config flmm/configs/llava/frozen_llava_1_5_vicuna_7b_unet_sam_l_refcoco_png.yaml \\
        --data /data/coco --head head.safetensors --split refcoco_val --out runs/flmm/test_refcoco_val

With --protocol upstream the first expression of every object counts, and all objects of a picture stand in
one caption, in which later ones see earlier ones through causal attention; published F-LMM numbers are of
this kind (upstream's --concat). With --protocol object each object is a forward pass of its own, with its
first expression: upstream's script without --concat. With --protocol sentence each sentence is one, as other
papers count. OUT gets results.json, phrases.csv, masks.json (COCO RLE) and overlays/*.png; several processes
write the files of one. Upstream: scripts/multiprocess_eval_{refcoco,png}.py.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Subset

from common.arguments import Parser, number
from common.checkpoint import atomic_csv, atomic_json
from common.errors import UserError, run
from common.run import loader_worker, open_run, progress, seed_everything
from flmm.build import (
    add_base_arguments,
    add_config_arguments,
    add_skip_argument,
    attach,
    build_dataset,
    family_of,
    load_trained,
    read_config,
)
from flmm.conversation import answer_then_ground
from flmm.data.samples import SampleBuilder, encode_rle
from flmm.data.skip import SkipBad, keep_good
from flmm.draw import labelled_strip, save_image
from flmm.evaluation import (
    RawMaps,
    binary_masks,
    final_logits,
    other_phrase,
    phrase_rows,
    summarise,
    trivial_controls,
)
from flmm.models.calibration import Calibration, phrase_features
from flmm.models.flmm import extract


def parse_args(argv=None):
    parser = Parser(__doc__)

    # what is scored: one part of the configuration's data, by a head that was trained with the same base
    add_config_arguments(parser)
    parser.add_argument("--split", default="test", help="part of the configuration's data to score")
    parser.add_argument(
        "--head", type=Path, required=True, help="trained head: ours or upstream's, .safetensors or .pth"
    )
    add_base_arguments(parser)

    # how it is counted: the same head gets other numbers under each protocol, so results.json names it
    parser.add_argument(
        "--protocol",
        choices=["upstream", "object", "sentence"],
        default="upstream",
        help="how the sentences of RefCOCO are counted; see above",
    )
    parser.add_argument(
        "--answer-first",
        action="store_true",
        help="ReasonSeg: the base answers each query and its answer is grounded instead of the query; "
        "answers go to phrases.csv",
    )
    parser.add_argument(
        "--controls",
        action="store_true",
        help="also score the whole picture, a centred box, the union of all objects, another phrase's mask, "
        "and the best raw attention map, which is chosen on the train split",
    )

    # how much of it runs at a time, and where the results go
    add_skip_argument(parser)
    parser.add_argument("--limit", type=number(int, 1), help="score only the first so many records")
    parser.add_argument("--batch-size", type=number(int, 1), default=1, help="pictures per forward pass")
    parser.add_argument(
        "--workers", type=number(int, 0), default=0, help="loader processes for each scoring process"
    )
    parser.add_argument("--pictures", type=number(int, 0), default=8, help="number of overlays to draw")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the run that --out holds and start again"
    )
    return parser.parse_args(argv)


def choose_raw_map(base, dataset, accelerator):
    """The single attention map and threshold that fit the first 150 training records best; alike on every
    process."""
    # every process reads the same records, so that all choose alike without a word to each other
    raw = RawMaps()
    for i in progress(range(min(150, len(dataset))), accelerator, desc="choosing the raw map"):
        sample = dataset[i]
        feature = base([sample])[0] | {"unpad": base.unpad, "meta_data": sample["meta_data"]}
        raw.fit(feature, sample["gt_masks"])
    return raw.choose()


def score(samples, features, outputs, raw=None, calibration=None):
    """One row per phrase of a batch: file, phrase, scores and the mask as RLE.

    raw: the chosen raw map; with it the controls are scored, too. calibration: turns SAM's predicted IoU into
    a calibrated score and adds the probability that the thing is there.
    """
    rows = []
    for sample, feature, output in zip(samples, features, outputs):
        # masks are compared at the size of the file (n, H, W), whatever size the base saw the picture at
        # pixels labelled "ignore" count neither as hit nor as miss
        gt, ignore = sample["gt_masks"], sample.get("ignore")
        scores = phrase_rows(output, gt, ignore)

        # SAM predicts an IoU also for what is not there; a calibration was fitted on such phrases, too
        if calibration is not None:
            presence, expected = calibration(phrase_features(feature, output))
            for row, there, iou in zip(scores, presence.tolist(), expected.tolist()):
                row |= {"score": iou, "presence": there, "found": row["found"] and there >= 0.5}
        masks = binary_masks(final_logits(output), gt.shape[1:]).cpu().numpy()

        # a mask that reads no word, or the wrong ones, and attention without a head: what a head must exceed
        if raw is not None:
            trivial_controls(gt, scores, ignore)
            other_phrase(output, gt, scores, ignore)
            raw.score(feature, gt, scores, ignore)

        # plural and isthing are the groups of panoptic narrative grounding
        for row, info, mask in zip(scores, sample["mask_infos"], masks):
            name = {"file": sample["file_name"], "phrase": info["text"].strip()}
            kind = {"plural": info["plural"], "isthing": info["isthing"]}
            rows.append({**name, **row, **kind, "rle": encode_rle(mask)})
    return rows


def score_batch(base, head, sam_encoder, samples, args, raw, calibration):
    """Rows of the phrases of some samples, and what the head made of them."""
    answers = None
    if args.answer_first:  # the base's answer takes the place of the query as the phrase to ground
        samples, answers = answer_queries(base, samples, args.split)

    # one pass of the base; the words' own probabilities are read from it only where a calibration wants them
    features = extract(base, sam_encoder, samples, likelihood=calibration is not None)
    outputs = head(features, finish=finished)
    rows = score(samples, features, outputs, raw, calibration)
    if answers is not None:
        rows = [{**row, "answer": answer} for row, answer in zip(rows, answers)]
    return rows, outputs


def finished(logits):
    """A phrase's mask at the size of its picture, so that a large picture's logits need not be kept."""
    return binary_masks(logits, logits.shape[1:]).cpu()


def answer_queries(base, samples, split):
    """Let the base answer the query of each sample: samples whose phrase is the answer, and the answers."""
    if any(len(sample["mask_infos"]) > 1 for sample in samples):
        raise UserError(
            f"--answer-first: {split} has captions with several phrases; it is for ReasonSeg, one query a "
            "record"
        )
    return zip(*[answer_then_ground(base, sample) for sample in samples])


def draw(sample, output, path):
    """One picture: the true masks, the coarse ones and the refined ones, with the phrases in their
    colours."""
    # without SAM the coarse mask is the last one
    size = sample["gt_masks"].shape[1:]
    columns = [
        ("truth", sample["gt_masks"].numpy()),
        ("coarse", binary_masks(output["pred_masks"], size).cpu().numpy()),
    ]
    if output["sam_pred_masks"] is not None:
        columns.append(("refined", binary_masks(output["sam_pred_masks"], size).cpu().numpy()))
    # the colours of the phrases are those of their masks in every column
    texts = [info["text"].strip() for info in sample["mask_infos"]]
    save_image(labelled_strip(sample["image"], columns, texts), path)


def draw_first(drawable, numbers, folder):
    """Draw as many of the (sample, output) as there are numbers for them, which their files begin with."""
    for (sample, output), k in zip(drawable, numbers):
        draw(sample, output, folder / f"{k:02d}_{Path(sample['file_name']).stem}.png")


def write_results(out, rows, **about):
    """results.json, masks.json and phrases.csv of the rows of all processes; returns the scores. about: what
    else results.json says."""
    # the order of the files must not depend on how many processes shared the records, whose captions may name
    # things of one picture alike
    rows.sort(key=lambda row: (row["file"], row["phrase"], row["inter"], row["rle"]["counts"]))
    # numbers for people and programs, masks for COCO's tools, a row a phrase for spreadsheets
    results = {**about, **summarise(rows)}
    masks = [
        {"file": row["file"], "phrase": row["phrase"], "score": row["score"], "segmentation": row.pop("rle")}
        for row in rows
    ]

    # pictures with a single phrase have no score of another phrase: their cells stay empty
    names = ["file", "phrase", *sorted({name for row in rows for name in row} - {"file", "phrase"})]
    atomic_json(out / "results.json", results)
    atomic_json(out / "masks.json", masks)
    atomic_csv(out / "phrases.csv", [{name: row.get(name, "") for name in names} for row in rows])
    return results


def in_one_line(results) -> str:
    """The numbers that one looks at first."""
    # a score is read beside what a blind guess reaches
    controls = " ".join(f"{name} {value:.3f}" for name, value in results["controls"].items())
    return (
        f"{results['split']} ({results['protocol']}): {results['phrases']} phrases, "
        f"mIoU {results['mIoU']:.3f} (coarse {results['mIoU_coarse']:.3f}), cIoU {results['cIoU']:.3f}, "
        f"precision@0.5 {results['precision@0.5']:.3f}" + (f"; controls: {controls}" if controls else "")
    )


@torch.no_grad()
def main(args):
    # what the configuration says; a base that cannot run is refused at once
    accelerator = Accelerator()
    config = read_config(args.config, args.set, args.base_path)
    family_of(config)
    seed_everything(0)

    # what costs little is checked before the base is loaded
    options, calibration = {"skip_bad": args.skip_bad}, Calibration.beside(args.head)
    dataset = build_dataset(config, args.split, args.data, protocol=args.protocol, **options)
    fitting = build_dataset(config, "train", args.data, **options) if args.controls else None

    # the model; upstream loads with strict=False and scores a head with missing tensors, here one is refused
    base, head, sam_encoder, report = load_trained(
        config, args.head, accelerator.device, random_seed=args.random_base, attention=args.attention
    )

    # prompt, tokens and pixels are the base's own, so the data sets get their builder only now
    builder = SampleBuilder.of(base, sam_encoder)
    dataset = attach(dataset, builder)
    if args.skip_bad:  # a bad record is left out: another in its place would be scored twice
        dataset = SkipBad(dataset, replace=False)

    # the run folder; overlays of an earlier run may have other names and would stay beside the new ones
    out = open_run(args.out, args, accelerator, overwrite=args.overwrite)
    accelerator.print(report)
    if accelerator.is_main_process:
        shutil.rmtree(out / "overlays", ignore_errors=True)

    raw = None
    if args.controls:  # chosen on training records, whatever split is scored
        fitting = attach(fitting, builder)
        raw = choose_raw_map(base, SkipBad(fitting, True) if args.skip_bad else fitting, accelerator)

    # every process scores its share of the records; accelerate would repeat some to even out the shares
    total = min(len(dataset), args.limit or len(dataset))
    mine = range(accelerator.process_index, total, accelerator.num_processes)
    loader = DataLoader(
        Subset(dataset, mine),
        args.batch_size,
        num_workers=args.workers,
        worker_init_fn=loader_worker,
        collate_fn=keep_good,
    )

    # batch by batch; the main process draws its first pictures
    pictures = args.pictures if accelerator.is_main_process else 0
    rows, read = [], 0
    for samples in filter(None, progress(loader, accelerator, desc=args.split)):  # empty: all were bad
        scored, outputs = score_batch(base, head, sam_encoder, samples, args, raw, calibration)
        draw_first(zip(samples, outputs), range(read, pictures), out / "overlays")
        rows, read = rows + scored, read + len(samples)

    # the rows of all processes make one file
    rows, skipped = gather_object(rows), total - sum(gather_object([read]))
    if not accelerator.is_main_process:
        return
    if not rows:
        raise UserError(f"--split {args.split}: no phrase to score")

    # the files, and the numbers that one looks at first
    about = {"split": args.split, "protocol": args.protocol, "skipped": skipped}
    print(in_one_line(write_results(out, rows, **about)))
    print(f"wrote {out}/results.json, phrases.csv, masks.json, overlays/")


if __name__ == "__main__":
    run(main, parse_args())
