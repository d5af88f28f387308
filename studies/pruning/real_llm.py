"""A pretrained language model pruned in earnest: which criterion, how much, and repaired how.

    python studies/pruning/real_llm.py --model SmolLM2-135M-Instruct --reports ct_reports_train.json \\
        --test-reports ct_reports_val.json --out runs/real/pruning/llm

Perplexity as the field measures it: each test text one stream in windows of --window tokens, of held-out CT
reports and of plain English (the help topics that every Python brings: prose on a language, none of it
medical). Skills that perplexity hides: multiple choice, sums, brackets and copying, each against chance.
Layers are chosen on calibration texts, which are drawn several times, half reports and half English; repairs
see training reports and other help topics. What is best is decided on training texts that nothing else sees.
Everything that was measured stands in evaluations.json as soon as it is known: a second start goes on.
"""

import json
import math
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import numpy as np

from common.arguments import Parser, number
from common.checkpoint import atomic_json, atomic_write
from common.errors import run
from common.run import seed_everything
from pruning import train
from pruning.layers import decoder_layers, parse_drop_layers, remove_layers, spec_of, without_layers
from pruning.repair import REPAIRS as CLOSED
from pruning.repair import repair
from pruning.sensitivity_analyse.choose_layers import choose, control, layers_to_remove, search
from pruning.sensitivity_analyse.eval_metric import perplexity
from pruning.sensitivity_analyse.layer_sensitivity_scan import fingerprint, scan, summarise, text_prompts
from pruning.sensitivity_analyse.load_model import builtin_prompts, load_model
from pruning.test import stream_losses
from studies.pruning.skills import score_skills
from studies.pruning.tables import interval, quality
from studies.pruning.texts import english, pieces, reports, stream
from studies.summary import write_result

CRITERIA = ("perplexity", "block_influence", "sensitivity")
CONTROLS = ("last", "random_keep0")
FINALISTS = ("block_influence", "greedy")
WHOLE = "whole model"
PARTS = ("reports", "english")


def parse_args(argv=None):
    p, count = Parser(__doc__), number(int, 1)
    p.add_argument("--model", type=Path, required=True, help="folder of the language model")
    p.add_argument("--reports", type=Path, required=True, help="training reports, ct_reports_train.json")
    p.add_argument("--test-reports", type=Path, required=True, help="held-out reports, ct_reports_val.json")
    p.add_argument("--out", type=Path, required=True, help="folder of the results")
    p.add_argument(
        "--ratio", type=float, nargs="+", default=[0.1, 0.25, 0.33, 0.5], help="fractions of the layers"
    )
    p.add_argument(
        "--repair-ratio", type=float, default=0.25, help="the one of them at which repairs are compared"
    )
    p.add_argument("--draws", type=count, default=3, help="draws of calibration texts")
    p.add_argument(
        "--calibration",
        type=count,
        nargs="+",
        default=[8, 32],
        help="texts of each draw; every further number makes one more draw, of so many",
    )
    p.add_argument("--calibration-tokens", type=count, default=32, help="tokens of each calibration text")
    p.add_argument("--window", type=count, default=2048, help="tokens of a window of the test streams")
    p.add_argument("--test-tokens", type=count, default=2048, help="tokens of each test stream")
    p.add_argument("--heal-steps", type=count, default=12, help="optimizer steps of every repair that trains")
    p.add_argument("--heal-tokens", type=count, default=640, help="tokens that a step sees, in one piece")
    p.add_argument(
        "--heal-lr", type=float, default=1e-3, help="peak learning rate of LoRA; a tenth for last and full"
    )
    p.add_argument(
        "--repair-pieces", type=number(int, 2), default=8, help="pieces of text for what repairs gap by gap"
    )
    p.add_argument("--repair-tokens", type=count, default=512, help="tokens of each of these pieces")
    p.add_argument(
        "--held-out", type=count, default=6, help="last training texts of each kind, for the choice"
    )
    p.add_argument("--skill-items", type=count, default=20, help="items of each skill")
    return p.parse_args(argv)


# ---------------------------------------- one measurement after the other


class Journal:
    """{name: measured}, written after every new entry; `stamp` says of what."""

    def __init__(self, file: Path, stamp: dict):
        self.file, self.stamp, self.known = file, stamp, {}
        if file.is_file():
            before = json.loads(file.read_text(encoding="utf-8"))
            if before["stamp"] == stamp:
                self.known = before["sets"]

    def get(self, name: str, measure):
        """What was measured under `name`, or `measure()` now."""
        if name not in self.known:
            started = time.process_time()
            self.known[name] = {**measure(), "cpu_seconds": time.process_time() - started}
            atomic_write(self.file, json.dumps({"stamp": self.stamp, "sets": self.known}))
        return self.known[name]


def measured(model, tokenizer, streams: dict, args, skills: bool = False) -> dict:
    """Losses of all streams, a row for every 128 tokens, and perhaps skills."""
    found = {}
    for name, texts in streams.items():
        losses = stream_losses(model, tokenizer, texts, args.window, 128)
        found[name] = {"losses": losses.tolist(), "perplexity": perplexity(losses)}
    if skills:
        found["skills"] = score_skills(model, tokenizer, args.skill_items)
    return found


def show(name: str, found: dict, drop: str = ""):
    skills = "".join(f", {k} {v:.2f}" for k, v in found.get("skills", {}).items())
    both = ", ".join(f"{part} {found[part]['perplexity']:.4g}" for part in PARTS)
    print(f"{name:58} {drop:22} {both}{skills}", flush=True)


def over_draws(found: list[dict], part: str) -> tuple[float, float, float]:
    """(mean perplexity, and its 95 % interval) over the draws of the calibration and the test's tokens."""
    value, draws = quality([one[part] for one in found], "perplexity")
    return (value, *interval(draws))


def show_draws(label: str, found: list[dict]):
    both = ((part, *over_draws(found, part)) for part in PARTS)
    shown = ", ".join(f"{part} {value:.4g} [{low:.4g}, {high:.4g}]" for part, value, low, high in both)
    print(f"{label}, {len(found)} draws: {shown}", flush=True)


def held_out(found: list[dict]) -> float:
    """Mean loss on the held-out texts, half of each kind: what every choice goes by."""
    return np.mean([math.log(one[f"held-out {part}"]["perplexity"]) for one in found for part in PARTS])


# ---------------------------------------- which layers


def draws_of(args) -> list[str]:
    """The names of the draws that every interval covers."""
    return [f"mixed {i + 1}" for i in range(args.draws)]


def calibration_sets(args, tokenizer, training: list[str], prose: list[str]) -> dict:
    """{name: prompts}: draws that are half reports and half English, one kind of text alone, larger draws."""
    rng, (count, *more) = np.random.default_rng(0), args.calibration

    def some(texts, count):
        return [texts[i] for i in rng.choice(len(texts), count, replace=False)]

    def mixed(count):
        return some(training, count // 2 or 1) + some(prose, count // 2 or 1)

    sets = {name: mixed(count) for name in draws_of(args)}
    sets["reports"] = some(training, count)
    sets["english"] = some(prose, count)
    sets["built-in"] = builtin_prompts()
    sets |= {f"{count} texts": mixed(count) for count in more}
    return {name: text_prompts(texts, tokenizer, args.calibration_tokens) for name, texts in sets.items()}


class Chooser:
    """What a criterion drops: scans and searches are run when they are first asked for."""

    def __init__(self, model, calibration: dict, journal: Journal):
        self.model, self.calibration, self.journal = model, calibration, journal
        self.layers = len(decoder_layers(model))
        self.choices = []  # {criterion, calibration, ratio, drop_layers}

    def __call__(self, criterion: str, name: str, ratio: float) -> str:
        """The layers that one criterion drops on one calibration set."""
        count = layers_to_remove(self.layers, ratio)
        if criterion in CONTROLS:
            drop, _ = control(criterion, count, self.layers, 0)
        elif criterion == "greedy":
            drop = self.searched(name, count)[count][0]
        else:
            drop, _ = choose(criterion, count, self.layers, self.scanned(name, criterion))
        choice = {"criterion": criterion, "calibration": name, "ratio": ratio, "drop_layers": spec_of(drop)}
        if choice not in self.choices:
            self.choices.append(choice)
        return choice["drop_layers"]

    def scanned(self, name: str, criterion: str) -> list[dict]:
        """Rows of `summarise`; v is masked for sensitivity alone."""
        modes = ["v"] if criterion == "sensitivity" else []

        def measure():
            return {"rows": summarise(scan(self.model, self.calibration[name], modes, ("kl",)))}

        return self.journal.get(f"scan{' with v masked' * len(modes)} on {name}", measure)["rows"]

    def searched(self, name: str, count: int) -> list:
        """The steps of a greedy search, at least `count` of them: the first serve smaller sets."""

        def measure():
            return {"trace": search(self.model, self.calibration[name], count, 1)[1]}

        label = f"greedy on {name}"
        if len(self.journal.known.get(label, {"trace": ()})["trace"]) <= count:
            self.journal.known.pop(label, None)
        return self.journal.get(label, measure)["trace"]


# ---------------------------------------- repairs

# What is compared at one ratio: {name: (ways, whether half of the texts are English)}.
BEST = ("linear", "lora")
REPAIRS = {
    "none": ((), True),
    "linear": (("linear",), True),
    "LoRA": (("lora",), True),
    "LoRA on reports alone": (("lora",), False),
    "replacement layer": (("replace",), True),
    "compensate": (("compensate",), True),
    "linear and LoRA": (BEST, True),
    "last three and head": (("last",), True),
    "all layers": (("full",), True),
}


def healing_settings(args, folder, ways, teacher: bool):
    """The arguments of pruning/train.py for one repair that trains."""
    words = "--pruned-model-path x --texts x --accum 1 --batch-size 1 --warmup 2 --keep 1".split()
    words += ["--out", str(folder), "--max-steps", str(args.heal_steps), "--log-every", str(args.heal_steps)]
    lr = args.heal_lr if "lora" in ways else args.heal_lr / 10
    words += ["--lr", str(lr), "--lr-scheduler-type", "cosine"]
    return train.parse_args(words + (["--distill", "0.5", "--teacher", "x"] if teacher else []))


def repaired(args, drop, ways, kinds, distilled: bool, streams) -> dict:
    """`measured` of the model without `drop`, repaired in `ways`: gap by gap first, then what trains.

    kinds: lists of texts, of which both see a piece in turn.
    """
    folder = args.out / "healing"
    teacher, tokenizer = load_model(args.model)
    student, _ = load_model(args.model)
    remove_layers(student, drop)
    closed = [way for way in ways if way in CLOSED]
    if closed:
        some = pieces(kinds, tokenizer, args.repair_tokens, args.repair_pieces)
        repair(student, teacher, drop, closed, [{"input_ids": ids[None]} for ids in some])
    if set(ways) & {*train.TRAINED}:
        seed_everything(0)
        settings = healing_settings(args, folder, ways, distilled)
        if "lora" in ways:
            student, _ = train.new_lora(
                student, r=8, targets="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
            )
        train.set_trained(student, "full" in ways, 3 if "last" in ways else 0)
        shutil.rmtree(folder, ignore_errors=True)
        accelerator = train.make_accelerator(settings)
        some = pieces(kinds, tokenizer, args.heal_tokens, args.heal_steps)
        rows = [{"id": f"piece {i}", "ids": ids} for i, ids in enumerate(some, 1)]
        teacher = teacher.requires_grad_(False) if distilled else None
        train.heal(student, rows, train.collate_texts, settings, accelerator, teacher)
        shutil.rmtree(folder, ignore_errors=True)
    return measured(student.eval(), tokenizer, streams, args, skills=True)


def main(args):
    # the model, and the texts of each purpose
    args.out.mkdir(parents=True, exist_ok=True)
    seed_everything(0)
    model, tokenizer = load_model(args.model)
    training, test_reports = reports(args.reports), reports(args.test_reports)
    prose, test_prose = english()
    test = {
        "reports": stream(test_reports, tokenizer, args.test_tokens),
        "english": stream(test_prose, tokenizer, args.test_tokens),
    }
    judges = {"held-out reports": training[-args.held_out :], "held-out english": prose[-args.held_out :]}
    training, prose = training[: -args.held_out], prose[: -args.held_out]
    settings = {k: v for k, v in vars(args).items() if not k.startswith("_") and k not in ("out", "model")}
    stamp = json.loads(json.dumps({"model": fingerprint(model), **settings}, default=str))
    journal = Journal(args.out / "evaluations.json", stamp)
    chosen = Chooser(model, calibration_sets(args, tokenizer, training, prose), journal)

    def heal(label, drop, ways, with_prose=True, distilled=False):
        kinds = [training, prose] if with_prose else [training]
        found = journal.get(
            f"{label} ({drop})",
            lambda: repaired(args, parse_drop_layers(drop), ways, kinds, distilled, test | judges),
        )
        show(label, found, drop)
        return found

    def best_of(criterion, ratio):
        """The strongest repair of what a criterion drops, for each draw of calibration texts."""
        label = f"{criterion}, repaired: linear, LoRA, distilled"
        sets = [chosen(criterion, name, ratio) for name in draws_of(args)]
        return [heal(label, drop, BEST, distilled=True) for drop in sets]

    # at one ratio: the criterion whose sets are best once repaired, then the same at the others
    at = args.repair_ratio
    whole = journal.get(WHOLE, lambda: measured(model, tokenizer, test, args, skills=True))
    show(WHOLE, whole)
    finalists = {criterion: best_of(criterion, at) for criterion in FINALISTS}
    best = min(finalists, key=lambda criterion: held_out(finalists[criterion]))
    found = {ratio: finalists[best] if ratio == at else best_of(best, ratio) for ratio in args.ratio}

    # the repairs one by one, and the published control: the last layers gone, head and last three tuned
    drop = chosen(best, "mixed 1", at)
    single = {name: heal(f"{best}, repaired: {name}", drop, *how) for name, how in REPAIRS.items()}
    last = "last layers gone, head and last three tuned"
    single[last] = heal(last, chosen("last", "none", at), ("last",))
    report(args, whole, best, found, single)
    show_unrepaired(args, model, chosen, lambda: measured(model, tokenizer, test, args))


def show_unrepaired(args, model, chosen, measure):
    """What sets cost that are not repaired: by ratio on the draws, by calibration at one ratio, controls."""
    draws, costs = draws_of(args), {}
    for name in chosen.calibration:
        for ratio in args.ratio if name in draws else [args.repair_ratio]:
            # the greedy search has gone as far as the repairs needed it
            greedy = ("greedy",) if name in draws and ratio <= args.repair_ratio else ()
            for criterion in (*CRITERIA, *greedy):
                chosen(criterion, name, ratio)
    for criterion in CONTROLS:
        for ratio in args.ratio:
            chosen(criterion, "none", ratio)
    atomic_json(args.out / "plan.json", {"layers": chosen.layers, "choices": chosen.choices})

    for choice in chosen.choices:
        drop, name = choice["drop_layers"], choice["calibration"]
        what = f"{choice['ratio']:.0%} {choice['criterion']}"
        with without_layers(model, parse_drop_layers(drop)):
            cost = chosen.journal.get(drop, measure)
        show(f"{what} on {name}", cost, drop)
        if name in draws:
            costs.setdefault(what, []).append(cost)
    for what, found in costs.items():
        show_draws(what, found)


def report(args, whole, best, found, single):
    """Print the best at each ratio, and write the rows of the closing table."""
    for ratio, some in found.items():
        show_draws(f"best at {ratio:.0%}: {best}, linear, LoRA and distilled", some)
    for part in PARTS:
        value, low, high = over_draws(found[args.repair_ratio], part)
        controls = {"whole model": whole[part]["perplexity"]}
        controls |= {name: one[part]["perplexity"] for name, one in single.items()}
        write_result(
            args.out.parent,
            f"{args.model.name} without {args.repair_ratio:.0%} of its layers, {part}",
            "perplexity, lower is better",
            value,
            controls,
            (low, high),
            note=f"{best}, linear, LoRA and distilled; {args.heal_steps} steps of {args.heal_tokens} tokens; "
            f"mean and interval over {args.draws} draws of calibration texts and over test tokens",
            details={"skills": found[args.repair_ratio][0]["skills"]},
        )


if __name__ == "__main__":
    run(main, parse_args())
