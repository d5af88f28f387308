"""Write reports for a split or for one scan. Upstream: src/test.py.

    python dia_pangu/test.py --ckpt-path runs/dia_pangu/ft --lang-encoder-path LLM --data data/dia_pangu --out results
    python dia_pangu/test.py --ckpt-path runs/dia_pangu/ft --lang-encoder-path LLM --volume scan.nii.gz --out report

In --out: dia-pangu.csv (ID, Question, Ground Truth, Pred, GT_labels; UTF-8), dia-pangu_timing.csv (ID, InferTimeMs),
findings.csv (probability, threshold, status, and side and place that the evidence map points to) and evidence/<id>.png.
"""

import argparse
import csv
import io
import json
import sys
import time
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # repository root: every way of starting this file finds it

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from common.checkpoint import atomic_write
from common.errors import UserError, run
from common.run import progress, seed_everything
from dia_pangu.evaluate.evidence import draw_evidence, locate_all
from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset, collate
from dia_pangu.src.Dataset.preprocess import load_volume
from dia_pangu.src.Dataset.prompt import FINDINGS
from dia_pangu.src.Model.build import load_model, make_grid
from dia_pangu.src.My_Trainer.trainer import with_dashes

CONTROLS = ("none", "blank", "swap", "swap-visual")


def apply_control(vision_x, control: str):
    """A blank volume (all air), or the volume of the next patient in the batch."""
    if control == "blank":
        return torch.zeros_like(vision_x)
    return vision_x.roll(1, 0) if control == "swap" else vision_x


@torch.no_grad()
def report_batch(
    model,
    text,
    vision_x,
    thresholds,
    generation,
    preprocess: str = "windows",
    control: str = "none",
    hide_places: bool = False,
) -> dict:
    """Reports for volumes (B, 1, 3, H, W, D): the ViT runs once, the diagnosis goes into the prompt, the batch is generated.

    With an evidence head the prompt also names side and place, unless hide_places. Returns probability (B, 14), statuses (B, 14), maps
    (B, 14, h, w, d), places [{finding: (side, place)}], questions and reports.
    """
    vision_x = apply_control(vision_x, control)
    tokens = model.encode(vision_x)
    maps, places = locate_all(model.embedding_layer, tokens, vision_x, preprocess)
    named = (
        places
        if model.embedding_layer.evidence_head is not None and not hide_places
        else [None] * len(places)
    )
    probability = model.diagnose(tokens).float().cpu()
    statuses = (probability >= torch.tensor(thresholds)).long()
    prompts = text.pad(
        [text.sample(row.tolist(), places=where) for row, where in zip(statuses, named)], left=True
    )
    prompts = {key: value.to(tokens.device) for key, value in prompts.items()}
    seen = tokens.roll(1, 0) if control == "swap-visual" else tokens
    ids = model.generate(
        prompts["lang_x"],
        prompts["attention_mask"],
        seen,
        pad_token_id=text.pad_id,
        eos_token_id=text.tokenizer.eos_token_id,
        **generation,
    )
    return {
        "probability": probability,
        "statuses": statuses,
        "maps": maps,
        "places": places,
        "questions": [text.prompt(row.tolist(), where) for row, where in zip(statuses, named)],
        "reports": [text.decode(row) for row in ids],
    }


def finding_rows(name, probability, statuses, thresholds, places):
    """Rows of findings.csv for one volume; side and place only for what is present and lies on one side."""
    rows = []
    for c, finding in enumerate(FINDINGS):
        side, place = places.get(finding, ("", "")) if statuses[c] else ("", "")
        rows.append(
            [name, finding, f"{probability[c]:.4f}", f"{thresholds[c]:.2f}", int(statuses[c]), side, place]
        )
    return rows


def write_csv(path, header, rows):
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([header, *rows])
    atomic_write(path, table.getvalue())


def main(args):
    accelerator = Accelerator()
    seed_everything(args.seed)
    if bool(args.data) == bool(args.volume):
        raise UserError("give either --data (a folder in the CTRG format) or --volume (one scan)")
    if args.control.startswith("swap") and args.batch_size < 2:
        raise UserError(
            f"--control {args.control} needs --batch-size of at least 2: it takes the next patient of the batch"
        )
    if accelerator.num_processes > 1:
        raise UserError(
            "reports are written by one process; start test.py without torchrun, or one per --split"
        )
    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    model, text, config = load_model(
        args.ckpt_path,
        args.lang_encoder_path,
        args.tokenizer_path,
        args.trust_remote_code,
        args.attn,
        dtype,
        args.language,
    )
    model = model.to(accelerator.device)
    grid, thresholds, out = make_grid(config), config["thresholds"], Path(args.out)
    generation = {
        "max_new_tokens": args.max_new_tokens,
        "do_sample": args.do_sample,
        "num_beams": args.num_beams,
    }
    if args.do_sample:
        generation |= {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}

    if args.volume:
        batches = [
            {
                "id": [Path(args.volume).name.split(".")[0]],
                "report": [""],
                "cls_labels": None,
                "vision_x": load_volume(args.volume, grid)[None, None],
            }
        ]
    else:
        data = CTRGDataset(
            args.data, args.split, grid, language=config["language"], cache=args.cache, limit=args.limit
        )
        data.drop_bad(args.dataloader_num_workers) if args.skip_bad else data.check()
        batches = DataLoader(
            data, args.batch_size, collate_fn=collate, num_workers=args.dataloader_num_workers
        )
    results, timing, findings, drawn = [], [], [], 0
    for batch in progress(batches, desc="reports"):
        if "error" in batch:
            raise UserError(batch["error"])
        if args.control.startswith("swap") and len(batch["id"]) < 2:
            raise UserError(
                "the last batch holds one volume and has nobody to swap with; choose another --batch-size"
            )
        start = time.perf_counter()
        made = report_batch(
            model,
            text,
            batch["vision_x"].to(accelerator.device),
            thresholds,
            generation,
            grid.preprocess,
            args.control,
            args.hide_places,
        )
        elapsed_ms = 1000 * (time.perf_counter() - start) / len(batch["id"])
        for i, name in enumerate(batch["id"]):
            labels = batch["cls_labels"][i].tolist() if batch["cls_labels"] is not None else ""
            results.append(
                [
                    name,
                    made["questions"][i],
                    batch["report"][i],
                    made["reports"][i],
                    json.dumps(labels) if labels else "",
                ]
            )
            timing.append([name, f"{elapsed_ms:.2f}"])
            rows = finding_rows(
                name, made["probability"][i], made["statuses"][i], thresholds, made["places"][i]
            )
            findings += rows
            if drawn < args.evidence:
                drawn += 1
                shown = [
                    (
                        row[1],
                        ", ".join(
                            filter(None, (f"{row[1]}: p {float(row[2]):.2f}", f"{row[5]} {row[6]}".strip()))
                        ),
                    )
                    for row in rows[:-1]
                    if row[4]
                ]
                draw_evidence(
                    out / "evidence" / f"{name}.png",
                    batch["vision_x"][i, 0],
                    made["maps"][i],
                    shown,
                    name,
                    made["reports"][i],
                )

    write_csv(out / "dia-pangu.csv", ["ID", "Question", "Ground Truth", "Pred", "GT_labels"], results)
    write_csv(out / "dia-pangu_timing.csv", ["ID", "InferTimeMs"], timing)
    write_csv(
        out / "findings.csv",
        ["ID", "finding", "probability", "threshold", "status", "side", "place"],
        findings,
    )
    empty = sum(not row[3] for row in results)
    per_report = sum(float(row[1]) for row in timing) / len(timing)
    print(
        f"{out / 'dia-pangu.csv'}: {len(results)} reports, {empty} empty, {per_report:.0f} ms each; findings.csv and "
        f"{drawn} evidence pictures beside it"
    )
    if args.volume:
        print(results[0][3] or "(empty report)")
        for row in findings:
            print(
                f"  {row[1]:28s} p {row[2]} (threshold {row[3]})  {'present' if row[4] else '-':8s} {row[5]} {row[6]}".rstrip()
            )


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--ckpt-path", required=True, help="folder that train.py wrote, or a published pytorch_model.bin"
    )
    parser.add_argument("--lang-encoder-path", required=True, help="folder of the language model")
    parser.add_argument("--tokenizer-path", help="folder of its tokenizer (default: --lang-encoder-path)")
    parser.add_argument("--data", help="folder in the CTRG format")
    parser.add_argument("--volume", help="one scan instead: .nii, .nii.gz or a DICOM folder")
    parser.add_argument(
        "--split", choices=("train", "val", "test"), default="test", help="(default %(default)s)"
    )
    parser.add_argument(
        "--out",
        default=str(Path(__file__).resolve().parents[1] / "results"),
        help="folder to write (default: dia_pangu/results)",
    )
    parser.add_argument("--cache", help="folder for prepared volumes")
    parser.add_argument("--limit", type=int, default=0, help="only the first samples; 0: all")
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="read every sample first and leave out those that cannot be used",
    )
    parser.add_argument("--language", choices=("en", "cn"), help="of the prompt (default: as trained)")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="reports generated together (default %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=300, help="(default %(default)s)")
    parser.add_argument(
        "--do-sample",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="sample instead of greedy (upstream sampled: --do-sample --temperature 0.7 --top-k 50 --top-p 0.95)",
    )
    parser.add_argument("--temperature", type=float, default=0.7, help="(default %(default)s)")
    parser.add_argument("--top-k", type=int, default=50, help="(default %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="(default %(default)s)")
    parser.add_argument("--num-beams", type=int, default=1, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=20, help="of sampling (default %(default)s, upstream's)")
    parser.add_argument(
        "--evidence", type=int, default=6, help="how many evidence pictures to draw (default %(default)s)"
    )
    parser.add_argument(
        "--control",
        choices=CONTROLS,
        default="none",
        help="blank: an empty volume; swap: the next patient's volume; "
        "swap-visual: own findings in the prompt, the next patient's image tokens (default %(default)s)",
    )
    parser.add_argument(
        "--hide-places",
        action="store_true",
        help="leave side and place out of the prompt: what the report then says of "
        "them comes from the image tokens",
    )
    parser.add_argument("--attn", default="sdpa", choices=("sdpa", "eager"))
    parser.add_argument("--dataloader-num-workers", type=int, default=0)
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let the model folder run its own Python code"
    )
    return parser.parse_args(with_dashes(sys.argv[1:]))


if __name__ == "__main__":
    run(main, parse_args())
