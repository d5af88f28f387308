"""The whole study of one model: scan, choose, prune at several ratios, heal, test, and draw what was lost.

    python studies/pruning/study.py --model runs/dia_pangu/ft --lang-model-path path/to/llm \\
        --data data/dia_pangu --out runs/pruning/study

Layers are chosen on training samples, healing sees training samples, and every set of layers is scored once
on the test split. Criteria often choose the same set: each set is healed and scored only once
(evaluations.json, which also lets an interrupted study go on). --out also receives layer_sensitivity.csv,
.all.csv and .png, plan.json, pruned/ (checkpoints of the sensitivity sets, compared with the model that skips
these layers), table.csv, comparisons.csv, claims.txt, tradeoff.png and healing.png.
"""

import csv
import json
import sys
import tempfile
from pathlib import Path

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from accelerate import Accelerator

from common.arguments import Parser, number
from common.checkpoint import atomic_write
from common.errors import UserError, run
from common.files import read_json, reading
from common.run import progress, seed_everything
from dia_pangu.evaluate.labeler import positives
from pruning import report_model, train
from pruning.layers import decoder_layers, without_layers
from pruning.pruning_tools import prune_llm
from pruning.pruning_tools.prune_llm import VERSIONS, parse_drop_layers, plain_tag, result_names, spec_of
from pruning.sensitivity_analyse.choose_layers import choose, layers_to_remove, search
from pruning.sensitivity_analyse.eval_metric import perplexity
from pruning.sensitivity_analyse.layer_sensitivity_scan import (
    fingerprint,
    layer_scores,
    scan,
    summarise,
    write_csv,
    write_tables,
)
from pruning.test import latency
from studies.pruning.figures import draw_healing, draw_tradeoff
from studies.pruning.tables import (
    CONTROLS,
    CRITERIA,
    WHOLE,
    claims,
    compare,
    counts,
    rank_correlation,
    tabulate,
)
from studies.recipe import options
from studies.summary import write_result


def parse_args(argv=None):
    p = Parser(__doc__)
    what = p.add_argument_group("model and data")
    what.add_argument("--model", type=Path, required=True, help="a dia_pangu checkpoint folder")
    what.add_argument(
        "--lang-model-path",
        type=Path,
        required=True,
        help="folder with the language model's config.json and tokenizer",
    )
    what.add_argument("--data", type=Path, required=True, help="a CTRG folder")
    what.add_argument("--cache", type=Path, help="folder for prepared volumes")
    what.add_argument("--out", type=Path, required=True, help="folder of the results")
    what.add_argument(
        "--overwrite", action="store_true", help="forget the evaluations of an earlier study in --out"
    )
    add_study_arguments(p.add_argument_group("study"))
    return p.parse_args(argv)


def add_study_arguments(group):
    count = number(int, 1)
    group.add_argument(
        "--ratio", type=float, nargs="+", default=[0.25, 0.33, 0.5], help="fractions of the layers to remove"
    )
    group.add_argument(
        "--calibration", type=count, default=16, help="training samples for the scan and the greedy search"
    )
    group.add_argument("--train-samples", type=count, default=320, help="training samples for healing")
    group.add_argument("--test-samples", type=count, default=80, help="test samples")
    group.add_argument("--random-sets", type=count, default=5, help="random sets of each kind and ratio")
    group.add_argument("--heal-steps", type=count, default=40, help="optimizer steps of healing")
    group.add_argument("--heal-batch", type=count, default=16, help="samples in a step of healing")
    group.add_argument("--heal-lr", type=float, default=3e-3, help="peak learning rate of healing")
    group.add_argument("--max-new-tokens", type=count, default=120, help="longest report in tokens")
    group.add_argument("--seed", type=int, default=0, help="random seed of healing")
    group.add_argument(
        "--also",
        type=Path,
        metavar="STUDY",
        help="--out of a study of another base with as many layers: the sets that it chose are scored here "
        "too, and the layer scores of both are correlated",
    )


# ---------------------------------------- the model and its samples


class ReportTask:
    """A dia_pangu model: prompts with volumes, report losses, and the findings that its reports state."""

    def __init__(self, args, device):
        loaded = report_model.load_report_model(args.model, args.lang_model_path)
        self.model, self.text, self.config = loaded
        self.model = self.model.to(device)
        if not self.config["lora"]:
            self.model.lang_model, _ = train.new_lora(self.model.lang_model)
        self.trained, self.lang_model = self.model, self.model.lang_model
        self.collate, self.max_new_tokens = report_model.collate_encoded, args.max_new_tokens
        self.train_set = self.encoded(args, "train", args.train_samples, flip=0.02)
        self.test_set = self.encoded(args, "test", args.test_samples)
        prompts = report_model.task_prompts(self.model, self.text, self.train_set)
        self.prompts = [prompt for prompt, _ in zip(prompts, range(args.calibration))]
        labels = [self.test_set[i]["cls_labels"].tolist() for i in range(len(self.test_set))]
        self.labels = np.array(labels, bool)

    def encoded(self, args, split: str, limit: int, flip: float = 0.0):
        return report_model.Encoded(
            self.model, self.text, self.config, args.data, split, limit, args.cache, flip, args.seed
        )

    def losses(self) -> torch.Tensor:
        return report_model.report_losses(self.model, self.text, self.test_set)

    def reported(self) -> np.ndarray:
        """(N, 14) findings that the model's own reports of the test samples state."""
        made = report_model.write_reports(self.model, self.text, self.test_set, self.max_new_tokens, batch=40)
        return np.array(positives(made["reports"]), bool)


# ---------------------------------------- choosing


def choose_all(task, args, rows) -> list[dict]:
    """Choices {criterion, ratio, seed, drop_layers, layers_left, why} of every criterion and control.

    Greedy searches once: the first k steps of the longest search serve every ratio.
    """
    layers, choices = len(decoder_layers(task.lang_model)), []
    most = max(layers_to_remove(layers, ratio) for ratio in args.ratio)
    _, greedy = search(task.lang_model, task.prompts, most, 1)
    for ratio in args.ratio:
        count = layers_to_remove(layers, ratio)
        for criterion in (*CRITERIA, *CONTROLS):
            for seed in range(args.random_sets if criterion.startswith("random") else 1):
                if criterion == "greedy":
                    drop, loss = greedy[count]
                    why = f"loss {loss:.4f} on the calibration set"
                else:
                    drop, why = choose(criterion, count, layers, rows, seed=seed)
                choice = {"criterion": criterion, "ratio": ratio, "seed": seed, "drop_layers": spec_of(drop)}
                choices.append({**choice, "layers_left": layers - count, "why": why})
    return choices


def chosen_elsewhere(args, rows, layers: int) -> list[dict]:
    """The choices of the study --also, as criteria of their own; prints how the layer scores agree."""
    plan_file, table_file = args.also / "plan.json", args.also / "layer_sensitivity.all.csv"
    fields = {"criterion": str, "ratio": float, "drop_layers": str, "layers_left": int}
    plan = read_json(plan_file, {"layers": int, "choices": [fields]})
    if plan["layers"] != layers:
        raise UserError(f"{plan_file}: is of a model with {plan['layers']} layers, this one has {layers}")
    with reading(table_file, "table of a study"), open(table_file) as file:
        others = [
            {**row, "layer": int(row["layer"]), "score_mean": float(row["score_mean"])}
            for row in csv.DictReader(file)
        ]
    measures = {"v": ["kl"], "mlp": ["kl"], "layer": ["block_influence", "kl", "nll_change"]}
    for mode, distance in ((mode, distance) for mode, some in measures.items() for distance in some):
        here, there = (layer_scores(r, mode, distance) for r in (rows, others))
        first = [1 + sum(score > scores[0] for score in scores) for scores in (here, there)]
        whole, rest = rank_correlation(here, there), rank_correlation(here[1:], there[1:])
        print(
            f"{distance} with {mode} off: rank correlation with {args.also} {whole:.2f}, without layer 0 "
            f"{rest:.2f}; layer 0 is number {first[0]} here and {first[1]} there"
        )
    return [
        {**choice, "criterion": f"{choice['criterion']}_elsewhere"}
        for choice in plan["choices"]
        if choice["criterion"] in CRITERIA and choice["ratio"] in args.ratio
    ]


# ---------------------------------------- measuring a set of layers


def measure(task) -> dict:
    """Losses and finding counts of every test sample, with the model as it is now."""
    losses, found = task.losses(), counts(task.labels, task.reported())
    return {"losses": losses.tolist(), "counts": found.tolist(), "perplexity": perplexity(losses)}


def healing_settings(args, folder):
    """The arguments of pruning/train.py for healing one set of layers; `folder` is thrown away afterwards."""
    flags = {"pruned_model_path": args.model, "out": folder, "max_steps": args.heal_steps}
    flags |= {"batch_size": args.heal_batch, "accum": 1, "lr": args.heal_lr, "seed": args.seed}
    flags |= {"lr_scheduler_type": "cosine", "warmup": min(5, args.heal_steps)}
    flags |= {"log_every": args.heal_steps, "keep": 1}
    return train.parse_args(options(flags))


def evaluate_set(task, drop, args, accelerator) -> dict:
    """Return {"before", "after"}: `measure` without the layers `drop`, before and after healing.

    The model is as it was afterwards: the layers are put back, and LoRA's matrices get their old values.
    """
    lora = {name: p.detach().clone() for name, p in task.trained.named_parameters() if "lora_" in name}
    with without_layers(task.lang_model, drop), tempfile.TemporaryDirectory(dir=args.out) as folder:
        before = measure(task)
        train.set_trained(task.trained, full=False)
        train.heal(task.trained, task.train_set, task.collate, healing_settings(args, folder), accelerator)
        after = measure(task)
    accelerator.free_memory()
    with torch.no_grad():
        for name, parameter in task.trained.named_parameters():
            if name in lora:
                parameter.copy_(lora[name])
    return {"before": before, "after": after}


def evaluate_all(task, choices, args, accelerator) -> dict:
    """{set: evaluation} of the whole model and of every chosen set; evaluations.json spares what it holds."""
    stamp = {
        "model": str(args.model),
        "weights": fingerprint(task.lang_model),
        "data": str(args.data),
        "test": args.test_samples,
        "train": args.train_samples,
        "steps": args.heal_steps,
        "batch": args.heal_batch,
        "lr": args.heal_lr,
        "tokens": args.max_new_tokens,
        "seed": args.seed,
    }
    known, file = {}, args.out / "evaluations.json"
    if file.exists() and not args.overwrite:
        before = json.loads(file.read_text())
        if before["stamp"] != stamp:
            raise UserError(
                f"{file}: is of another study ({before['stamp']}); use --overwrite or another --out"
            )
        known = before["sets"]
    specs = [WHOLE, *dict.fromkeys(choice["drop_layers"] for choice in choices)]
    for spec in progress(specs, desc="sets", unit="set"):
        if spec not in known:
            known[spec] = evaluate_set(task, parse_drop_layers(spec), args, accelerator)
            atomic_write(file, json.dumps({"stamp": stamp, "sets": known}))
        before, after = (known[spec][stage]["perplexity"] for stage in ("before", "after"))
        what = f"layers {spec}" if spec else "nothing"
        print(f"without {what}: perplexity {before:.3f}, healed {after:.3f}")
    return known


def measure_costs(task, choices) -> dict:
    """{layers left: latency, parameters and memory of the language model with so many layers}."""
    layers, costs = len(decoder_layers(task.lang_model)), {}
    for left in sorted({layers, *(choice["layers_left"] for choice in choices)}):
        with without_layers(task.lang_model, range(left, layers)):
            cost = latency(task.lang_model)
        cost["megabytes"] = (cost["weight_bytes"] + 1024 * cost["kv_cache_bytes_per_token"]) / 1e6
        costs[left] = cost
    return costs


def check_on_disk(task, args, choices, evaluations) -> float:
    """Prune the sensitivity sets on disk; return the largest difference of a test loss to the model in
    memory."""
    wanted = list(dict.fromkeys(c["drop_layers"] for c in choices if c["criterion"] == "sensitivity"))
    tags = {spec: plain_tag(parse_drop_layers(spec)) for spec in wanted}
    command = {"ckpt": args.model, "lang_model_path": args.lang_model_path, "hf": "merged"}
    command = options({**command, "out_dir": args.out / "pruned", "overwrite": True})
    for spec in wanted:
        command += options({"drop_layers": spec, "tag": tags[spec]})
    prune_llm.main(prune_llm.parse_args(command))
    worst = 0.0
    for spec in wanted:
        losses = losses_on_disk(task, args, tags[spec])
        before = torch.tensor(evaluations[spec]["before"]["losses"], dtype=torch.float64)
        worst = max(worst, (losses - before).abs().max().item())
    return worst


def losses_on_disk(task, args, tag: str) -> torch.Tensor:
    """Test losses of the checkpoint that was pruned under the name `tag`."""
    names = result_names(tag, VERSIONS[0])  # whole names, because drop1 begins as drop1_3 does
    _, merged, prune_map, *_ = (args.out / "pruned" / name for name in names)
    forms = [merged.with_name(merged.name + end) for end in ("", ".bin", ".safetensors")]
    merged, prune_map = (next(f for f in forms if f.exists()), prune_map.with_name(prune_map.name + ".json"))
    model, text, _ = report_model.load_report_model(merged, args.lang_model_path, prune_map)
    return report_model.report_losses(model, text, task.test_set)


# ---------------------------------------- the summary page


def report(args, table, comparisons, metrics, sentences, worst):
    """Write the rows of run_all.sh's closing table: sensitivity beside every other criterion and control."""
    titles = {
        "f1": "finding micro-F1 after healing",
        "perplexity": "perplexity after healing, lower is better",
    }
    figures = [
        (args.out / "tradeoff.png", "Quality after healing against size, latency and memory."),
        (args.out / "healing.png", "Before and after healing."),
        (args.out / "layer_sensitivity.png", "What each layer does when it is switched off."),
    ]
    for ratio in args.ratio:
        rows = {row["criterion"]: row for row in table if row["ratio"] in (ratio, 0.0)}
        for metric in metrics:
            ours = rows["sensitivity"]
            controls = {
                "unpruned": rows["unpruned"][f"{metric}_before"],
                "unpruned, healed": rows["unpruned"][f"{metric}_after"],
                "before healing": ours[f"{metric}_before"],
                **{name: rows[name][f"{metric}_after"] for name in (*CRITERIA[1:], *CONTROLS)},
            }
            start = f"{ratio:.0%}"
            own = [s for s in sentences if s.startswith(start) and f", {metric} " in s]
            details = {
                "on_disk_loss_difference": worst,
                "comparisons": [c for c in comparisons if c["ratio"] == ratio and c["metric"] == metric],
            }
            last = ratio == args.ratio[-1] and metric == metrics[0]
            write_result(
                args.out.parent,
                f"{args.out.name}: {start} of the layers removed, {metric}",
                titles[metric],
                ours[f"{metric}_after"],
                controls,
                (ours[f"{metric}_after_low"], ours[f"{metric}_after_high"]),
                figures if last else (),
                "Layers chosen by sensitivity (v masked, kl). " + " ".join(f"{s}." for s in own),
                details,
            )


def print_table(table, metrics):
    for row in table:
        numbers = []
        for metric in metrics:
            before, after, low, high = (
                row[f"{metric}_{end}"] for end in ("before", "after", "after_low", "after_high")
            )
            numbers.append(f"{metric} {before:.3f} -> {after:.3f} [{low:.3f}, {high:.3f}]")
        start, end = f"{row['ratio']:4.0%} {row['criterion']:16}", f"{row['seconds']:.2f} s  {row['sets']}"
        print(f"{start} {'  '.join(numbers)}  {end}")


def main(args):
    args.out.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator()
    seed_everything(args.seed)

    # the model, its calibration prompts and its test samples
    task = ReportTask(args, accelerator.device)
    metrics = ("f1", "perplexity")
    layers = len(decoder_layers(task.lang_model))

    # scan
    rows = summarise(scan(task.lang_model, task.prompts, ["v", "mlp"], ("l1_mean", "kl")))
    title = f"{layers} layers, {len(task.prompts)} task prompts"
    write_tables(args.out / "layer_sensitivity.csv", rows, "v", "kl", title)

    # choose
    choices = choose_all(task, args, rows)
    if args.also:
        choices += chosen_elsewhere(args, rows, layers)
    atomic_write(args.out / "plan.json", json.dumps({"layers": layers, "choices": choices}, indent=1))
    for choice in choices:
        print(f"{choice['ratio']:.0%} {choice['criterion']:16} --drop-layers {choice['drop_layers']}")

    # prune in memory, test, heal, test again; then what each size costs
    evaluations = evaluate_all(task, choices, args, accelerator)
    costs = measure_costs(task, choices)

    # what was measured in memory is what the pruning tool writes
    worst = check_on_disk(task, args, choices, evaluations)
    print(f"pruned on disk, the largest difference of a test sample's loss is {worst:.1e}")
    if worst > 1e-3:
        raise RuntimeError("a checkpoint that was pruned on disk is not the model that was measured")

    # tables, claims and pictures
    table, comparisons = (
        tabulate(choices, evaluations, costs, metrics),
        compare(choices, evaluations, metrics),
    )
    write_csv(args.out / "table.csv", table, list(table[0]))
    write_csv(args.out / "comparisons.csv", comparisons, list(comparisons[0]))
    print_table(table, metrics)
    sentences = claims(comparisons, args.ratio, metrics)
    print("\n".join(sentences))
    atomic_write(args.out / "claims.txt", "\n".join(sentences) + "\n")
    draw_tradeoff(table, metrics, args.out / "tradeoff.png")
    draw_healing(table, metrics, args.out / "healing.png")
    report(args, table, comparisons, metrics, sentences, worst)


if __name__ == "__main__":
    run(main, parse_args())
