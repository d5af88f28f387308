"""A pretrained language model pruned in earnest: which criterion, how much, and repaired how.

    python studies/pruning/real_llm.py --model SmolLM2-135M-Instruct --reports ct_reports_train.json \\
        --test-reports ct_reports_val.json --out runs/real/pruning/llm

Perplexity as the field measures it: each test text one stream in windows of --window tokens, of held-out CT
reports and of plain English (the help topics that every Python brings: prose on a language, none of it
medical). Skills that perplexity hides: multiple choice, sums, brackets and copying, each against chance.
Layers are chosen on calibration texts of the training reports or of the built-in lines; repairs see training
reports and other help topics. Everything that was measured stands in evaluations.json as soon as it is known:
a second start goes on.
"""

import json
import math
import shutil
import sys
import time
from pathlib import Path

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from common.arguments import Parser, number
from common.checkpoint import atomic_write
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
from studies.pruning.tables import interval, mean_perplexity, resampled
from studies.pruning.texts import Rows, english, reports, stream
from studies.summary import write_result

CRITERIA = ("perplexity", "block_influence", "sensitivity")
WHOLE = "whole model"


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
        "--repair-ratio", type=float, default=0.25, help="the fraction at which repairs are compared"
    )
    p.add_argument("--draws", type=count, default=3, help="draws of calibration reports")
    p.add_argument("--calibration", type=count, default=12, help="texts of each draw")
    p.add_argument("--calibration-tokens", type=count, default=64, help="tokens of each calibration text")
    p.add_argument("--window", type=count, default=2048, help="tokens of a window of the test streams")
    p.add_argument("--test-tokens", type=count, default=4096, help="tokens of each test stream")
    p.add_argument("--heal-steps", type=count, default=12, help="optimizer steps of every repair that trains")
    p.add_argument("--heal-batch", type=count, default=5, help="texts in a step")
    p.add_argument("--heal-tokens", type=count, default=128, help="tokens of a text that is healed on")
    p.add_argument(
        "--heal-lr", type=float, default=1e-3, help="peak learning rate of LoRA; a tenth for last and full"
    )
    p.add_argument("--repair-texts", type=count, default=32, help="texts of the closed forms")
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
            before = json.loads(file.read_text())
            if before["stamp"] == stamp:
                self.known = before["sets"]

    def get(self, name: str, measure):
        """What was measured under `name`, or `measure()` now."""
        if name not in self.known:
            started = time.process_time()
            self.known[name] = {**measure(), "cpu_seconds": time.process_time() - started}
            atomic_write(self.file, json.dumps({"stamp": self.stamp, "sets": self.known}))
        return self.known[name]


def measured(model, tokenizer, test: dict, args, skills: bool = False) -> dict:
    """Losses of both test streams, a row for every 128 tokens, and perhaps skills."""
    found = {}
    for name, texts in test.items():
        losses = stream_losses(model, tokenizer, texts, args.window, 128)
        found[name] = {"losses": losses.tolist(), "perplexity": perplexity(losses)}
    if skills:
        found["skills"] = score_skills(model, tokenizer, args.skill_items)
    return found


def show(name: str, found: dict, drop: str = ""):
    skills = "".join(f", {k} {v:.2f}" for k, v in found.get("skills", {}).items())
    both = ", ".join(f"{part} {found[part]['perplexity']:.4g}" for part in ("reports", "english"))
    print(f"{name:58} {drop:22} {both}{skills}", flush=True)


def calibration_sets(args, tokenizer, training: list[str], prose: list[str]) -> dict:
    """{name: prompts}: the built-in lines, draws of reports, and plain English."""
    sets = {"built-in": builtin_prompts()}
    rng = np.random.default_rng(0)
    for draw in range(args.draws):
        chosen = rng.choice(len(training), args.calibration, replace=False)
        sets[f"reports {draw + 1}"] = [training[i] for i in chosen]
    sets["english"] = [prose[i] for i in rng.choice(len(prose), args.calibration, replace=False)]
    half = args.calibration // 2 or 1
    sets["mixed"] = sets["reports 1"][:half] + sets["english"][:half]
    return {name: text_prompts(texts, tokenizer, args.calibration_tokens) for name, texts in sets.items()}


def choose_sets(args, model, calibration, journal) -> list[dict]:
    """Choices {criterion, calibration, ratio, drop_layers} of every criterion on every calibration set."""
    layers, choices = len(decoder_layers(model)), []

    # greedy is dear: on one set, and its first steps serve the smaller ratios
    most, known = layers_to_remove(layers, args.repair_ratio), calibration["mixed"]
    searched = journal.get("greedy on mixed", lambda: {"trace": search(model, known, most, 1)[1]})
    for ratio in (r for r in args.ratio if r <= args.repair_ratio):
        drop, _ = searched["trace"][layers_to_remove(layers, ratio)]
        choice = {"criterion": "greedy", "calibration": "mixed", "ratio": ratio}
        choices.append({**choice, "drop_layers": spec_of(drop)})

    for name, prompts in calibration.items():
        rows = journal.get(
            f"scan on {name}", lambda p=prompts: {"rows": summarise(scan(model, p, ["v"], ("kl",)))}
        )
        # what the calibration texts change is asked at one ratio
        for ratio in args.ratio if name == "reports 1" else [args.repair_ratio]:
            count = layers_to_remove(layers, ratio)
            for criterion in CRITERIA:
                drop, _ = choose(criterion, count, layers, rows["rows"])
                choice = {"criterion": criterion, "calibration": name, "ratio": ratio}
                choices.append({**choice, "drop_layers": spec_of(drop)})
    for ratio in args.ratio:
        count = layers_to_remove(layers, ratio)
        for criterion in ("last", "random_keep0"):
            drop, _ = control(criterion, count, layers, 0)
            choice = {"criterion": criterion, "calibration": "none", "ratio": ratio}
            choices.append({**choice, "drop_layers": spec_of(drop)})
    return choices


# ---------------------------------------- repairs


def healing_settings(args, folder, ways, teacher: bool):
    """The arguments of pruning/train.py for one repair that trains."""
    words = "--pruned-model-path x --texts x --accum 1 --warmup 2 --out".split() + [str(folder)]
    words += ["--max-steps", str(args.heal_steps), "--batch-size", str(args.heal_batch), "--keep", "1"]
    lr = args.heal_lr if "lora" in ways else args.heal_lr / 10
    words += ["--lr", str(lr), "--lr-scheduler-type", "cosine", "--log-every", str(args.heal_steps)]
    return train.parse_args(words + (["--distill", "0.5", "--teacher", "x"] if teacher else []))


def repaired(args, drop, ways, texts, teacher_too: bool, test) -> dict:
    """`measured` of the model without `drop`, repaired in `ways`: gap by gap first, then what trains."""
    folder = args.out / "healing"
    teacher, tokenizer = load_model(args.model)
    student, _ = load_model(args.model)
    remove_layers(student, drop)
    closed = [way for way in ways if way in CLOSED]
    if closed:
        some = text_prompts(texts[: args.repair_texts], tokenizer, args.heal_tokens)
        repair(student, teacher, drop, closed, some)
    trains = [way for way in ways if way in train.TRAINED]
    if trains:
        seed_everything(0)
        settings = healing_settings(args, folder, ways, teacher_too)
        if "lora" in ways:
            student, _ = train.new_lora(
                student, r=8, targets="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
            )
        train.set_trained(student, "full" in ways, 3 if "last" in ways else 0)
        shutil.rmtree(folder, ignore_errors=True)
        accelerator = train.make_accelerator(settings)
        rows = Rows(texts[: args.heal_steps * args.heal_batch], tokenizer, args.heal_tokens)
        teacher = teacher.requires_grad_(False) if teacher_too else None
        train.heal(student, rows, train.collate_texts, settings, accelerator, teacher)
        shutil.rmtree(folder, ignore_errors=True)
    return measured(student.eval(), tokenizer, test, args, skills=True)


# What is compared at one ratio: (name, whose set, ways, distilled, whether half of the texts are English).
REPAIRS = (
    ("none", "perplexity", (), False, False),
    ("compensate", "perplexity", ("compensate",), False, False),
    ("linear", "perplexity", ("linear",), False, True),
    ("replacement layer", "perplexity", ("replace",), False, True),
    ("lora", "perplexity", ("lora",), False, False),
    ("head and three last layers", "last", ("last",), False, True),
    ("linear and lora, mixed, distilled", "perplexity", ("linear", "lora"), True, True),
    ("linear and lora, mixed, distilled", "greedy", ("linear", "lora"), True, True),
)


def main(args):
    args.out.mkdir(parents=True, exist_ok=True)
    seed_everything(0)
    model, tokenizer = load_model(args.model)
    training, test_reports = reports(args.reports), reports(args.test_reports)
    prose, test_prose = english()
    test = {
        "reports": stream(test_reports, tokenizer, args.test_tokens),
        "english": stream(test_prose, tokenizer, args.test_tokens),
    }
    # the last training texts choose among the repairs, and nothing else sees them
    judges = {"held-out reports": training[-args.held_out :], "held-out english": prose[-args.held_out :]}
    training, prose = training[: -args.held_out], prose[: -args.held_out]
    settings = {k: v for k, v in vars(args).items() if not k.startswith("_") and k not in ("out", "model")}
    stamp = json.loads(json.dumps({"model": fingerprint(model), **settings}, default=str))
    journal = Journal(args.out / "evaluations.json", stamp)

    # what is chosen by what, on what
    whole = journal.get(WHOLE, lambda: measured(model, tokenizer, test, args, skills=True))
    show(WHOLE, whole)
    calibration = calibration_sets(args, tokenizer, training, prose)
    choices = choose_sets(args, model, calibration, journal)
    atomic_write(
        args.out / "plan.json",
        json.dumps({"layers": len(decoder_layers(model)), "choices": choices}, indent=1),
    )

    def cost(some):
        """What the sets of layers cost that are chosen at some ratios."""
        for choice in some:
            with without_layers(model, parse_drop_layers(choice["drop_layers"])):
                found = journal.get(choice["drop_layers"], lambda: measured(model, tokenizer, test, args))
            what = f"{choice['ratio']:.0%} {choice['criterion']} on {choice['calibration']}"
            show(what, found, choice["drop_layers"])

    # repairs at one ratio; which is best is decided on texts that neither trained nor test it
    here = [choice for choice in choices if choice["ratio"] == args.repair_ratio]
    cost(here)
    wanted = {c["criterion"]: c["drop_layers"] for c in here if c["calibration"] in ("mixed", "none")}
    mixed = [text for pair in zip(training, prose) for text in pair]
    texts, found = test | judges, {}
    for name, criterion, ways, distilled, with_prose in REPAIRS:
        drop, some = parse_drop_layers(wanted[criterion]), mixed if with_prose else training
        label = f"{criterion}, repaired: {name}"
        found[label] = journal.get(
            f"{label} ({wanted[criterion]})",
            lambda d=drop, w=ways, t=some, x=distilled: repaired(args, d, w, t, x, texts),
        )
        show(label, found[label], wanted[criterion])
    cost([choice for choice in choices if choice not in here])
    report(args, whole, found)


def report(args, whole, found):
    """The rows of the closing table: the repair with the lowest loss on held-out texts, half of each kind."""

    def held_out(name):
        return sum(math.log(found[name][f"held-out {part}"]["perplexity"]) for part in ("reports", "english"))

    best = min(found, key=held_out)
    for part in ("reports", "english"):
        low, high = interval(mean_perplexity(resampled(np.array(found[best][part]["losses"]))))
        controls = {"whole model": whole[part]["perplexity"]}
        for name, label in (("cut alone", "none"), ("LoRA", "lora"), ("linear", "linear")):
            controls[name] = found[f"perplexity, repaired: {label}"][part]["perplexity"]
        write_result(
            args.out.parent,
            f"SmolLM2-135M without {args.repair_ratio:.0%} of its layers, {part}",
            "perplexity, lower is better",
            found[best][part]["perplexity"],
            controls,
            (low, high),
            note=f"{best}; {args.heal_steps} steps of {args.heal_batch} texts; interval over test tokens",
            details={"skills": found[best].get("skills")},
        )


if __name__ == "__main__":
    run(main, parse_args())
