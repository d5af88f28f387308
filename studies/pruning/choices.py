"""Which sets of layers a study scores: those of every criterion and control, and those of another study."""

import csv

from scipy.stats import spearmanr

from common.errors import UserError
from common.files import read_json, reading
from pruning.layers import decoder_layers, spec_of
from pruning.sensitivity_analyse.choose_layers import choose, layers_to_remove, search
from pruning.sensitivity_analyse.layer_sensitivity_scan import layer_scores
from studies.pruning.tables import CONTROLS, CRITERIA


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
    with reading(table_file, "table of a study"), open(table_file, encoding="utf-8") as file:
        others = [
            {**row, "layer": int(row["layer"]), "score_mean": float(row["score_mean"])}
            for row in csv.DictReader(file)
        ]
    measures = {"v": ["kl"], "mlp": ["kl"], "layer": ["block_influence", "kl", "nll_change"]}
    for mode, distance in ((mode, distance) for mode, some in measures.items() for distance in some):
        here, there = (layer_scores(r, mode, distance) for r in (rows, others))
        first = [1 + sum(score > scores[0] for score in scores) for scores in (here, there)]
        whole, rest = (spearmanr(here[k:], there[k:]).statistic for k in (0, 1))
        print(
            f"{distance} with {mode} off: rank correlation with {args.also} {whole:.2f}, without layer 0 "
            f"{rest:.2f}; layer 0 is number {first[0]} here and {first[1]} there"
        )
    return [
        {**choice, "criterion": f"{choice['criterion']}_elsewhere"}
        for choice in plan["choices"]
        if choice["criterion"] in CRITERIA and choice["ratio"] in args.ratio
    ]
