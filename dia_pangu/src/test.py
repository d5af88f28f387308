"""Write reports for a split or for one scan. Upstream: src/test.py.

    python dia_pangu/test.py --ckpt-path runs/ft --lang-encoder-path LLM --data CTRG --out results
    python dia_pangu/test.py --ckpt-path runs/ft --lang-encoder-path LLM --volume scan.nii.gz --out report
    python dia_pangu/test.py --ckpt-path runs/ft --lang-encoder-path LLM --volumes scans/ --out reports

In --out: dia-pangu.csv (ID, Question, Ground Truth, Pred, GT_labels; UTF-8), dia-pangu_timing.csv (ID,
InferTimeMs), findings.csv (probability, threshold, status, and the side and place that the evidence map
points to), verdicts.csv (what each scan is: HU or not, units, orientation, chest or not) and
evidence/<id>.png. Where a scan's left and right are unknown, no side is named.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from common.arguments import Parser, number, refuse
from common.errors import UserError, run
from common.llm import add_trust_argument
from common.run import one_process, progress, seed_everything
from dia_pangu.evaluate.evidence import Backdrop, draw_evidence, locate_all
from dia_pangu.evaluate.labeler import positives
from dia_pangu.src.Dataset.CTRG_dataset import SPLITS, CTRGDataset, collate, raise_bad
from dia_pangu.src.Dataset.prompt import FINDINGS, LANGUAGES, without_sides
from dia_pangu.src.Dataset.scan import scan_name
from dia_pangu.src.Dataset.scans import Scans, collate_scans, find_scans
from dia_pangu.src.Dataset.verdict import Verdict, say
from dia_pangu.src.Model.build import load_model, make_grid
from dia_pangu.src.report_files import Journal, weights_stamp

CONTROLS = ("none", "blank", "swap", "swap-visual")


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
    verdicts=(),
    candidates: dict | None = None,
) -> dict:
    """Write reports for volumes (B, 1, 3, H, W, D): one ViT pass, the diagnosis into the prompt, one
    generation for the batch.

    thresholds: 14 probabilities from which on a finding is present. generation: keyword arguments of
    transformers' `generate`. With an evidence head the prompt also names side and place, unless hide_places;
    verdicts: of the volumes (none: left and right are known), see `locate_all`. candidates: arguments of
    `keep_the_nearest`; None takes every report as it comes.
    Returns probability (B, 14), statuses (B, 14), maps (B, 14, h, w, d), places [{finding: (side, place)}],
    questions and reports.
    """
    # What the model gets to see: the volume, all air, or its neighbour's in the batch.
    if control == "blank":
        vision_x = torch.zeros_like(vision_x)
    elif control == "swap":
        vision_x = vision_x.roll(1, 0)

    # Where in it the findings lie. The ViT's tokens (B, 1, n_tok, dim) serve all that follows.
    tokens = model.encode(vision_x)
    maps, places = locate_all(model.embedding_layer, tokens, vision_x, preprocess, verdicts)

    # A published checkpoint was trained without places, so that its prompts must not name any.
    named = places
    if model.embedding_layer.evidence_head is None or hide_places:
        named = [None] * len(places)

    # The model's own diagnosis becomes the sentences of the prompt. Padding stands on the left, because every
    # report goes on from the right end.
    probability = model.diagnose(tokens).float().cpu()
    statuses = (probability >= torch.tensor(thresholds)).long()
    prompts = text.pad(
        [text.sample(row.tolist(), places=where) for row, where in zip(statuses, named)], left=True
    )
    prompts = {key: value.to(tokens.device) for key, value in prompts.items()}

    # The language model sees prompt and image tokens; the control "swap-visual" exchanges the latter alone.
    seen = tokens.roll(1, 0) if control == "swap-visual" else tokens
    ids = model.generate(
        prompts["lang_x"],
        prompts["attention_mask"],
        seen,
        pad_token_id=text.pad_id,
        eos_token_id=text.tokenizer.eos_token_id,
        **generation,
    )
    reports = [text.decode(row) for row in ids]
    if candidates:
        keep_the_nearest(reports, statuses, model, text, prompts, seen, **candidates)
    return {
        "probability": probability,
        "statuses": statuses,
        "maps": maps,
        "places": places,
        "questions": [text.prompt(row.tolist(), where) for row, where in zip(statuses, named)],
        "reports": reports,
    }


def keep_the_nearest(
    reports: list, statuses, model, text, prompts, tokens, number: int, seed: int, **sampling
):
    """Where a report states other findings than the diagnosis, sample `number` more and keep in its place the
    one that differs least; the labeler reads what they state.

    statuses (B, 14), prompts and tokens: what the reports were written from. The draws of a volume depend on
    the seed and on nothing else of the batch.
    """
    # One volume at a time: most reports agree with their diagnosis and cost nothing here.
    for i, wanted in enumerate(statuses[:, :-1].tolist()):  # "no finding" is what none of the others is

        def differs(report: str, wanted=wanted) -> int:
            return sum(said != due for said, due in zip(positives([report])[0], wanted))

        if differs(reports[i]):
            # Anew for every volume, so that its draws do not depend on its neighbours in the batch.
            torch.manual_seed(seed)
            ids = model.generate(
                *(prompts[key][[i] * number] for key in ("lang_x", "attention_mask")),
                tokens[[i] * number],
                pad_token_id=text.pad_id,
                eos_token_id=text.tokenizer.eos_token_id,
                do_sample=True,
                **sampling,
            )
            reports[i] = min([reports[i], *map(text.decode, ids)], key=differs)


def finding_rows(name, probability, statuses, thresholds, places) -> list[dict]:
    """Return the rows of findings.csv for one volume; only what is present has a side and a place."""
    rows = []
    for c, finding in enumerate(FINDINGS):
        side, place = places.get(finding, ("", "")) if statuses[c] else ("", "")
        # Probability and threshold stand beside the status, so that a reader sees how near it was.
        rows.append(
            {
                "ID": name,
                "finding": finding,
                "probability": f"{probability[c]:.4f}",
                "threshold": f"{thresholds[c]:.2f}",
                "status": int(statuses[c]),
                "side": side,
                "place": place,
            }
        )
    return rows


def result_row(batch, made, i: int) -> dict:
    """Return the row of dia-pangu.csv for volume `i` of a batch; GT_labels is a JSON list, or empty."""
    # The columns are upstream's, which its evaluation scripts read; a scan from outside has no labels.
    labels = json.dumps(batch["cls_labels"][i].tolist()) if "cls_labels" in batch else ""
    return {
        "ID": batch["id"][i],
        "Question": made["questions"][i],
        "Ground Truth": batch["report"][i],
        "Pred": made["reports"][i],
        "GT_labels": labels,
    }


def captions(rows: list[dict]) -> list[tuple[str, str]]:
    """Return (finding, caption) of what is present, for the evidence picture."""
    shown = []
    for row in rows[:-1]:  # "no finding" has no place
        if row["status"]:
            # Without the evidence head there is no place, and the caption says the probability alone.
            where = f"{row['side']} {row['place']}".strip()
            caption = f"{row['finding']}: p {float(row['probability']):.2f}"
            shown.append((row["finding"], f"{caption}, {where}" if where else caption))
    return shown


def check_flags(args, processes: int):
    """Refuse flags that contradict each other, and flags that have no effect in the given mode."""
    # One source of volumes, and what belongs to the other two.
    if sum(map(bool, (args.data, args.volume, args.volumes))) != 1:
        raise UserError(
            "give one of --data (a folder in the CTRG format), --volume (one scan) and --volumes (many scans)"
        )
    if args.volume:
        unused = ["split", "cache", "limit", "skip_bad", "batch_size", "workers"]
        refuse(args, unused, "with --volume, which is one scan")
    elif args.volumes:
        refuse(args, ["split", "skip_bad"], "with --volumes, which have no split and are never all dropped")
        refuse(args, ["series"], "with --volumes; give the folder of one scan to --volume")
    else:
        refuse(args, ["series"], "without --volume")

    # Greedy decoding and beam search draw nothing.
    if not args.do_sample and not args.candidates:
        refuse(args, ["temperature", "top_k", "top_p"], "without --do-sample or --candidates")

    # A swapped volume is the neighbour's in the batch.
    if args.control.startswith("swap") and (not args.data or args.batch_size < 2):
        raise UserError(
            f"--control {args.control} takes another patient of the batch; give --data and a --batch-size "
            "of at least 2"
        )
    # What the model then saw is not the scan that its maps would be drawn on.
    if args.control in ("blank", "swap"):
        refuse(args, ["evidence"], f"with --control {args.control}")
        args.evidence = 0
    one_process(processes, "reports are written")


def generation_options(args) -> tuple[dict, dict | None]:
    """Return the keyword arguments of `generate`, greedy by default, so that two runs give one report; and
    those of `keep_the_nearest`, or None."""
    options = {
        "max_new_tokens": args.max_new_tokens,
        "num_beams": args.num_beams,
        "do_sample": args.do_sample,
    }
    # Candidates are always sampled: a second greedy report would be the first again.
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    if args.do_sample:  # upstream sampled
        options |= sampling
    more = {"number": args.candidates, "seed": args.seed, "max_new_tokens": args.max_new_tokens, **sampling}
    return options, more if args.candidates else None


def read_batches(args, grid, language: str, done=()):
    """Return the batches of --split, of the one scan of --volume, or of those in --volumes not yet `done`."""
    # Scans without labels; an interrupted list goes on with what its journal lacks.
    if args.volume or args.volumes:
        scans = find_scans(args.volumes) if args.volumes else [(scan_name(args.volume), Path(args.volume))]
        scans = [(name, path) for name, path in scans[: args.limit or None] if name not in done]
        data = Scans(scans, grid, args.cache, args.series)
        return DataLoader(data, args.batch_size, collate_fn=collate_scans, num_workers=args.workers)

    # The prompt is written after the diagnosis, so that the data set needs no tokenizer.
    data = CTRGDataset(args.data, args.split, grid, language=language, cache=args.cache, limit=args.limit)

    # A missing report or volume shows now, not after hours of reports.
    if args.skip_bad:
        data.drop_bad(args.workers)
    else:
        data.check()
    if args.control.startswith("swap") and len(data) % args.batch_size == 1:
        raise UserError("the last batch holds one volume, none to swap with; choose another --batch-size")
    return DataLoader(data, args.batch_size, collate_fn=collate, num_workers=args.workers)


def no_report(name: str, path: str, error: str) -> dict:
    """Return the record of a scan that could not be read: a row with an empty report, and the reason."""
    # The scan keeps its row in dia-pangu.csv and verdicts.csv, so that nobody takes it for forgotten.
    row = {"ID": name, "Question": "", "Ground Truth": "", "Pred": "", "GT_labels": ""}
    verdict = {"ID": name, "path": path, "error": error, **dict.fromkeys(Verdict("").row(), "")}
    return {"row": row, "ms": None, "findings": [], "verdict": verdict}


def reported(batch, made, i: int, thresholds, ms: float, hide: bool) -> dict:
    """Return the record of volume `i` of a batch. hide: replace words of side where its sides are unknown."""
    # The language model may name a side that the prompt did not.
    name, verdict = batch["id"][i], batch["verdict"][i]
    if hide and verdict.side != "known":
        made["reports"][i] = without_sides(made["reports"][i])

    rows = finding_rows(name, made["probability"][i], made["statuses"][i], thresholds, made["places"][i])
    known = {"ID": name, "path": str(batch["path"][i]), "error": "", **verdict.row()}
    return {"row": result_row(batch, made, i), "ms": ms, "findings": rows, "verdict": known}


def settings_of(args, config: dict) -> dict:
    """Return what the reports of --volumes depend on beside the scans."""
    # A second start with other settings would mix two kinds of reports in one table; the journal refuses it.
    names = ("control", "hide_places", "max_new_tokens", "num_beams", "do_sample", "temperature", "top_k")
    names = (*names, "top_p", "seed", "language", "candidates")
    given = {name: getattr(args, name) for name in names}
    return {"weights": weights_stamp(args.ckpt_path), "grid": config["grid"], **given}


def load_reporter(args, device):
    """Return (model, text, config) of --ckpt-path on a device."""
    # The model, its prompt writer and its thresholds come from the folder that train.py wrote.
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    folders = args.ckpt_path, args.lang_encoder_path, args.tokenizer_path
    model, text, config = load_model(*folders, args.trust_remote_code, args.attn, dtype, args.language)
    if config["lora"]:  # its product is added to the weights once, not in every step of the generation
        model.lang_model = model.lang_model.merge_and_unload()
    return model.to(device), text, config


def keep_failed(batch, journal, alone: bool):
    """Tell which scans of a batch could not be read, and pass them over; a lone one ends the run."""
    for name, path, error in batch.get("failed", ()):
        if alone:
            raise UserError(error)
        journal.records[name] = no_report(name, path, error)  # not written: a second start tries it again
        print(f"no report: {error}", file=sys.stderr)


def main(args):
    # Flags that contradict each other end the run before anything is loaded.
    accelerator = Accelerator()  # finds the device
    check_flags(args, accelerator.num_processes)
    seed_everything(args.seed)
    model, text, config = load_reporter(args, accelerator.device)

    # Volumes are prepared as in training; the thresholds were chosen on the validation volumes.
    grid, thresholds = make_grid(config), config["thresholds"]
    generation, candidates = generation_options(args)

    # One batch after the other: reports, their time, the table of findings, the first evidence pictures.
    journal = Journal(args.out, settings_of(args, config), bool(args.volumes))
    # A run that goes on has drawn its first pictures already.
    drawn = min(args.evidence, sum(record["ms"] is not None for record in journal.records.values()))
    for batch in progress(read_batches(args, grid, config["language"], journal.records), desc="reports"):
        raise_bad(batch)  # one line that names the file, from the worker that read it
        keep_failed(batch, journal, bool(args.volume))
        if not batch["id"]:  # none of the batch could be read
            continue

        # The time of a report holds the ViT, the diagnosis and the generation, not the reading of the file.
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
            batch["verdict"],
            candidates,
        )
        # A batch has one time, which its reports share evenly.
        elapsed_ms = 1000 * (time.perf_counter() - start) / len(batch["id"])

        for i, name in enumerate(batch["id"]):
            # The reports of a data set are scored as they are; that of a lone scan is read by a person.
            record = reported(batch, made, i, thresholds, elapsed_ms, hide=not args.data)
            if not args.data:
                say(batch["path"][i], batch["verdict"][i].notes)
            if drawn < args.evidence:
                draw(args, batch, made["maps"][i], i, grid, record)
                drawn += 1
            journal.add(name, record)

    # Four tables and a summary; for one scan also the report itself.
    journal.write_tables()
    print(f"{journal.summary()}; findings.csv, verdicts.csv and {drawn} evidence pictures beside it")
    if args.volume:
        show_scan(batch["verdict"][0], record["row"]["Pred"], record["findings"])


def draw(args, batch, maps, i: int, grid, record: dict):
    """Draw the evidence maps (14, h, w, d) of volume `i` of a batch to OUT/evidence."""
    # The maps lie over the scan's own voxels; where the preparation left no HU, over what the model saw.
    name = batch["id"][i]
    backdrop = Backdrop(batch["path"][i], batch["vision_x"][i, 0], grid, args.series)
    picture, report = args.out / "evidence" / f"{name}.png", record["row"]["Pred"]
    shown, line = captions(record["findings"]), batch["verdict"][i].line()
    draw_evidence(picture, backdrop, maps, shown, name, report, line)


def show_scan(verdict: Verdict, report: str, findings: list[dict]):
    """Print the verdict and the report of one scan, and its table of findings."""
    # How the scan was understood comes first: a wrong side or unit makes the report worthless.
    print(verdict.line())
    print(report or "(empty report)")
    for row in findings:
        status = "present" if row["status"] else "-"
        line = f"  {row['finding']:28s} p {row['probability']} (threshold {row['threshold']})  {status:8s}"
        print(f"{line} {row['side']} {row['place']}".rstrip())


def add_generation(parser):
    """Add the flags of the generation; their names and values are those of transformers' `generate`."""
    add = parser.add_argument_group("generation").add_argument
    add("--max-new-tokens", type=number(int, 1), default=300, help="longest report, in tokens")
    sample = "sample instead of decoding greedily; upstream samples, with the values below"
    add("--do-sample", action=argparse.BooleanOptionalAction, default=False, help=sample)
    add("--temperature", type=number(float, 0.01), default=0.7, help="temperature of the sampling")
    add("--top-k", type=number(int, 0), default=50, help="sample from this many tokens; 0: from all")
    add(
        "--top-p",
        type=number(float, 0, 1),
        default=0.95,
        help="sample from tokens of this probability together",
    )
    more = (
        "where a report states other findings than the diagnosis, sample this many more with the values "
        "above and keep the one that differs least"
    )
    add("--candidates", type=number(int, 0), default=0, help=more)
    add("--num-beams", type=number(int, 1), default=1, help="beams of the search; 1: greedy")
    add("--seed", type=number(int, 0), default=20, help="random seed of the sampling, upstream's 20")


def parse_args(argv=None):
    parser = Parser(__doc__)

    # What writes: sizes, preparation and thresholds stand in the checkpoint's folder and need no flags.
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--ckpt-path", required=True, help="folder that train.py wrote, or a published pytorch_model.bin")
    add("--lang-encoder-path", required=True, help="folder of the language model")
    add("--tokenizer-path", help="folder of its tokenizer, if that is not --lang-encoder-path")
    add("--language", choices=LANGUAGES, help="language of the prompt, instead of the trained one")
    add("--attn", default="sdpa", choices=("sdpa", "eager"), help="attention code of the language model")
    add_trust_argument(group)

    # What is reported on, one of three; then how it is read.
    add = parser.add_argument_group("data").add_argument
    add("--data", help="folder in the CTRG format")
    one = "one scan in place of --data: a NIfTI, MetaImage or NRRD file, or a folder of DICOM files"
    add("--volume", help=one)
    many = "many scans in place of --data: a folder, or a csv with a column volume; a second start goes on"
    add("--volumes", help=many)
    series = "with --volume: series of a DICOM folder, by its number in the table or the end of its UID"
    add("--series", help=series)

    # How much of it, and how much at a time.
    add("--split", choices=SPLITS, default="test", help="partition of --data")
    add("--cache", help="folder for prepared volumes")
    add("--limit", type=number(int, 0), default=0, help="report on the first volumes only; 0: all")
    add("--skip-bad", action="store_true", help="read all samples first, leave out those that cannot be used")
    add("--batch-size", type=number(int, 1), default=8, help="volumes whose reports are generated together")
    add("--workers", "--dataloader-num-workers", type=number(int, 0), default=0, help="loader processes")

    add_generation(parser)

    # Controls: a model that looks at the volume must write worse reports with another's volume.
    add = parser.add_argument_group("controls and output").add_argument
    control = (
        "blank: an empty volume; swap: another patient's volume; swap-visual: the own findings in the "
        "prompt with another patient's image tokens"
    )
    add("--control", choices=CONTROLS, default="none", help=control)
    hide = "leave side and place out of the prompt, so that the report takes them from the image tokens"
    add("--hide-places", action="store_true", help=hide)

    # Evidence is drawn for the first volumes alone: a thousand scans need no thousand pictures.
    add("--evidence", type=number(int, 0), default=6, help="number of evidence pictures to draw")
    add("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results", help="folder to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main, parse_args())
