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
import pydoc_data.topics
import re
import sys
import time
from pathlib import Path

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from common.arguments import Parser, number
from common.checkpoint import atomic_write
from common.errors import run
from common.files import read_json
from common.run import seed_everything
from pruning import train
from pruning.layers import decoder_layers, parse_drop_layers, remove_layers, spec_of, without_layers
from pruning.repair import repair
from pruning.sensitivity_analyse.choose_layers import choose, control, layers_to_remove
from pruning.sensitivity_analyse.eval_metric import perplexity
from pruning.sensitivity_analyse.layer_sensitivity_scan import fingerprint, scan, summarise, text_prompts
from pruning.sensitivity_analyse.load_model import builtin_prompts, load_model
from pruning.test import stream_losses
from studies.pruning.skills import score_skills
from studies.pruning.tables import interval, mean_perplexity, resampled
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
    p.add_argument("--skill-items", type=count, default=20, help="items of each skill")
    return p.parse_args(argv)


# ---------------------------------------- texts


def reports(path) -> list[str]:
    """The reports of one split."""
    return [case["report"] for case in read_json(path, {"cases": [{"report": str}]})["cases"]]


def english() -> tuple[list[str], list[str]]:
    """(training, test) paragraphs of Python's help topics: disjoint topics, prose alone, deterministic."""
    parts = ([], [])
    for i, name in enumerate(sorted(pydoc_data.topics.topics)):
        paragraphs = re.split(r"\n\s*\n", pydoc_data.topics.topics[name])
        prose = [" ".join(text.split()) for text in paragraphs]
        parts[i % 4 == 0].extend(t for t in prose if len(t) > 200 and t[0].isupper() and ">>>" not in t)
    training, held_out = (list(dict.fromkeys(part)) for part in parts)
    known = set(held_out)  # topics quote each other
    return [text for text in training if text not in known], held_out


def stream(texts, tokenizer, tokens: int) -> list[str]:
    """As many of the first texts as make a stream of at least `tokens` tokens."""
    chosen, length = [], 0
    for text in texts:
        if length >= tokens:
            break
        chosen.append(text)
        length += len(tokenizer(text).input_ids)
    return chosen


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


def calibration_sets(args, tokenizer, training: list[str]) -> dict:
    """{name: prompts}: the built-in lines, draws of reports, and plain English."""
    sets = {"built-in": builtin_prompts()}
    rng = np.random.default_rng(0)
    for draw in range(args.draws):
        chosen = rng.choice(len(training), args.calibration, replace=False)
        sets[f"reports {draw + 1}"] = [training[i] for i in chosen]
    prose = english()[0]
    sets["english"] = [prose[i] for i in rng.choice(len(prose), args.calibration, replace=False)]
    return {name: text_prompts(texts, tokenizer, args.calibration_tokens) for name, texts in sets.items()}


def choose_sets(args, model, calibration, journal) -> list[dict]:
    """Choices {criterion, calibration, ratio, drop_layers} of every criterion on every calibration set."""
    layers, choices = len(decoder_layers(model)), []
    for name, prompts in calibration.items():
        rows = journal.get(
            f"scan on {name}", lambda p=prompts: {"rows": summarise(scan(model, p, ["v"], ("kl",)))}
        )
        for ratio in args.ratio:
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
    words = [
        "--pruned-model-path",
        "x",
        "--texts",
        "x",
        "--out",
        str(folder),
        "--accum",
        "1",
        "--warmup",
        "2",
    ]
    words += ["--max-steps", str(args.heal_steps), "--batch-size", str(args.heal_batch), "--keep", "1"]
    lr = args.heal_lr if "lora" in ways else args.heal_lr / 10
    words += ["--lr", str(lr), "--lr-scheduler-type", "cosine", "--log-every", str(args.heal_steps)]
    return train.parse_args(words + (["--distill", "0.5", "--teacher", "x"] if teacher else []))


class Rows(torch.utils.data.Dataset):
    """Token ids for `train.heal`, as train.Texts gives them."""

    def __init__(self, texts, tokenizer, tokens: int):
        self.rows = [
            {"id": f"text {i + 1}", "ids": torch.tensor(tokenizer(t).input_ids[:tokens])}
            for i, t in enumerate(texts)
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def repaired(args, drop, ways, texts, teacher_too: bool, test, folder) -> dict:
    """`measured` of the model without `drop`, repaired in `ways`: closed forms first, then what trains."""
    import shutil

    teacher, tokenizer = load_model(args.model)
    student, _ = load_model(args.model)
    remove_layers(student, drop)
    closed = [way for way in ways if way in ("linear", "compensate")]
    if closed:
        repair(
            student,
            teacher,
            drop,
            closed,
            text_prompts(texts[: args.repair_texts], tokenizer, args.heal_tokens),
        )
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


# What is compared at one ratio: (name, ways, distilled, share of English among the texts).
REPAIRS = (
    ("none", (), False, False),
    ("compensate", ("compensate",), False, False),
    ("linear", ("linear",), False, True),
    ("lora", ("lora",), False, False),
    ("lora, mixed texts", ("lora",), False, True),
    ("last layers' head and three", ("last",), False, True),
    ("linear and lora, mixed texts", ("linear", "lora"), False, True),
    ("linear and lora, mixed, distilled", ("linear", "lora"), True, True),
)


def main(args):
    args.out.mkdir(parents=True, exist_ok=True)
    seed_everything(0)
    model, tokenizer = load_model(args.model)
    training, held_out = reports(args.reports), reports(args.test_reports)
    prose, test_prose = english()
    test = {
        "reports": stream(held_out, tokenizer, args.test_tokens),
        "english": stream(test_prose, tokenizer, args.test_tokens),
    }
    settings = {k: v for k, v in vars(args).items() if not k.startswith("_") and k not in ("out", "model")}
    stamp = json.loads(json.dumps({"model": fingerprint(model), **settings}, default=str))
    journal = Journal(args.out / "evaluations.json", stamp)

    # what is chosen by what, on what
    whole = journal.get(WHOLE, lambda: measured(model, tokenizer, test, args, skills=True))
    show(WHOLE, whole)
    calibration = calibration_sets(args, tokenizer, training)
    choices = choose_sets(args, model, calibration, journal)
    atomic_write(
        args.out / "plan.json",
        json.dumps({"layers": len(decoder_layers(model)), "choices": choices}, indent=1),
    )

    # what each set of layers costs
    for choice in sorted(choices, key=lambda c: (c["ratio"] != args.repair_ratio, c["ratio"])):
        spec = choice["drop_layers"]

        def without(spec=spec):
            with without_layers(model, parse_drop_layers(spec)):
                return measured(model, tokenizer, test, args)

        found = journal.get(spec, without)
        show(f"{choice['ratio']:.0%} {choice['criterion']} on {choice['calibration']}", found, spec)

    # repairs at one ratio: of the default's set, and of the last layers for the published control
    mixed = [text for pair in zip(training, prose) for text in pair]
    wanted = {
        c["criterion"]: c["drop_layers"]
        for c in choices
        if c["ratio"] == args.repair_ratio and c["calibration"] in ("reports 1", "none")
    }
    found = {}
    for criterion in ("perplexity", "last"):
        for name, ways, distilled, with_prose in REPAIRS if criterion == "perplexity" else REPAIRS[5:6]:
            drop, texts = parse_drop_layers(wanted[criterion]), mixed if with_prose else training
            label = f"{criterion}, repaired: {name}"
            found[label] = journal.get(
                f"{label} ({wanted[criterion]})",
                lambda d=drop, w=ways, t=texts, x=distilled: repaired(
                    args, d, w, t, x, test, args.out / "healing"
                ),
            )
            show(label, found[label], wanted[criterion])
    report(args, whole, found)


def report(args, whole, found):
    """The row of the closing table: the best repair by reports, English no worse than without it."""
    none = found["perplexity, repaired: none"]
    for part in ("reports", "english"):
        best = min(found, key=lambda name: found[name][part]["perplexity"])
        low, high = interval(mean_perplexity(resampled(np.array(found[best][part]["losses"]))))
        lora = found["perplexity, repaired: lora"][part]["perplexity"]
        controls = {
            "whole model": whole[part]["perplexity"],
            "cut alone": none[part]["perplexity"],
            "LoRA": lora,
        }
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
