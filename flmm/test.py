"""Score trained heads: referring segmentation, panoptic narrative grounding, ReasonSeg. One or several processes.

    python flmm/test.py --config flmm/configs/deepseek_vl/frozen_deepseek_vl_1_3b_chat_unet_sam_l_refcoco_png.yaml \\
        --data /data/coco --head head.safetensors --split refcoco_val --out runs/flmm/test_refcoco_val

--protocol upstream: the first expression of every object, all objects of a picture in one caption (later ones see earlier
ones through causal attention); published F-LMM numbers are of this kind. --protocol sentence: one forward per sentence, as
other papers count. OUT gets results.json, phrases.csv, masks.json (COCO RLE) and overlays/*.png.
Upstream: scripts/multiprocess_eval_{refcoco,png}.py.
"""

import argparse
import csv
import io
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Subset

from common.checkpoint import atomic_write
from common.errors import UserError, run
from common.run import open_run, progress, seed_everything
from common.weights import read_weights
from flmm.build import add_config_arguments, build_base, build_dataset, build_head, build_sam, read_config
from flmm.conversation import answer_then_ground
from flmm.data.samples import SampleBuilder, encode_rle
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
from flmm.models.flmm import extract


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--split", default="test", help="part of the configuration's data to score (default test)"
    )
    parser.add_argument(
        "--head", type=Path, required=True, help="trained head: ours or upstream's, .safetensors or .pth"
    )
    parser.add_argument(
        "--base-path", help="folder or hub name of the base (default: base.path of the configuration)"
    )
    parser.add_argument(
        "--random-base", type=int, metavar="SEED", help="control: random weights instead of the base's"
    )
    parser.add_argument("--attention", choices=["rows", "eager"], help="how attention is read (default rows)")
    parser.add_argument(
        "--protocol",
        choices=["upstream", "sentence"],
        default="upstream",
        help="for RefCOCO (default upstream)",
    )
    parser.add_argument(
        "--answer-first",
        action="store_true",
        help="ReasonSeg: the base answers each query, the answer is grounded; "
        "answers go to phrases.csv (default: the query itself is grounded)",
    )
    parser.add_argument(
        "--controls",
        action="store_true",
        help="also score whole picture, centre box, union of objects, "
        "another phrase, and the best raw map (chosen on the train split)",
    )
    parser.add_argument("--limit", type=int, help="score only the first so many records")
    parser.add_argument("--batch-size", type=int, default=1, help="pictures per forward (default 1)")
    parser.add_argument("--pictures", type=int, default=8, help="overlays to draw (default 8)")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in OUT")
    return parser.parse_args()


def score(samples, features, outputs, controls, raw):
    """Rows of one batch: scores, names and RLE of every phrase."""
    rows = []
    for sample, feature, output in zip(samples, features, outputs):
        gt = sample["gt_masks"]
        new = phrase_rows(output, gt, sample.get("ignore"))
        masks = binary_masks(final_logits(output), gt.shape[1:]).cpu().numpy()
        for row, info, mask in zip(new, sample["mask_infos"], masks):
            row.update(
                file=sample["file_name"],
                phrase=info["text"].strip(),
                plural=info["plural"],
                isthing=info["isthing"],
                rle=encode_rle(mask),
            )
        if controls:
            trivial_controls(gt, new)
            other_phrase(output, gt, new)
            raw.score(feature, gt, new)
        rows += new
    return rows


@torch.no_grad()
def main(args):
    accelerator = Accelerator()
    config = read_config(args.config, args.set)
    if args.base_path:
        config["base"]["path"] = args.base_path
    seed_everything(0)
    base = build_base(config, random_seed=args.random_base, attention=args.attention).to(accelerator.device)
    builder = SampleBuilder.of(base)
    dataset = build_dataset(config, args.split, args.data, builder, per_sentence=args.protocol == "sentence")
    head, sam_encoder = build_head(
        config, (base.channels, base.num_layers, base.hidden_size), build_sam(config)
    )
    report = head.load_upstream(read_weights(args.head), args.head)
    head.to(accelerator.device).eval()
    if sam_encoder is not None:
        sam_encoder.to(accelerator.device)
    out = open_run(args.out, args, accelerator, overwrite=args.overwrite)
    if accelerator.is_main_process:
        shutil.rmtree(out / "overlays", ignore_errors=True)  # pictures of an earlier run have other names
        print(report)

    raw = RawMaps()
    if args.controls:  # every process chooses alike, from the same records
        train = build_dataset(config, "train", args.data, builder)
        for i in progress(range(min(150, len(train))), accelerator, desc="choosing the raw map"):
            sample = train[i]
            raw.fit(
                base([sample])[0] | {"unpad": base.unpad, "meta_data": sample["meta_data"]},
                sample["gt_masks"],
            )
        raw.choose()
    total = min(len(dataset), args.limit or len(dataset))
    mine = list(range(accelerator.process_index, total, accelerator.num_processes))
    rows, drawn = [], 0
    loader = DataLoader(Subset(dataset, mine), args.batch_size, collate_fn=list)
    for samples in progress(loader, accelerator, desc=args.split):
        if args.answer_first:
            if any(len(s["mask_infos"]) > 1 for s in samples):
                raise UserError(
                    f"--answer-first: {args.split} has captions with several phrases; it is for ReasonSeg, one query a record"
                )
            samples, answers = zip(*[answer_then_ground(base, s) for s in samples])
        features = extract(base, sam_encoder, samples)
        outputs = head(features)
        new = score(samples, features, outputs, args.controls, raw)
        if args.answer_first:
            new = [{**row, "answer": answer} for row, answer in zip(new, answers)]
        rows += new
        for sample, output in zip(samples, outputs):
            if accelerator.is_main_process and drawn < args.pictures:
                size = sample["gt_masks"].shape[1:]
                columns = [
                    ("truth", sample["gt_masks"].numpy()),
                    ("coarse", binary_masks(output["pred_masks"], size).cpu().numpy()),
                ]
                if output["sam_pred_masks"] is not None:
                    columns.append(("refined", binary_masks(output["sam_pred_masks"], size).cpu().numpy()))
                strip = labelled_strip(
                    sample["image"], columns, [i["text"].strip() for i in sample["mask_infos"]]
                )
                save_image(strip, out / "overlays" / f"{drawn:02d}_{Path(sample['file_name']).stem}.png")
                drawn += 1
    rows = gather_object(rows)
    if not accelerator.is_main_process:
        return
    if not rows:
        raise UserError(f"--split {args.split}: no phrase to score")
    rows.sort(key=lambda r: (r["file"], r["phrase"]))
    results = {"split": args.split, "protocol": args.protocol, **summarise(rows)}
    masks = [
        {"file": r["file"], "phrase": r["phrase"], "score": r["score"], "segmentation": r.pop("rle")}
        for r in rows
    ]
    atomic_write(out / "results.json", json.dumps(results, indent=1))
    atomic_write(out / "masks.json", json.dumps(masks))
    text = io.StringIO()
    writer = csv.DictWriter(
        text, ["file", "phrase", *sorted({k for r in rows for k in r} - {"file", "phrase"})]
    )
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(out / "phrases.csv", text.getvalue())
    controls = " ".join(f"{k} {v:.3f}" for k, v in results["controls"].items())
    print(
        f"{args.split} ({args.protocol}): {len(rows)} phrases, mIoU {results['mIoU']:.3f} (coarse {results['mIoU_coarse']:.3f}), "
        f"cIoU {results['cIoU']:.3f}, precision@0.5 {results['precision@0.5']:.3f}"
        + (f"; controls: {controls}" if controls else "")
    )
    print(f"wrote {out}/results.json, phrases.csv, masks.json, overlays/")


if __name__ == "__main__":
    run(main, parse_args())
