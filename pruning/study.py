"""The whole study in one command: scan, choose, prune at several ratios, heal, test, and draw what was lost.

    python pruning/study.py --model runs/dia_pangu/ft --lang-model-path LLM --data data/dia_pangu --out runs/pruning/study
    python pruning/study.py --model path/to/hf_folder --texts train.jsonl --test-texts test.jsonl --out runs/pruning/texts

Layers are chosen on training samples, healing sees training samples, every set is scored once on the test split. Criteria often
choose the same set; each set is healed and scored only once (evaluations.json, which also lets an interrupted study go on).
In --out: layer_sensitivity.csv/.all.csv/.png, plan.json, pruned/ (checkpoints of the sensitivity sets, checked against the model
with these layers skipped), evaluations.json, table.csv, comparisons.csv, claims.txt, tradeoff.png, healing.png.
"""

import argparse
import csv
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it
from common.checkpoint import atomic_write
from common.errors import UserError, run
from common.figures import COLOURS, new_figure, save_figure
from common.files import read_json, reading
from common.run import progress, seed_everything
from studies.summary import write_result
from dia_pangu.evaluate.findings import EPSILON
from dia_pangu.evaluate.labeler import positives
from dia_pangu.src.Dataset.CTRG_dataset import collate
from pruning import train
from pruning.layers import decoder_layers, without_layers
from pruning.pruning_tools import prune_llm
from pruning.pruning_tools.prune_llm import VERSIONS, parse_drop_layers, plain_tag, result_names, spec_of
from pruning.report_model import (
    Encoded,
    collate_encoded,
    load_report_model,
    perplexity,
    report_losses,
    task_prompts,
    write_reports,
)
from pruning.sensitivity_analyse.choose_layers import choose, layers_to_remove, search
from pruning.sensitivity_analyse.layer_sensitivity_scan import (
    fingerprint,
    layer_scores,
    scan,
    summarise,
    text_prompts,
    write_csv,
    write_tables,
)
from pruning.sensitivity_analyse.load_model import load_model, read_prompts
from pruning.test import latency, text_losses

CRITERIA = ("sensitivity", "block_influence", "leave_one_out", "greedy")
CONTROLS = ("last", "random", "random_keep0")
LABELS = {"f1": "finding micro-F1", "perplexity": "perplexity"}
DRAWS = 1000
WHOLE = ""  # the set of no layers


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--model",
        type=Path,
        required=True,
        help="dia_pangu checkpoint folder, or a plain language-model folder with --texts",
    )
    p.add_argument(
        "--lang-model-path", type=Path, help="folder with the language model's config and tokenizer"
    )
    p.add_argument("--data", type=Path, help="CTRG folder")
    p.add_argument("--cache", help="folder for prepared volumes")
    p.add_argument(
        "--texts", type=Path, help="training texts of a plain language model, one a line or .jsonl"
    )
    p.add_argument("--test-texts", type=Path, help="its test texts")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument(
        "--ratio",
        type=float,
        nargs="+",
        default=[0.25, 0.33, 0.5],
        help="shares of the layers to remove (default .25 .33 .5)",
    )
    p.add_argument(
        "--calibration",
        type=int,
        default=16,
        help="training samples for the scan and the greedy search (default 16)",
    )
    p.add_argument(
        "--train-samples", type=int, default=320, help="training samples for healing (default 320)"
    )
    p.add_argument("--test-samples", type=int, default=80, help="test samples (default 80)")
    p.add_argument(
        "--random-sets", type=int, default=5, help="random sets of each kind and ratio (default 5)"
    )
    p.add_argument("--heal-steps", type=int, default=40, help="optimizer steps (default 40)")
    p.add_argument("--heal-batch", type=int, default=16, help="samples a step (default 16)")
    p.add_argument(
        "--heal-lr", type=float, default=3e-3, help="peak rate of LoRA r 4, alpha 16 (default 3e-3)"
    )
    p.add_argument("--max-new-tokens", type=int, default=120, help="length of a report (default 120 tokens)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--also",
        type=Path,
        metavar="STUDY",
        help="--out of a study of another base with as many layers: the sets it chose "
        "are scored here too, and the layer scores of both are correlated",
    )
    p.add_argument(
        "--overwrite", action="store_true", help="forget the evaluations of an earlier study in --out"
    )
    return p.parse_args(argv)


# ------------------------------------------------------------------------------------------------ the two kinds of models


class ReportTask:
    """A dia_pangu model: prompts with volumes, report losses, and the findings that its reports state."""

    def __init__(self, args, device):
        self.model, self.text, self.config = load_report_model(args.model, args.lang_model_path)
        self.model = self.model.to(device)
        if not self.config["lora"]:
            self.model.lang_model, _ = train.new_lora(self.model.lang_model)
        self.trained, self.lang_model, self.collate = self.model, self.model.lang_model, collate_encoded
        options = {"cache": args.cache, "seed": args.seed}
        self.train_set = Encoded(
            self.model, self.text, self.config, args.data, "train", args.train_samples, flip=0.02, **options
        )
        self.test_set = Encoded(
            self.model, self.text, self.config, args.data, "test", args.test_samples, **options
        )
        self.prompts = [
            p for p, _ in zip(task_prompts(self.model, self.text, self.train_set), range(args.calibration))
        ]
        self.labels = np.array(
            [self.test_set[i]["cls_labels"].tolist() for i in range(len(self.test_set))], bool
        )
        self.max_new_tokens = args.max_new_tokens

    def losses(self):
        return report_losses(self.model, self.text, self.test_set)

    def said(self):
        reports = write_reports(self.model, self.text, self.test_set, self.max_new_tokens, batch=40)[
            "reports"
        ]
        return np.array(positives(reports), bool)


class TextTask:
    """A plain language model: texts and their losses; no reports are written."""

    def __init__(self, args, device):
        model, self.tokenizer = load_model(args.model)
        self.model = self.trained = self.lang_model = train.new_lora(model.to(device))[0].eval()
        self.collate = collate
        self.train_set = train.Texts(args.texts, self.tokenizer, 256, args.train_samples)
        self.test_texts = read_prompts(args.test_texts)[: args.test_samples]
        self.prompts = text_prompts(read_prompts(args.texts)[: args.calibration], self.tokenizer, 256)
        self.labels = None

    def losses(self):
        return text_losses(self.model, self.tokenizer, self.test_texts, 256)

    def said(self):
        return None


# ------------------------------------------------------------------------------------------------ numbers


def counts(labels, said) -> np.ndarray:
    """(N, 2) true positives and errors of each report; sums over reports give micro-F1, also under resampling."""
    return np.stack([(labels & said).sum(1), (labels ^ said).sum(1)], 1).astype(float)


def f1(rows) -> np.ndarray:
    """Micro-F1 of summed counts (..., 2)."""
    return rows[..., 0] / (rows[..., 0] + 0.5 * rows[..., 1] + EPSILON)


def resampled(rows, seed=0) -> np.ndarray:
    """(DRAWS, 2) sums over bootstrap samples of reports; equal seeds draw the same reports, which makes differences paired."""
    index = np.random.default_rng(seed).integers(0, len(rows), (DRAWS, len(rows)))
    return np.asarray(rows)[index].sum(1)


def quality(evaluations: list[dict], metric: str) -> tuple[float, np.ndarray]:
    """(value, DRAWS bootstrap values) of "f1" or "perplexity", averaged over the sets of one criterion.

    Reports are resampled, and for the random controls the sets too: another draw of sets would have another mean.
    """

    def mean_perplexity(sums):
        return np.exp(np.minimum(sums[..., 0] / sums[..., 1], 50))

    rows = [e["counts" if metric == "f1" else "losses"] for e in evaluations]
    score = f1 if metric == "f1" else mean_perplexity
    draws = np.stack([score(resampled(r)) for r in rows])  # (sets, DRAWS)
    sets = np.random.default_rng(1).integers(0, len(rows), draws.shape)
    return np.mean([score(np.sum(r, 0)) for r in rows]), np.take_along_axis(draws, sets, 0).mean(0)


# ------------------------------------------------------------------------------------------------ evaluation, cached by layer set


def measure(task) -> dict:
    """Losses and finding counts of every test sample, with the model as it is now."""
    losses, said = task.losses(), task.said()
    found = counts(task.labels, said).tolist() if said is not None else None
    return {"losses": losses.tolist(), "counts": found, "perplexity": perplexity(losses)}


def evaluate_set(task, drop, args, accelerator) -> dict:
    """{"before": measure, "after": measure} of the model without `drop`; the model is as it was afterwards."""
    lora = {name: p.detach().clone() for name, p in task.trained.named_parameters() if "lora_" in name}
    with without_layers(task.lang_model, drop), tempfile.TemporaryDirectory(dir=args.out) as folder:
        before = measure(task)
        settings = train.parse_args(
            [
                "--pruned_model_path",
                str(args.model),
                "--out",
                folder,
                "--max-steps",
                str(args.heal_steps),
                "--per-device-train-batch-size",
                str(args.heal_batch),
                "--gradient-accumulation-steps",
                "1",
                "--learning-rate",
                str(args.heal_lr),
                "--lr-scheduler-type",
                "cosine",
                "--warmup-steps",
                str(min(5, args.heal_steps)),
                "--seed",
                str(args.seed),
                "--logging-steps",
                str(args.heal_steps),
                "--save-total-limit",
                "1",
            ]
        )
        train.set_trained(task.trained, full=False)
        train.heal(task.trained, task.train_set, task.collate, settings, accelerator)
        after = measure(task)
    accelerator.free_memory()
    with torch.no_grad():
        for name, parameter in task.trained.named_parameters():
            if name in lora:
                parameter.copy_(lora[name])
    return {"before": before, "after": after}


def choose_all(task, args, rows) -> list[dict]:
    """[{criterion, ratio, seed, drop_layers, layers_left, why}]. Greedy searches once: its first k steps serve every ratio."""
    layers, choices = len(decoder_layers(task.lang_model)), []
    _, greedy = search(task.lang_model, task.prompts, max(layers_to_remove(layers, r) for r in args.ratio), 1)
    for ratio in args.ratio:
        count = layers_to_remove(layers, ratio)
        for criterion in (*CRITERIA, *CONTROLS):
            for seed in range(args.random_sets if criterion.startswith("random") else 1):
                if criterion == "greedy":
                    drop, why = greedy[count][0], f"loss {greedy[count][1]:.4f} on the calibration set"
                else:
                    drop, why = choose(criterion, count, layers, rows, seed=seed)
                choices.append(
                    {
                        "criterion": criterion,
                        "ratio": ratio,
                        "seed": seed,
                        "drop_layers": spec_of(drop),
                        "layers_left": layers - count,
                        "why": why,
                    }
                )
    return choices


def rank_correlation(a, b) -> float:
    """Spearman's, of scores without ties."""
    return np.corrcoef([np.argsort(np.argsort(scores)) for scores in (a, b)])[0, 1]


def chosen_elsewhere(args, rows, layers: int) -> list[dict]:
    """The criteria's choices in the study --also, as criteria of their own; prints how the layer scores of both studies agree."""
    plan = read_json(
        args.also / "plan.json",
        {"layers": int, "choices": [{"criterion": str, "ratio": float, "drop_layers": str}]},
    )
    if plan["layers"] != layers:
        raise UserError(
            f"{args.also / 'plan.json'}: is of a model with {plan['layers']} layers, this one has {layers}"
        )
    with (
        reading(args.also / "layer_sensitivity.all.csv", "table of a study"),
        open(args.also / "layer_sensitivity.all.csv") as file,
    ):
        others = [
            {**row, "layer": int(row["layer"]), "score_mean": float(row["score_mean"])}
            for row in csv.DictReader(file)
        ]
    for mode, distance in (
        ("v", "kl"),
        ("mlp", "kl"),
        ("layer", "block_influence"),
        ("layer", "kl"),
        ("layer", "nll_change"),
    ):
        here, there = (layer_scores(r, mode, distance) for r in (rows, others))
        places = [1 + sum(score > scores[0] for score in scores) for scores in (here, there)]
        print(
            f"{distance} with {mode} off: rank correlation with {args.also} {rank_correlation(here, there):.2f}, without layer 0 "
            f"{rank_correlation(here[1:], there[1:]):.2f}; layer 0 is number {places[0]} here and {places[1]} there"
        )
    return [
        {**c, "criterion": f"{c['criterion']}_elsewhere"}
        for c in plan["choices"]
        if c["criterion"] in CRITERIA and c["ratio"] in args.ratio
    ]


def check_on_disk(task, args, choices, evaluations) -> float:
    """Prune the sensitivity sets on disk, load them, and return the largest difference of a report's loss to the model in memory."""
    wanted = list(dict.fromkeys(c["drop_layers"] for c in choices if c["criterion"] == "sensitivity"))
    command = ["--ckpt", str(args.model), "--out-dir", str(args.out / "pruned"), "--overwrite"]
    command += (
        ["--lang-model-path", str(args.lang_model_path), "--hf", "merged"] if args.lang_model_path else []
    )
    tags = {spec: plain_tag(parse_drop_layers(spec)) for spec in wanted}
    for spec in wanted:
        command += ["--drop-layers", spec, "--tag", tags[spec]]
    prune_llm.main(prune_llm.parse_args(command))
    worst = 0.0
    for spec in wanted:
        _, merged, prune_map, hf, _ = (
            args.out / "pruned" / name for name in result_names(tags[spec], VERSIONS[0])
        )
        if args.texts:
            model, tokenizer = load_model(hf)
            losses = text_losses(model, tokenizer, task.test_texts, 256)
        else:  # whole names, because drop1 begins as drop1_3 does
            merged = next(
                path
                for path in (
                    merged,
                    merged.with_name(merged.name + ".bin"),
                    merged.with_name(merged.name + ".safetensors"),
                )
                if path.exists()
            )
            model, text, _ = load_report_model(
                merged, args.lang_model_path, prune_map.with_name(prune_map.name + ".json")
            )
            losses = report_losses(model, text, task.test_set)
        worst = max(
            worst,
            (losses - torch.tensor(evaluations[spec]["before"]["losses"], dtype=torch.float64))
            .abs()
            .max()
            .item(),
        )
    return worst


# ------------------------------------------------------------------------------------------------ tables and pictures


def tabulate(choices, evaluations, costs, metrics) -> list[dict]:
    """One row a criterion and ratio: quality before and after healing, with 95 % intervals, and cost. The first row is the
    unpruned model, which is healed too: what more training alone does."""
    rows = []
    groups = {}
    for choice in choices:
        groups.setdefault((choice["ratio"], choice["criterion"]), []).append(choice)
    for (ratio, criterion), group in [((0.0, "unpruned"), None), *groups.items()]:
        left = group[0]["layers_left"] if group else max(costs)
        row = {
            "ratio": ratio,
            "criterion": criterion,
            "sets": " ".join(c["drop_layers"] for c in group) if group else "",
            "layers": left,
            **costs[left],
        }
        for stage in ("before", "after"):
            found = (
                [evaluations[c["drop_layers"]][stage] for c in group]
                if group
                else [evaluations[WHOLE][stage]]
            )
            for metric in metrics:
                value, draws = quality(found, metric)
                low, high = np.percentile(draws, (2.5, 97.5))
                row |= {
                    f"{metric}_{stage}": value,
                    f"{metric}_{stage}_low": low,
                    f"{metric}_{stage}_high": high,
                }
        rows.append(row)
    return rows


def compare(choices, evaluations, metrics) -> list[dict]:
    """Every criterion against every control, every later criterion and its own choice elsewhere: paired difference with its 95 %
    interval; they differ when the interval leaves out 0."""
    names = list(dict.fromkeys(c["criterion"] for c in choices))
    pairs = [
        (a, b)
        for i, a in enumerate(CRITERIA)
        for b in names
        if b in (*CONTROLS, *CRITERIA[i + 1 :], f"{a}_elsewhere")
    ]
    rows = []
    for ratio in dict.fromkeys(c["ratio"] for c in choices):
        sets = {
            name: [
                evaluations[c["drop_layers"]]
                for c in choices
                if (c["ratio"], c["criterion"]) == (ratio, name)
            ]
            for name in names
        }
        for metric in metrics:
            for stage in ("before", "after"):
                found = {
                    name: quality([e[stage] for e in evaluated], metric) for name, evaluated in sets.items()
                }
                for criterion, other in pairs:
                    (a, a_draws), (b, b_draws) = found[criterion], found[other]
                    low, high = np.percentile(a_draws - b_draws, (2.5, 97.5))
                    better = (a > b) == (metric == "f1")
                    verdict = ("better" if better else "worse") if low > 0 or high < 0 else "no difference"
                    rows.append(
                        {
                            "ratio": ratio,
                            "metric": metric,
                            "stage": stage,
                            "criterion": criterion,
                            "control": other,
                            "difference": a - b,
                            "low": low,
                            "high": high,
                            "verdict": verdict,
                        }
                    )
    return rows


def say(comparisons, ratios, metrics):
    """What can and what cannot be claimed, in sentences; returns them."""
    lines = []
    for ratio in ratios:
        for metric in metrics:
            for control in CONTROLS:
                found = {
                    c["criterion"]: c["verdict"]
                    for c in comparisons
                    if (c["ratio"], c["metric"], c["stage"], c["control"])
                    == (ratio, metric, "after", control)
                }
                groups = {
                    v: [k for k in found if found[k] == v] for v in ("better", "worse", "no difference")
                }
                text = "; ".join(
                    f"{verdict}: {', '.join(names)}" for verdict, names in groups.items() if names
                )
                lines.append(f"{ratio:.0%} removed, healed, {metric} against {control}: {text}")
    return lines


def bars(rows, metric, stage):
    """(values, (2, N) lengths of the error bars) for matplotlib."""
    value, low, high = (
        np.array([r[f"{metric}_{stage}{end}"] for r in rows]) for end in ("", "_low", "_high")
    )
    return value, np.stack([value - low, high - value])


def frame(ax, metric, rows):
    """Limits of the y axis. A random set without layer 0 can have a perplexity of hundreds: the axis shows the others."""
    ax.set_ylabel(LABELS[metric])
    if metric == "f1":
        ax.set_ylim(0, 1)
    else:
        others = [r for r in rows if r["criterion"] != "random"]
        ax.set_ylim(
            0.97 * min(r["perplexity_after_low"] for r in others),
            1.05 * max(r["perplexity_before_high"] for r in others),
        )


def draw_tradeoff(table, metrics, path):
    """Quality after healing against parameters, latency and memory of the language model."""
    costs = (
        ("parameters", "values of the language model"),
        ("seconds", "s for 64 + 32 tokens"),
        ("megabytes", "MB of weights and a 1024-token KV-cache"),
    )
    colours = dict(zip((*CRITERIA, *CONTROLS), (*COLOURS, "#111111")))
    figure, axes = new_figure(len(metrics), len(costs), width=4.4, height=3.2, squeeze=False)
    for row, metric in enumerate(metrics):
        for ax, (cost, label) in zip(axes[row], costs):
            for criterion, colour in colours.items():
                points = [table[0], *(r for r in table if r["criterion"] == criterion)]
                value, error = bars(points, metric, "after")
                ax.errorbar(
                    [r[cost] for r in points],
                    value,
                    yerr=error,
                    color=colour,
                    label=criterion,
                    ls="--" if criterion in CONTROLS else "-",
                    marker="o",
                    ms=4,
                    lw=1.3,
                    elinewidth=0.5,
                    capsize=2,
                )
            ax.set_xlabel(label)
            ax.locator_params(axis="x", nbins=4)
            frame(ax, metric, table)
    axes[0][0].legend(fontsize=7, loc="lower right")
    figure.suptitle(
        "After healing; solid: criteria, dashed: controls; bars: 95 % intervals over test samples and random sets"
    )
    save_figure(figure, path)


def draw_healing(table, metrics, path):
    """Before and after healing, side by side, one column a ratio."""
    ratios = sorted({r["ratio"] for r in table} - {0.0})
    figure, axes = new_figure(len(metrics), len(ratios), width=4.4, height=3.2, squeeze=False)
    for row, metric in enumerate(metrics):
        for ax, ratio in zip(axes[row], ratios):
            rows = [r for r in table if r["ratio"] == ratio]
            x = np.arange(len(rows))
            for shift, stage, colour in ((-0.2, "before", COLOURS[1]), (0.2, "after", COLOURS[0])):
                value, error = bars(rows, metric, stage)
                ax.bar(x + shift, value, 0.38, yerr=error, color=colour, label=f"{stage} healing", capsize=2)
            ax.axhline(table[0][f"{metric}_before"], color="#5b6770", lw=1, ls=":", label="unpruned")
            ax.set_xticks(x, [r["criterion"] for r in rows], rotation=40, ha="right", fontsize=8)
            ax.set_title(f"{ratio:.0%} of the layers removed")
            frame(ax, metric, rows)
    axes[0][0].legend(fontsize=7, ncols=3, loc="upper left")
    save_figure(figure, path)


def report(args, table, comparisons, metrics, sentences, worst):
    """Rows for the closing table of run_all.sh."""
    out = args.out
    figures = [
        (out / "tradeoff.png", "Quality after healing against size, latency and memory."),
        (out / "healing.png", "Before and after healing."),
        (out / "layer_sensitivity.png", "What each layer does when it is switched off."),
    ]
    for ratio in args.ratio:
        of = {r["criterion"]: r for r in table if r["ratio"] in (ratio, 0.0)}
        for metric in metrics:
            ours = of["sensitivity"]
            controls = {
                "unpruned": of["unpruned"][f"{metric}_before"],
                "unpruned, healed": of["unpruned"][f"{metric}_after"],
                "before healing": ours[f"{metric}_before"],
                **{name: of[name][f"{metric}_after"] for name in (*CRITERIA[1:], *CONTROLS)},
            }
            claims = " ".join(
                f"{s}." for s in sentences if s.startswith(f"{ratio:.0%}") and f", {metric} " in s
            )
            details = {
                "on_disk_loss_difference": worst,
                "comparisons": [c for c in comparisons if c["ratio"] == ratio and c["metric"] == metric],
            }
            write_result(
                out.parent,
                f"{out.name}: {ratio:.0%} of the layers removed, {metric}",
                {
                    "f1": "finding micro-F1 after healing",
                    "perplexity": "perplexity after healing, lower is better",
                }[metric],
                ours[f"{metric}_after"],
                controls,
                (ours[f"{metric}_after_low"], ours[f"{metric}_after_high"]),
                figures if (ratio, metric) == (args.ratio[-1], metrics[0]) else (),
                f"Layers chosen by sensitivity (v masked, kl). {claims}",
                details,
            )


def main(args):
    if (
        bool(args.data) == bool(args.texts)
        or (args.texts and not args.test_texts)
        or (args.data and not args.lang_model_path)
    ):
        raise UserError(
            "give --data and --lang-model-path (a report model), or --texts and --test-texts (a plain model)"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator()
    seed_everything(args.seed)
    task = (TextTask if args.texts else ReportTask)(args, accelerator.device)
    metrics = ("f1", "perplexity") if task.labels is not None else ("perplexity",)
    layers = len(decoder_layers(task.lang_model))

    rows = summarise(scan(task.lang_model, task.prompts, ["v", "mlp"], ("l1_mean", "kl")))
    write_tables(
        args.out / "layer_sensitivity.csv",
        rows,
        "v",
        "kl",
        f"{layers} layers, {len(task.prompts)} task prompts",
    )
    choices = choose_all(task, args, rows)
    if args.also:
        choices += chosen_elsewhere(args, rows, layers)
    atomic_write(args.out / "plan.json", json.dumps({"layers": layers, "choices": choices}, indent=1))
    for choice in choices:
        print(f"{choice['ratio']:.0%} {choice['criterion']:16} --drop-layers {choice['drop_layers']}")

    cache, file = {}, args.out / "evaluations.json"
    stamp = {
        "model": str(args.model),
        "weights": fingerprint(task.lang_model),
        "data": str(args.data or args.test_texts),
        "test": args.test_samples,
        "train": args.train_samples,
        "steps": args.heal_steps,
        "batch": args.heal_batch,
        "lr": args.heal_lr,
        "tokens": args.max_new_tokens,
        "seed": args.seed,
    }
    if file.exists() and not args.overwrite:
        before = json.loads(file.read_text())
        if before["stamp"] != stamp:
            raise UserError(
                f"{file}: is of another study ({before['stamp']}); use --overwrite or another --out"
            )
        cache = before["sets"]
    for spec in progress([WHOLE, *dict.fromkeys(c["drop_layers"] for c in choices)], desc="sets", unit="set"):
        if spec not in cache:
            cache[spec] = evaluate_set(task, parse_drop_layers(spec), args, accelerator)
            atomic_write(file, json.dumps({"stamp": stamp, "sets": cache}))
        before, after = (cache[spec][stage]["perplexity"] for stage in ("before", "after"))
        print(
            f"without {'layers ' + spec if spec else 'nothing'}: perplexity {before:.3f}, healed {after:.3f}"
        )
    costs = {}
    for left in sorted({layers, *(c["layers_left"] for c in choices)}):
        with without_layers(task.lang_model, range(left, layers)):
            costs[left] = latency(task.lang_model)
        costs[left]["megabytes"] = (
            costs[left]["weight_bytes"] + 1024 * costs[left]["kv_cache_bytes_per_token"]
        ) / 1e6
    worst = check_on_disk(task, args, choices, cache)
    print(
        f"pruned on disk against layers skipped in memory: largest difference of a test sample's loss {worst:.1e}"
    )
    if worst > 1e-3:
        raise RuntimeError("a checkpoint that was pruned on disk is not the model that was measured")

    table, comparisons = tabulate(choices, cache, costs, metrics), compare(choices, cache, metrics)
    write_csv(args.out / "table.csv", table, list(table[0]))
    write_csv(args.out / "comparisons.csv", comparisons, list(comparisons[0]))
    for row in table:
        text = [
            f"{m} {row[f'{m}_before']:.3f} -> {row[f'{m}_after']:.3f} [{row[f'{m}_after_low']:.3f}, {row[f'{m}_after_high']:.3f}]"
            for m in metrics
        ]
        print(
            f"{row['ratio']:4.0%} {row['criterion']:16} {'  '.join(text)}  {row['seconds']:.2f} s  {row['sets']}"
        )
    sentences = say(comparisons, args.ratio, metrics)
    print("\n".join(sentences))
    atomic_write(args.out / "claims.txt", "\n".join(sentences) + "\n")
    draw_tradeoff(table, metrics, args.out / "tradeoff.png")
    draw_healing(table, metrics, args.out / "healing.png")
    report(args, table, comparisons, metrics, sentences, worst)


if __name__ == "__main__":
    run(main, parse_args())
