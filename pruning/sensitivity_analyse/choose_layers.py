"""From scores to a list of layers to remove, for a share of the layers or a parameter budget.

    python pruning/sensitivity_analyse/choose_layers.py --records layer_sensitivity.records.jsonl --ratio 0.25 0.5 --out plan.json

criterion         removes                                                                   needs
sensitivity       the layers whose masked part moves the output least (mode of the scan)    records
block_influence   the layers that turn the hidden state least (ShortGPT)                    records
leave_one_out     the layers whose removal, alone, moves the output least                   records
perplexity        the layers whose removal, alone, raises the loss least                    records
angular           the window of neighbours that turns the hidden state least                records
window            the window of neighbours whose removal raises the loss least              model
greedy            one layer after the other, each time the one that raises the loss least   model
beam              as greedy, with the best few sets carried along                           model
last, first       controls                                                                  -
random            control; random_keep0 never removes layer 0 (a random set that already    -
                  keeps it is the same in both, so that fewer sets need to be evaluated)

Scores of single layers do not add up: greedy, beam and window measure sets instead. Random sets are the
control to beat, above all random_keep0, because much of what every criterion knows is that the first layer
must stay.
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2])
)  # repository root: every way of starting this file finds it
from common.checkpoint import atomic_write
from common.errors import UserError, run
from pruning.layers import decoder_layers, plain, without_layers
from pruning.pruning_tools.prune_llm import spec_of
from pruning.sensitivity_analyse.layer_mask import plain_mode
from pruning.sensitivity_analyse.layer_sensitivity_scan import (
    add_prompt_args,
    layer_scores,
    load_with_prompts,
    scan,
    summarise,
)

FROM_RECORDS = ("sensitivity", "block_influence", "leave_one_out", "perplexity", "angular")
FROM_MODEL = ("window", "greedy", "beam")
CONTROLS = ("last", "first", "random", "random_keep0")


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--records", type=Path, help="records.jsonl of layer_sensitivity_scan.py")
    p.add_argument(
        "--criterion", nargs="+", default=["sensitivity"], choices=(*FROM_RECORDS, *FROM_MODEL, *CONTROLS)
    )
    p.add_argument("--mode", default="v_only", help="mode of the scan behind sensitivity (default v_only)")
    p.add_argument(
        "--distance", default="kl", help="distance behind sensitivity and leave_one_out (default kl)"
    )
    size = p.add_mutually_exclusive_group(required=True)
    size.add_argument("--ratio", type=float, nargs="+", help="shares of the layers to remove, each in (0, 1)")
    size.add_argument(
        "--target-params",
        type=float,
        help="remove just enough layers to stay at or below this many values (needs --model)",
    )
    p.add_argument("--seeds", type=int, default=5, help="how many random sets (default 5)")
    p.add_argument("--beam-width", type=int, default=3, help="sets carried along by beam (default 3)")
    p.add_argument(
        "--out", type=Path, default=Path("plan.json"), help="default plan.json; prune_llm.py --plan reads it"
    )
    p.add_argument("--model", type=Path, help="the model, for window, greedy, beam and --target-params")
    add_prompt_args(p)
    return p.parse_args(argv)


def layers_to_remove(layers: int, ratio: float) -> int:
    """How many of `layers` a share of them is: rounded, at least one, at least one kept."""
    if not 0 < ratio < 1:
        raise UserError(f"--ratio {ratio:g}: give a share between 0 and 1")
    return min(max(1, round(ratio * layers)), layers - 1)


def layers_for_budget(model, target: float) -> int:
    """How many layers must go so that the model has at most `target` parameters."""
    total = sum(p.numel() for p in plain(model).parameters())
    each = sum(p.numel() for p in decoder_layers(model)[-1].parameters())
    count = max(0, math.ceil((total - target) / each))
    if not 0 < count < len(decoder_layers(model)):
        raise UserError(
            f"--target-params {target:,.0f}: the model has {total:,} and a layer {each:,}; choose a number "
            "between "
            f"{total - each * (len(decoder_layers(model)) - 1):,} and {total - each:,}"
        )
    return count


def loss_without(model, prompts, drop_layers=()) -> dict[int, float]:
    """Mean loss per scored token when `drop_layers` are gone (key -1), and when one more layer is gone too
    (its old number)."""
    keep = [i for i in range(len(decoder_layers(model))) if i not in drop_layers]
    with without_layers(model, drop_layers):
        records = scan(model, prompts, modes=(), kinds=())
    tokens = sum(r["scored"] for r in records)
    losses = {-1: sum(r["nll"] * r["scored"] for r in records) / tokens}
    for record in records:
        for variant in record["variants"]:
            old = keep[variant["layer"]]
            losses[old] = losses.get(old, 0) + variant["nll"] * record["scored"] / tokens
    return losses


def search(model, prompts, count: int, width: int) -> tuple[list[int], list]:
    """Greedy (width 1) or beam search for `count` layers with the lowest loss. Returns the set and its trace:
    [(layers so far, loss), ...]. Each step scores every next layer of a set in one wavefront."""
    beam = [((), [((), None)])]
    for _ in range(count):
        reached = {}
        for drop, trace in beam:
            losses = loss_without(model, prompts, drop)
            trace = [*trace[:-1], (drop, losses.pop(-1))]
            for layer, loss in losses.items():
                reached.setdefault(tuple(sorted({*drop, layer})), (loss, trace))
        best = sorted(reached.items(), key=lambda item: item[1][0])[:width]
        beam = [(drop, [*trace, (drop, loss)]) for drop, (loss, trace) in best]
    return list(beam[0][0]), beam[0][1]


def lowest(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=scores.__getitem__)[:count])


def choose(
    criterion: str,
    count: int,
    layers: int,
    rows=(),
    angles=(),
    model=None,
    prompts=(),
    mode="v",
    distance="kl",
    seed=0,
    width=3,
):
    """(layers to remove, sentence saying why). rows: of `summarise`. angles: the (L + 1, L + 1) matrices of
    the records."""
    if criterion in FROM_RECORDS and criterion != "angular":
        wanted = {
            "sensitivity": (plain_mode(mode), distance),
            "block_influence": ("layer", "block_influence"),
            "leave_one_out": ("layer", distance),
            "perplexity": ("layer", "nll_change"),
        }[criterion]
        scores = layer_scores(rows, *wanted)
        drop = lowest(scores, count)
        return drop, f"lowest {wanted[1]} with {wanted[0]} off: " + ", ".join(
            f"{i}: {scores[i]:.4g}" for i in drop
        )
    if criterion == "angular":
        mean = [
            sum(a[start][start + count] for a in angles) / len(angles) for start in range(layers - count + 1)
        ]
        start = mean.index(min(mean))
        return list(
            range(start, start + count)
        ), f"angular distance {mean[start]:.4f}, the smallest of all windows of {count}"
    if criterion == "window":
        loss = {
            start: loss_without(model, prompts, range(start, start + count))[-1]
            for start in range(layers - count + 1)
        }
        start = min(loss, key=loss.get)
        return list(
            range(start, start + count)
        ), f"loss {loss[start]:.4f} on the calibration set, the lowest of all windows of {count}"
    if criterion in ("greedy", "beam"):
        drop, trace = search(model, prompts, count, 1 if criterion == "greedy" else width)
        return drop, "loss on the calibration set " + ", ".join(
            f"{loss:.4f} without {spec_of(d) or 'none'}" for d, loss in trace
        )
    if criterion == "last":
        return list(range(layers - count, layers)), "control"
    if criterion == "first":
        return list(range(count)), "control"
    order = random.Random(seed).sample(range(layers), layers)
    if criterion == "random_keep0":
        order.remove(0)
    if count > len(order):
        raise UserError(f"{criterion}: cannot remove {count} of {layers} layers")
    return sorted(order[:count]), f"control, seed {seed}"


def read_records(path) -> list[dict]:
    try:
        return [json.loads(line) for line in Path(path).read_text().splitlines()[1:]]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a whole records file of layer_sensitivity_scan.py ({error}); finish the scan with "
            f"--resume"
        ) from error


def main(args):
    wanted = set(args.criterion)
    if wanted & {*FROM_RECORDS} and not args.records:
        raise UserError(f"--criterion {' '.join(wanted & {*FROM_RECORDS})} needs --records of a scan")
    if (wanted & {*FROM_MODEL} or args.target_params) and not args.model:
        raise UserError("--model is needed for window, greedy, beam and --target-params")
    records = read_records(args.records) if args.records else []
    rows, angles = summarise(records), [r["angles"] for r in records]
    model, _, prompts = load_with_prompts(args) if args.model else (None, None, [])
    layers = len(decoder_layers(model)) if model else len(records[0]["block_influence"]) if records else 0
    if not layers:
        raise UserError("give --records or --model, so that the number of layers is known")
    if records and len(records[0]["block_influence"]) != layers:
        raise UserError(
            f"{args.records}: scanned {len(records[0]['block_influence'])} layers, {args.model} has {layers}"
        )
    if args.target_params:
        counts = [layers_for_budget(model, args.target_params)]
    else:
        counts = [layers_to_remove(layers, ratio) for ratio in args.ratio]
    choices = []
    for criterion in args.criterion:
        for count in counts:
            for seed in range(args.seeds if criterion.startswith("random") else 1):
                drop, why = choose(
                    criterion,
                    count,
                    layers,
                    rows,
                    angles,
                    model,
                    prompts,
                    args.mode,
                    args.distance,
                    seed,
                    args.beam_width,
                )
                choices.append(
                    {
                        "criterion": criterion,
                        "drop_layers": spec_of(drop),
                        "layers_left": layers - count,
                        "why": why,
                    }
                )
                print(
                    f"{criterion:16} {layers} -> {layers - count} layers: --drop-layers {spec_of(drop)}   "
                    f"({why})"
                )
    atomic_write(args.out, json.dumps({"layers": layers, "choices": choices}, indent=1))
    print(f"wrote {args.out}; prune with prune_llm.py --plan {args.out}")


if __name__ == "__main__":
    run(main, parse_args())
