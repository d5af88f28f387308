"""The whole study of one model: scan, choose, prune at several ratios, heal, test, and draw what was lost.

    python studies/pruning/study.py --model runs/dia_pangu/ft --lang-model-path path/to/llm \\
        --data data/dia_pangu --out runs/pruning/study

Layers are chosen on training samples, healing sees training samples, and every set of layers is scored once
on the test split. Criteria often choose the same set: each set is healed and scored only once
(evaluations.json, which also lets an interrupted study go on). --out also receives layer_sensitivity.csv,
.all.csv and .png, plan.json, pruned/ (checkpoints of the sensitivity sets, compared with the model that skips
these layers), table.csv, comparisons.csv, claims.txt, tradeoff.png and healing.png.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
from accelerate import Accelerator

from common.arguments import Parser, number
from common.checkpoint import atomic_csv, atomic_json, atomic_write
from common.errors import UserError, run
from common.run import progress, seed_everything
from pruning import report_model
from pruning.layers import decoder_layers, parse_drop_layers, plain_tag, without_layers
from pruning.pruning_tools import prune_llm
from pruning.sensitivity_analyse.layer_sensitivity_scan import fingerprint, scan, summarise, write_tables
from pruning.test import latency
from studies.pruning.choices import choose_all, chosen_elsewhere
from studies.pruning.figures import draw_healing, draw_tradeoff
from studies.pruning.report_task import ReportTask, evaluate_set
from studies.pruning.tables import CONTROLS, CRITERIA, WHOLE, claims, compare, tabulate
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


# ---------------------------------------- measuring


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
    """Prune the sensitivity sets on disk; return how far test losses are from those in memory, at most."""
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
    names = prune_llm.result_names(tag, prune_llm.VERSIONS[0])
    merged, prune_map = (args.out / "pruned" / names[what] for what in ("merged", "map"))
    forms = [merged.with_name(merged.name + end) for end in ("", ".bin", ".safetensors")]
    merged = next(form for form in forms if form.exists())
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
                headline=last,
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
    atomic_json(args.out / "plan.json", {"layers": layers, "choices": choices})
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
    table = tabulate(choices, evaluations, costs, metrics)
    comparisons = compare(choices, evaluations, metrics)
    atomic_csv(args.out / "table.csv", table)
    atomic_csv(args.out / "comparisons.csv", comparisons)
    print_table(table, metrics)
    sentences = claims(comparisons, args.ratio, metrics)
    print("\n".join(sentences))
    atomic_write(args.out / "claims.txt", "\n".join(sentences) + "\n")
    draw_tradeoff(table, metrics, args.out / "tradeoff.png")
    draw_healing(table, metrics, args.out / "healing.png")
    report(args, table, comparisons, metrics, sentences, worst)


if __name__ == "__main__":
    run(main, parse_args())
