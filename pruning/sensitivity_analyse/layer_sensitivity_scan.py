"""Which layers of a language model matter: switch each one off and measure how far the output moves.

    python pruning/sensitivity_analyse/layer_sensitivity_scan.py --model path/to/llm --mode v_only \\
        --out layer_sensitivity.csv

One pass also yields block influence (ShortGPT, arXiv 2403.03853), the angular distance of every window of
layers (arXiv 2403.17887) and, for each layer left out, the distance and the change of the loss. Upstream:
sensitivity-analyse/layer_sensitivity_scan.py, which runs the whole model once per layer and prompt (`--method
naive`; scan_methods.py describes the faster ones).
"""

import contextlib
import hashlib
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
from accelerate import Accelerator

from common.arguments import Parser, number, refuse
from common.checkpoint import atomic_csv, atomic_write
from common.errors import Interrupted, UserError, run
from common.figures import new_figure, save_figure
from common.llm import add_trust_argument
from common.run import one_process, progress
from pruning.layers import decoder, decoder_layers, longest, plain
from pruning.sensitivity_analyse.eval_metric import DISTANCES
from pruning.sensitivity_analyse.layer_mask import MODES, masked, plain_mode
from pruning.sensitivity_analyse.load_model import PROMPTS, check_words, load_model, read_texts, scorable
from pruning.sensitivity_analyse.scan_methods import METHODS, list_variants, pad_prompts, scan_batch

COLUMNS = ["mode", "layer", "head", "distance", "score_mean", "score_std", "prompt_count"]


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument(
        "--model",
        type=Path,
        required=True,
        help="a language model's folder; with --task-data a dia_pangu checkpoint",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("layer_sensitivity.csv"),
        help="CSV of the first mode and distance; the table of all, the records and the picture go beside it",
    )
    add_scan_arguments(p.add_argument_group("scan"))
    add_prompt_arguments(p.add_argument_group("prompts"))
    p.add_argument(
        "--resume", action="store_true", help="go on with an interrupted scan: no prompt is scored twice"
    )
    p.add_argument("--overwrite", action="store_true", help="start again although --out exists")
    return p.parse_args(argv)


def add_scan_arguments(group):
    group.add_argument(
        "--mode",
        nargs="+",
        default=["v_only"],
        help=f"what to switch off, one or several of {', '.join(MODES)} (upstream: v_only, qv)",
    )
    group.add_argument(
        "--distance",
        nargs="+",
        default=["l1_mean", "kl"],
        choices=DISTANCES,
        help="distances to measure; the first goes to --out",
    )
    group.add_argument("--method", choices=METHODS, default="wavefront", help="how the masked passes are run")
    group.add_argument(
        "--batch-size",
        type=number(int, 1),
        default=1,
        help="prompts that run together; raise it on an accelerator",
    )
    group.add_argument(
        "--sanity-check",
        action="store_true",
        help="first check that lifted masks change nothing and --method is exact",
    )


def add_prompt_arguments(group):
    """Add what to run through the model; the same for scanning, choosing and pruning in width."""
    group.add_argument(
        "--prompts",
        type=Path,
        help="texts, one a line, or a .jsonl file with the field text; left out: 18 built-in ones, a third "
        "each English, Chinese and radiology",
    )
    group.add_argument(
        "--task-data",
        type=Path,
        help="a CTRG folder whose volumes and reports are the prompts of a dia_pangu model",
    )
    group.add_argument(
        "--lang-model-path", type=Path, help="with --task-data: folder with the configuration and tokenizer"
    )
    group.add_argument(
        "--task-samples", type=number(int, 1), default=16, help="with --task-data: training samples to use"
    )
    group.add_argument(
        "--max-tokens", type=number(int, 2), default=512, help="longest prompt in tokens; longer ones are cut"
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="number format of the weights; default: as stored",
    )
    add_trust_argument(group)


def load_with_prompts(args) -> tuple:
    """Return (model, prompts) as --model and `add_prompt_arguments` ask for.

    A prompt is {name, input_ids (1, N) or inputs_embeds (1, N, d), labels (1, N) if a part alone is scored}.
    """
    accelerator = Accelerator()
    one_process(accelerator.num_processes, "layers are scanned")
    device = accelerator.device
    if args.task_data:
        refuse(args, ["prompts", "max_tokens", "dtype", "trust_remote_code"], "with --task-data")
        if not args.lang_model_path:
            raise UserError(
                "--task-data needs --lang-model-path, the folder with the language model's configuration and "
                "tokenizer"
            )
        from pruning import report_model  # dia_pangu's code, which plain language models do not need

        loaded = report_model.load_report_model(args.model, args.lang_model_path)
        model, text, config = loaded[0].to(device), *loaded[1:]
        samples = report_model.Encoded(model, text, config, args.task_data, "train", args.task_samples)
        prompts = list(report_model.task_prompts(model, text, samples))
        if bare := [p["name"] for p in prompts if not (p["labels"][:, 1:] != -100).any()]:
            raise UserError(f"{args.task_data}: {bare[0]}: no token of its report is scored; leave it out")
        return model.lang_model, prompts
    refuse(args, ["lang_model_path", "task_samples"], "without --task-data")
    model, tokenizer = load_model(args.model, args.dtype, args.trust_remote_code)
    texts = read_texts(args.prompts or PROMPTS)
    check_words(model, tokenizer, texts)
    prompts = text_prompts(texts, tokenizer, longest(model, args, "max_tokens"))
    return model.to(device), prompts


def text_prompts(texts, tokenizer, max_tokens: int = 512) -> list[dict]:
    """Prompts of plain texts, a list or `read_texts`, cut to `max_tokens`; the `scorable` ones."""
    if not isinstance(texts, dict):
        texts = {f"prompts, text {number}": text for number, text in enumerate(texts, 1)}
    ids = scorable({place: tokenizer(text).input_ids[:max_tokens] for place, text in texts.items()})
    return [{"name": texts[place], "input_ids": torch.tensor([some])} for place, some in ids.items()]


# ---------------------------------------- many prompts


def fingerprint(model) -> str:
    """Twelve digits that change with the architecture and with any value of the weights."""
    digest = hashlib.sha1(json.dumps(plain(model).config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in plain(model).named_parameters():
        digest.update(f"{name}{tuple(tensor.shape)}{checksum(tensor.detach())}".encode())
    return digest.hexdigest()[:12]


def checksum(tensor, piece: int = 1 << 22) -> int:
    """A whole number from all bits of a tensor, computed where the tensor lies.

    Every value is multiplied by an odd number of its own place, so that exchanged values change it too.
    """
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start, part in enumerate(tensor.contiguous().view(bits).flatten().split(piece)):
        places = torch.arange(len(part), device=tensor.device) + start * piece
        total += (part.long() * (places * 2654435761 | 1)).sum()  # whole numbers wrap, alike everywhere
    return total.item()


def prompt_key(prompt) -> str:
    """Twelve digits that change with the tokens, the embeddings and what is scored."""
    digest = hashlib.sha1()
    for name in ("input_ids", "inputs_embeds", "labels"):
        if name in prompt:
            digest.update(name.encode() + prompt[name].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def scan(
    model,
    prompts: list,
    modes=("v",),
    kinds=("l1_mean", "kl"),
    method="wavefront",
    batch_size=1,
    journal=None,
    resume=False,
) -> list[dict]:
    """Run `scan_batch` over all prompts; returns one record for each.

    journal: a .jsonl file that gets each batch's records as soon as they are known. resume: take the records
    that stand there already, if they are of this model and these settings; else UserError.
    """
    model.eval()
    variants = list_variants(model, modes)
    header = {
        "model": fingerprint(model),
        "modes": sorted({variant.mode for variant in variants}),
        "distances": list(kinds),
    }
    keys = [prompt_key(prompt) for prompt in prompts]  # a prompt that stands twice runs once and counts twice
    named = dict(zip(keys, prompts))
    known = read_journal(journal, header) if journal and resume and Path(journal).exists() else {}
    done = {key: known[key] for key in keys if key in known}
    if journal:  # without a cut last line and without prompts that are no longer asked for
        lines = [{**header, "prompts": len(keys)}, *(done[key] for key in keys if key in done)]
        atomic_write(journal, "".join(json.dumps(line) + "\n" for line in lines))
    waiting = [key for key in named if key not in done]
    for first in progress(range(0, len(waiting), batch_size), desc=f"{method} scan", unit="batch"):
        some = waiting[first : first + batch_size]
        found = scan_batch(model, [named[key] for key in some], variants, kinds, method)
        for key, record in zip(some, found):
            done[key] = {**record, "key": key}
            if journal:
                with open(journal, "a", encoding="utf-8") as file:
                    file.write((json.dumps(done[key]) + "\n") * keys.count(key))
    return [done[key] for key in keys]


def read_journal(path, header) -> dict:
    """{key: record} of an earlier scan; UserError if it scanned another model or asked for other things."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    try:
        before = json.loads(lines[0])
    except (IndexError, ValueError):
        return {}
    for field, value in header.items():
        if before.get(field) != value:
            raise UserError(
                f"{path}: was scanned with {field} {before.get(field)}, not {value}; use --overwrite or "
                "another --out"
            )
    whole = []
    for line in lines[1:]:
        with contextlib.suppress(ValueError):  # the last line may be cut
            whole.append(json.loads(line))
    return {record["key"]: record for record in whole}


def summarise(records) -> list[dict]:
    """Rows {mode, layer, head, distance, score_mean, score_std, prompt_count} over all prompts.

    score_std is the population's standard deviation, as upstream's.
    """
    values = defaultdict(list)
    for record in records:
        for variant in record["variants"]:
            for kind, value in variant.items():
                if kind == "nll":
                    kind, value = "nll_change", value - record["nll"]
                if kind not in ("mode", "layer", "head"):
                    values[variant["mode"], variant["layer"], variant["head"], kind].append(value)
        for layer, value in enumerate(record["block_influence"]):
            values["layer", layer, None, "block_influence"].append(value)
    rows = []
    for (mode, layer, head, kind), scores in values.items():
        scores = torch.tensor(scores, dtype=torch.float64)
        mean, std = scores.mean().item(), scores.std(unbiased=False).item()
        rows.append(dict(zip(COLUMNS, (mode, layer, head, kind, mean, std, len(scores)))))

    def order(row):
        return row["mode"], row["distance"], row["layer"], -1 if row["head"] is None else row["head"]

    return sorted(rows, key=order)


def layer_scores(rows, mode: str, distance: str) -> list[float]:
    """score_mean of each layer in order; for mode head the mean over the heads.

    A layer that has no such part, in a hybrid, gets infinity: it is never the least missed.
    """
    layers = 1 + max((row["layer"] for row in rows), default=-1)
    by_layer = defaultdict(list)
    for row in rows:
        if (row["mode"], row["distance"]) == (mode, distance):
            by_layer[row["layer"]].append(row["score_mean"])
    if not by_layer:
        raise UserError(
            f"the scan holds no {mode}/{distance}; run it with --mode {mode} --distance {distance}"
        )
    if lost := [layer for layer, values in by_layer.items() if any(map(math.isnan, values))]:
        raise UserError(
            f"{distance} of layer {lost[0]} with {mode} off is no number; scan again with --dtype float32"
        )
    return [sum(v) / len(v) if (v := by_layer.get(i)) else math.inf for i in range(layers)]


def ranking(rows) -> str:
    """The layers in the order in which choose_layers.py removes them unless told otherwise, in words."""
    change = layer_scores(rows, "layer", "nll_change")
    order = sorted(range(len(change)), key=change.__getitem__)
    shown = ", ".join(f"{layer} ({change[layer]:+.3f})" for layer in order[:12])
    return f"least missed, by the rise of the loss without each alone: {shown}" + (
        ", ..." if order[12:] else ""
    )


def draw(rows, path, title=""):
    """Bars of every measured mode and distance over the layers, with the standard deviation over prompts."""
    groups = defaultdict(list)
    for row in rows:
        if row["head"] is None:
            groups[row["mode"], row["distance"]].append(row)
    figure, axes = new_figure(
        math.ceil(len(groups) / 3), min(3, len(groups)), width=4.4, height=2.8, squeeze=False
    )
    for ax in axes.flat[len(groups) :]:
        ax.set_axis_off()
    for ax, ((mode, distance), group) in zip(axes.flat, groups.items()):
        mean, std = [r["score_mean"] for r in group], [r["score_std"] for r in group]
        down = std if min(mean) < 0 else [min(m, s) for m, s in zip(mean, std)]  # a distance is never below 0
        ax.bar([r["layer"] for r in group], mean, yerr=[down, std], capsize=2, ecolor="#5b6770")
        ax.set(title=f"{mode} off: {distance}" if distance != "block_influence" else distance, xlabel="layer")
        ax.locator_params(axis="x", integer=True)
    figure.suptitle(title)
    save_figure(figure, path)


def beside(out: Path, end: str) -> Path:
    """The file beside a table that is called as it is but for its end: scan.v1 and scan.v2 are two scans."""
    return out.with_name(out.name.removesuffix(".csv") + end)


def write_tables(out: Path, rows, mode: str, distance: str, title: str) -> list[dict]:
    """Write <out>.csv of one mode and distance with upstream's columns, <out>.all.csv and <out>.png of all.

    Returns the rows of the first.
    """
    chosen = [r for r in rows if (r["mode"], r["distance"]) == (mode, distance)]
    hidden = {"mode", "distance"} | ({"head"} if mode != "head" else set())
    atomic_csv(out, [{name: value for name, value in r.items() if name not in hidden} for r in chosen])
    atomic_csv(beside(out, ".all.csv"), rows)
    draw(rows, beside(out, ".png"), title)
    return chosen


def sanity_check(model, prompt, variants, kinds, method):
    """Print how far a lifted mask and `method` are from naive on one prompt; UserError where they differ."""
    prompt = {key: value[:, :64] if torch.is_tensor(value) else value for key, value in prompt.items()}
    batch = pad_prompts([prompt], next(model.parameters()).device)
    whole = decoder(model)(**batch, use_cache=False).last_hidden_state
    with masked(model, 0, variants[0].mode, variants[0].head):
        pass
    again = decoder(model)(**batch, use_cache=False).last_hidden_state
    some = [v for v in variants if v.layer in (0, len(decoder_layers(model)) - 1)]
    fast, naive = (scan_batch(model, [prompt], some, kinds, m)[0]["variants"] for m in (method, "naive"))
    worst = max(abs(a[k] - b[k]) / max(1, abs(b[k])) for a, b in zip(fast, naive) for k in kinds)
    change = (whole - again).abs().max().item()
    print(f"sanity check: mask lifted, largest change {change:.1e}; {method} against naive {worst:.1e}")
    if not torch.equal(whole, again) or not worst < (1e-4 if whole.dtype == torch.float32 else 5e-2):
        raise UserError(
            f"--method {method} does not reproduce the model's own forward pass; use --method naive"
        )


def main(args):
    modes = [plain_mode(mode) for mode in args.mode]
    journal = beside(args.out, ".records.jsonl")
    if journal.exists() and not (args.resume or args.overwrite):
        raise UserError(
            f"{journal}: a scan stands there; add --resume to go on with it or --overwrite to start again"
        )

    # the model, its prompts, and everything to switch off
    model, prompts = load_with_prompts(args)
    variants = list_variants(model, modes)
    layers = len(decoder_layers(model))
    print(f"{layers} layers, {len(prompts)} prompts, {len(variants)} variants, {args.method}")
    if args.sanity_check:
        with torch.no_grad():
            sanity_check(model, prompts[0], variants, args.distance, args.method)

    # the scan; its records are written as soon as they are known
    settings = (modes, args.distance, args.method, args.batch_size, journal, args.resume)
    try:
        records = scan(model, prompts, *settings)
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; what is scored stands in {journal}; to go on, run the same command with --resume"
        ) from None

    # tables and picture, and upstream's lines on the screen
    title = f"{args.model.name}: {len(prompts)} prompts"
    rows = summarise(records)
    for row in write_tables(args.out, rows, modes[0], args.distance[0], title):
        head = "" if row["head"] is None else f" head {row['head']:02d},"
        print(f"Layer {row['layer']:02d},{head} mean={row['score_mean']:.6f}, std={row['score_std']:.6f}")
    print(ranking(rows))
    print(f"wrote {args.out}, {beside(args.out, '.all.csv')}, {beside(args.out, '.png')}")


if __name__ == "__main__":
    run(main, parse_args())
