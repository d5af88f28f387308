"""From scores to a list of layers to remove, for a fraction of the layers or a parameter budget.

    python pruning/sensitivity_analyse/choose_layers.py --records layer_sensitivity.records.jsonl \\
        --ratio 0.25 0.5 --out plan.json

criterion         removes                                                                   needs
perplexity        the layers whose removal, alone, raises the loss least: the default       records
leave_one_out     the layers whose removal, alone, moves the output least                   records
block_influence   the layers that turn the hidden state least (ShortGPT)                    records
sensitivity       the layers whose masked part moves the output least (--mode of the scan)  records
angular           the window of neighbours that turns the hidden state least                records
window            the window of neighbours whose removal raises the loss least              model
greedy            one layer after the other, each time the one that raises the loss least   model
beam              as greedy, with the best few sets carried along                           model
last, first       controls                                                                  nothing
random            control; random_keep0 never removes layer 0                               nothing

On a trained language model of 30 layers the first three agree and keep it readable at 25 %, while
sensitivity, upstream's measure, takes a last layer and destroys it: there it warns. Scores of single layers
do not add up: greedy, beam and window measure sets instead. Random sets are the control to beat, above all
random_keep0, because much of what every criterion knows is that the first layer must stay. A random set that
keeps layer 0 by chance is the same in both, so that it is evaluated only once.
"""

import json
import random
import shlex
import sys
from functools import cache
from pathlib import Path

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.arguments import Parser, number, refuse
from common.checkpoint import atomic_json
from common.errors import UserError, run
from pruning.layers import decoder_layers, plain, spec_of, text_config, without_layers
from pruning.sensitivity_analyse.layer_mask import plain_mode
from pruning.sensitivity_analyse.layer_sensitivity_scan import (
    add_prompt_arguments,
    layer_scores,
    load_with_prompts,
    summarise,
)
from pruning.sensitivity_analyse.scan_methods import Variant, scan_batch
from pruning.shorter import check_sources

FROM_RECORDS = ("sensitivity", "block_influence", "leave_one_out", "perplexity", "angular")
FROM_MODEL = ("window", "greedy", "beam")
CONTROLS = ("last", "first", "random", "random_keep0")


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument("--records", type=Path, help="the .records.jsonl file of layer_sensitivity_scan.py")
    p.add_argument("--model", type=Path, help="the model, for window, greedy, beam and every --target")
    p.add_argument(
        "--out", type=Path, default=Path("plan.json"), help="JSON file that prune_llm.py --plan reads"
    )
    add_choice_arguments(p.add_argument_group("choice"))
    add_prompt_arguments(p.add_argument_group("prompts of the measured loss"))
    return p.parse_args(argv)


def add_choice_arguments(group):
    group.add_argument(
        "--criterion",
        nargs="+",
        default=["perplexity"],
        choices=(*FROM_RECORDS, *FROM_MODEL, *CONTROLS),
        help="one or several of the table above",
    )
    group.add_argument("--mode", default="v_only", help="mode of the scan behind sensitivity")
    group.add_argument(
        "--distance",
        help="distance behind sensitivity and leave_one_out; left out: the first of the scan, that of its "
        "CSV",
    )
    size = group.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--ratio", type=float, nargs="+", help="fractions of the layers to remove, each in (0, 1)"
    )
    size.add_argument(
        "--target-params", type=float, help="remove just enough layers to have at most so many parameters"
    )
    size.add_argument(
        "--target-bytes", type=float, help="remove just enough layers for weights of at most so many bytes"
    )
    size.add_argument(
        "--target-seconds",
        type=float,
        help="remove just enough layers to write 32 tokens after 64 in this time, measured",
    )
    group.add_argument("--seeds", type=number(int, 1), default=5, help="random sets of each kind")
    group.add_argument("--beam-width", type=number(int, 1), default=3, help="sets that beam carries along")


def layers_to_remove(layers: int, ratio: float) -> int:
    """How many of `layers` a fraction of them is: rounded, at least one removed, at least one kept."""
    if not 0 < ratio < 1:
        raise UserError(f"--ratio {ratio:g}: give a fraction between 0 and 1")
    if layers < 2:
        raise UserError("the model has one layer, which has to stay")
    return min(max(1, round(ratio * layers)), layers - 1)


def layers_for_budget(model, target: float, in_bytes: bool = False, pick=range) -> int:
    """How many layers must go so that the model has at most `target` parameters, or bytes of weights.

    pick: which layers go if so many do: in a hybrid or a mixture they are not of one size.
    """

    def size(module):
        return sum(p.numel() * (p.element_size() if in_bytes else 1) for p in module.parameters())

    total, sizes = size(plain(model)), [size(layer) for layer in decoder_layers(model)]
    largest = sorted(sizes, reverse=True)
    for count in range(1, len(sizes)) if target < total else ():
        if total - sum(largest[:count]) <= target and total - sum(sizes[i] for i in pick(count)) <= target:
            return count
    option = "--target-bytes" if in_bytes else "--target-params"
    raise UserError(
        f"{option} {target:,.0f}: the model has {total:,} and its largest layer {largest[0]:,}; choose a "
        f"number between {total - sum(largest[:-1]):,} and {total - 1:,}"
    )


def layers_for_time(model, target: float, measure=None) -> int:
    """How many layers must go so that generating takes at most `target` seconds, by bisection.

    measure: seconds of the model as it is; left out: those of pruning/test.py.
    """
    if measure is None:
        from pruning.test import latency  # its own script imports this one's neighbours

        def measure(model):
            return latency(model)["seconds"]

    layers = len(decoder_layers(model))

    def seconds(count):
        with without_layers(model, range(layers - count, layers)):
            return measure(model)

    low, high = 0, layers - 1
    slowest, fastest = seconds(low), seconds(high)
    if not fastest <= target < slowest:
        raise UserError(
            f"--target-seconds {target:g}: the whole model takes {slowest:.3g} s and one layer {fastest:.3g} "
            "s; choose a time between"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if seconds(middle) <= target else (middle, high)
    return high


def mean_losses(model, prompts, variants) -> list[float]:
    """Mean loss per scored token of the model and with each of `variants` off, all in one wavefront; one by
    one for a model that takes none."""
    try:
        records = [scan_batch(model, [prompt], variants, ())[0] for prompt in prompts]
    except UserError as error:
        if any(variant.mode == "window" for variant in variants):
            raise UserError(f"--criterion window: {error}: choose by greedy or beam") from error
        records = [scan_batch(model, [prompt], variants, (), "naive")[0] for prompt in prompts]
    tokens = sum(record["scored"] for record in records)
    rows = [[r["nll"], *(variant["nll"] for variant in r["variants"])] for r in records]
    return [
        sum(row[i] * r["scored"] for row, r in zip(rows, records)) / tokens for i in range(len(variants) + 1)
    ]


def loss_without(model, prompts, drop_layers=()) -> dict[int, float]:
    """Mean loss per scored token without `drop_layers`.

    Key -1 holds it with no further layer gone, every other key with that one gone too (its old number).
    """
    keep = [i for i in range(len(decoder_layers(model))) if i not in drop_layers]
    with without_layers(model, drop_layers):
        losses = mean_losses(model, prompts, [Variant("layer", i) for i in range(len(keep))])
    return dict(zip([-1, *keep], losses))


def best_window(model, prompts, count: int) -> tuple[list[int], float]:
    """The `count` neighbours without which the loss is lowest, and that loss.

    Behind a window's last layer the batch grows by what entered its first: no layer runs for any of them
    that the whole model does not run anyway, and each that follows runs once.
    """
    layers = len(decoder_layers(model))
    variants = [Variant("window", last, count) for last in range(count - 1, layers)]
    losses = mean_losses(model, prompts, variants)[1:]
    start = min(range(len(losses)), key=losses.__getitem__)
    return list(range(start, start + count)), losses[start]


def search(model, prompts, count: int, width: int) -> tuple[list[int], list]:
    """Greedy (width 1) or beam search for the `count` layers without which the loss is lowest.

    Returns the set and its trace [(layers so far, loss), ...]; each step of a set is one wavefront.
    """
    beam = [((), [((), None)])]
    for _ in range(count):
        reached = {}
        for drop, trace in beam:
            losses = loss_without(model, prompts, drop)
            trace = [*trace[:-1], (drop, losses.pop(-1))]
            for layer, loss in losses.items():
                reached.setdefault(tuple(sorted({*drop, layer})), (loss, trace))
        reached = {drop: found for drop, found in reached.items() if can_go(model, drop)}
        if not reached:
            raise UserError(f"no {count} layers can go together: some work with what others computed")
        best = sorted(reached, key=lambda drop: reached[drop][0])[:width]
        beam = [(drop, [*reached[drop][1], (drop, reached[drop][0])]) for drop in best]
    (drop, trace), *_ = beam
    return list(drop), trace


def can_go(model, drop_layers) -> bool:
    """Whether no other layer works with what these computed."""
    keep = [i for i in range(len(decoder_layers(model))) if i not in drop_layers]
    try:
        check_sources(text_config(model), keep)
    except UserError:
        return False
    return True


def lowest(scores: list[float], count: int) -> list[int]:
    """The layers of the `count` lowest scores, ascending."""
    return sorted(sorted(range(len(scores)), key=scores.__getitem__)[:count])


def by_scores(criterion: str, count: int, rows, mode: str, distance: str) -> tuple[list[int], str]:
    """The layers with the lowest scores of a scan; rows: of `summarise`."""
    mode, distance = {
        "sensitivity": (plain_mode(mode), distance),
        "block_influence": ("layer", "block_influence"),
        "leave_one_out": ("layer", distance),
        "perplexity": ("layer", "nll_change"),
    }[criterion]
    scores = layer_scores(rows, mode, distance)
    drop = lowest(scores, count)
    return drop, f"lowest {distance} with {mode} off: " + ", ".join(f"{i}: {scores[i]:.4g}" for i in drop)


def by_angle(count: int, layers: int, angles) -> tuple[list[int], str]:
    """The window between whose ends the hidden state turns least; angles: (L + 1, L + 1) of each prompt."""
    starts = range(layers - count + 1)
    turn = [sum(angle[start][start + count] for angle in angles) / len(angles) for start in starts]
    best = min(starts, key=turn.__getitem__)
    why = f"angular distance {turn[best]:.4f}, the smallest of all windows of {count}"
    return list(range(best, best + count)), why


def by_loss(criterion: str, count: int, model, prompts, width: int) -> tuple[list[int], str]:
    """The set without which the loss on the calibration prompts is lowest, of all sets that are looked at."""
    if criterion == "window":
        drop, loss = best_window(model, prompts, count)
        return drop, f"loss {loss:.4f} on the calibration set, the lowest of all windows of {count}"
    drop, trace = search(model, prompts, count, 1 if criterion == "greedy" else width)
    steps = ", ".join(f"{loss:.4f} without {spec_of(some) or 'none'}" for some, loss in trace)
    return drop, f"loss on the calibration set {steps}"


def control(criterion: str, count: int, layers: int, seed: int) -> tuple[list[int], str]:
    """Layers that nothing was measured for."""
    if criterion == "last":
        return list(range(layers - count, layers)), "control"
    if criterion == "first":
        return list(range(count)), "control"
    order = random.Random(seed).sample(range(layers), layers)
    if criterion == "random_keep0":
        order.remove(0)
    if count > len(order):
        raise UserError(f"{criterion}: cannot remove {count} of {layers} layers; lower --ratio")
    return sorted(order[:count]), f"control, seed {seed}"


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
    """Return (`count` of `layers` layers to remove, a sentence that says why).

    rows: of `summarise`. angles: (L + 1, L + 1) of each record. model, prompts: for the criteria that measure
    the loss. mode, distance: of the scan. seed: of the random controls. width: of the beam.
    """
    if criterion == "angular":
        return by_angle(count, layers, angles)
    if criterion in FROM_RECORDS:
        return by_scores(criterion, count, rows, mode, distance)
    if criterion in FROM_MODEL:
        return by_loss(criterion, count, model, prompts, width)
    return control(criterion, count, layers, seed)


def read_records(path) -> tuple[list[dict], str]:
    """(records of a whole scan, its first distance, which its CSV shows); UserError for any other file."""
    try:
        header, *records = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
        missing = header.get("prompts", 1) - len(records)
        if missing > 0 or not all({"nll", "angles", "variants"} <= record.keys() for record in records):
            raise ValueError(f"{missing} of {header.get('prompts', 1)} prompts are not scanned")
        return records, header["distances"][0]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a whole records file of layer_sensitivity_scan.py ({error}); finish the scan with "
            "--resume"
        ) from error


def warn_of_ends(criterion: str, drop, layers: int):
    """Say on stderr that a set of upstream's measure holds a layer that hardly any model can miss."""
    ends = sorted(set(drop) & {0, 1, layers - 2, layers - 1})
    if criterion == "sensitivity" and ends:
        print(
            f"warning: sensitivity chose layer {', '.join(map(str, ends))}, at an end of the model, where "
            "masked values say little about removal; compare with --criterion perplexity or greedy",
            file=sys.stderr,
        )


def check(args):
    """Refuse what is missing and what would have no effect."""
    wanted = set(args.criterion)
    if scanned := sorted(wanted & {*FROM_RECORDS}):
        if not args.records:
            raise UserError(f"--criterion {' '.join(scanned)} needs --records of a scan")
    if (wanted & {*FROM_MODEL} or not args.ratio) and not args.model:
        raise UserError("--model is needed for window, greedy, beam and every --target")
    if not (args.records or args.model):
        raise UserError("give --records or --model, so that the number of layers is known")
    if not args.model:
        own = ["prompts", "task_data", "lang_model_path", "task_samples", "max_tokens", "dtype"]
        refuse(args, [*own, "trust_remote_code"], "without --model")
    if "sensitivity" not in wanted:
        refuse(args, ["mode"], "without --criterion sensitivity")
    if not wanted & {"sensitivity", "leave_one_out"}:
        refuse(args, ["distance"], "without --criterion sensitivity or leave_one_out")
    if not wanted & {"random", "random_keep0"}:
        refuse(args, ["seeds"], "without --criterion random or random_keep0")
    if "beam" not in wanted:
        refuse(args, ["beam_width"], "without --criterion beam")


def main(args):
    check(args)

    # what a scan measured, and the model where a criterion measures more
    records, distance = read_records(args.records) if args.records else ([], "kl")
    rows, angles = summarise(records), [record["angles"] for record in records]
    model, prompts = load_with_prompts(args) if args.model else (None, [])
    scanned = len(records[0]["block_influence"]) if records else 0
    layers = len(decoder_layers(model)) if model else scanned
    if scanned not in (0, layers):
        raise UserError(f"{args.records}: scanned {scanned} layers, {args.model} has {layers}")

    # how many layers go; None: as many as the chosen ones have to be for a budget
    counts = [layers_to_remove(layers, ratio) for ratio in args.ratio or ()] or [None]
    if args.target_seconds is not None:
        counts = [layers_for_time(model, args.target_seconds)]
    in_bytes = args.target_bytes is not None
    budget = model, args.target_bytes if in_bytes else args.target_params, in_bytes

    # which ones, by every criterion
    choices = []
    for criterion, wanted in ((criterion, count) for criterion in args.criterion for count in counts):
        for seed in range(args.seeds if criterion.startswith("random") else 1):
            measured = (rows, angles, model, prompts, args.mode, args.distance or distance)

            @cache  # a budget looks at the sets that it counts, and a search takes minutes
            def pick(count, criterion=criterion, seed=seed, measured=measured):
                return choose(criterion, count, layers, *measured, seed, args.beam_width)

            count = wanted or layers_for_budget(*budget, lambda count, pick=pick: pick(count)[0])
            drop, why = pick(count)
            choice = {"criterion": criterion, "drop_layers": spec_of(drop), "layers_left": layers - count}
            choices.append({**choice, "why": why})
            warn_of_ends(criterion, drop, layers)
            print(
                f"{criterion:16} {layers} -> {layers - count} layers: --drop-layers {spec_of(drop)}   ({why})"
            )
    atomic_json(args.out, {"layers": layers, "choices": choices})
    print(f"wrote {args.out}; prune with prune_llm.py --plan {shlex.quote(str(args.out))}")


if __name__ == "__main__":
    run(main, parse_args())
