"""Which layers of a language model matter: switch each one off and measure how far the output moves.

    python pruning/sensitivity_analyse/layer_sensitivity_scan.py --model path/to/hf_folder --mode v_only --out layer_sensitivity.csv

One pass also yields block influence (ShortGPT, arXiv 2403.03853), the angular distance of every window of layers
(arXiv 2403.17887) and, for each layer left out, the distance and the change of the loss. Upstream:
sensitivity-analyse/layer_sensitivity_scan.py, which runs the whole model once per layer and prompt (`--method naive`).

    naive      1 + L full forward passes per prompt, through the model's own forward: the reference
    cached     the pass with layer i masked starts from the stored input of layer i: half the arithmetic
    wavefront  one pass; behind layer i the batch grows by the variant masked at i, so that a layer's weights are read once or
               twice per batch instead of L / 2 times
"""
import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root: every way of starting this file finds it
from common.checkpoint import atomic_write
from common.errors import Interrupted, UserError, run
from common.figures import new_figure, save_figure
from common.run import progress
from pruning.layers import ATTENTION, OUTPUT, child, decoder_layers, head_counts, plain
from pruning.sensitivity_analyse.eval_metric import DISTANCES, combine, position_distances
from pruning.sensitivity_analyse.layer_mask import MODES, masked, plain_mode
from pruning.sensitivity_analyse.load_model import builtin_prompts, load_model, read_prompts

COLUMNS = ["mode", "layer", "head", "distance", "score_mean", "score_std", "prompt_count"]
METHODS = ("wavefront", "cached", "naive")
CHUNK = 1 << 23                                           # log-probabilities held at once, in values


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True, help="causal LM: a folder that from_pretrained loads, or a dia_pangu "
                                                             "checkpoint folder")
    p.add_argument("--out", type=Path, default=Path("layer_sensitivity.csv"),
                   help="csv of the first mode and distance; all others, records and picture beside it")
    p.add_argument("--mode", nargs="+", default=["v_only"], help=f"what to switch off: {', '.join(MODES)} (upstream: v_only, qv)")
    p.add_argument("--distance", nargs="+", default=["l1_mean", "kl"], choices=DISTANCES,
                   help="default l1_mean and kl; the first goes to --out")
    p.add_argument("--method", choices=METHODS, default="wavefront")
    add_prompt_args(p)
    p.add_argument("--batch-size", type=int, default=1, help="prompts run together, right-padded (default 1; raise it on an "
                                                             "accelerator, and for --method cached)")
    p.add_argument("--sanity_check", action="store_true", help="first check that a lifted mask changes nothing and that the "
                                                               "method equals naive")
    p.add_argument("--resume", action="store_true", help="go on with an interrupted scan: prompts already scored are not run "
                                                         "again")
    p.add_argument("--overwrite", action="store_true", help="start again although --out exists")
    return p.parse_args(argv)


def add_prompt_args(p):
    """What to run through the model; the same for the scan and for choosing by measured loss."""
    p.add_argument("--prompts", type=Path, help="text file, one prompt a line, or .jsonl with the field text; default: 18 built-in "
                   "ones, a third each English, Chinese and radiology")
    p.add_argument("--task-data", type=Path, help="dia_pangu data folder: task prompts with the volume's embeddings and the report; "
                   "--model is then a dia_pangu checkpoint")
    p.add_argument("--lang-model-path", type=Path, help="with --task-data: folder with the language model's config and tokenizer")
    p.add_argument("--task-samples", type=int, default=16, help="training samples used as task prompts (default 16)")
    p.add_argument("--max-tokens", type=int, default=512, help="prompts are cut to this many tokens (default 512)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="weights' type; default as stored")
    p.add_argument("--trust-remote-code", action="store_true", help="allow code inside the model folder to run")


def load_with_prompts(args) -> tuple:
    """(model, tokenizer, prompts) that `add_prompt_args` and --model asked for. A prompt is a dict with name, input_ids or
    inputs_embeds, and labels for task prompts."""
    if args.max_tokens < 2 or args.task_samples < 1:
        raise UserError("--max-tokens needs at least 2, --task-samples at least 1")
    if args.task_data:
        from pruning.report_model import Encoded, load_report_model, task_prompts  # dia_pangu, needed only here
        if not args.lang_model_path:
            raise UserError("--task-data needs --lang-model-path: the folder with the language model's config and tokenizer")
        report_model, text, config = load_report_model(args.model, args.lang_model_path)
        report_model = report_model.to(Accelerator().device)
        samples = Encoded(report_model, text, config, args.task_data, "train", args.task_samples)
        return report_model.lang_model, text.tokenizer, list(task_prompts(report_model, text, samples))
    model, tokenizer = load_model(args.model, args.dtype, args.trust_remote_code)
    texts = read_prompts(args.prompts) if args.prompts else builtin_prompts()
    return model.to(Accelerator().device), tokenizer, text_prompts(texts, tokenizer, args.max_tokens)


def text_prompts(texts, tokenizer, max_tokens: int = 512) -> list[dict]:
    prompts = [{"name": text, "input_ids": torch.tensor([tokenizer(text).input_ids[:max_tokens]])} for text in texts]
    if short := [p["name"] for p in prompts if p["input_ids"].shape[1] < 2]:
        raise UserError(f"prompt {short[0]!r} has fewer than 2 tokens; remove it")
    return prompts


# ------------------------------------------------------------------------------------------------ variants

def list_variants(model, modes) -> list[tuple]:
    """(mode, layer, head) for everything to switch off; head is None but for mode "head". Leave-one-out is always in."""
    heads = range(head_counts(model)[0])
    modes = list(dict.fromkeys([*map(plain_mode, modes), "layer"]))
    return [(mode, layer, head) for layer in range(len(decoder_layers(model))) for mode in modes
            for head in (heads if mode == "head" else [None])]


@contextlib.contextmanager
def shortcut(model, layer_idx: int, mode: str, head=None):
    """As `masked`, but a layer without attention does not compute any: with v masked it returns o_proj(0), bit for bit."""
    if mode not in ("v", "qv", "attention"):
        with masked(model, layer_idx, mode, head):
            yield
        return
    attention = child(decoder_layers(model)[layer_idx], ATTENTION)
    output = child(attention, OUTPUT)
    weight = next(output.parameters())
    constant = output(torch.zeros(1, 1, head_counts(model)[0] * head_counts(model)[2], dtype=weight.dtype, device=weight.device))
    if mode == "attention":
        constant = torch.zeros_like(constant)

    def no_attention(hidden_states, *args, **kwargs):
        return constant.expand(*hidden_states.shape[:-1], -1), None
    with patched(attention, no_attention):
        yield


@contextlib.contextmanager
def patched(module, forward):
    """`module.forward = forward` for the length of the block."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


# ------------------------------------------------------------------------------------------------ one batch of prompts

def pad_prompts(prompts, device) -> dict:
    """Stack prompts (1, n) or (1, n, d) with zeros on the right. Attention is causal, so no mask is needed: the real
    positions never see the padding, and the rest is not scored."""
    key = "input_ids" if "input_ids" in prompts[0] else "inputs_embeds"
    tensors = [p[key][0].to(device) for p in prompts]
    return {key: torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)}


def apply_head(model, hidden_states: torch.Tensor) -> torch.Tensor:
    """Logits (..., V) of final hidden states (..., d), through the model's own head (scaling and soft caps included)."""
    rows = hidden_states.reshape(1, -1, hidden_states.shape[-1])
    with patched(model.get_decoder(), lambda *args, **kwargs: BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=rows)):
        logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=rows.device), use_cache=False).logits
    return logits.reshape(*hidden_states.shape[:-1], -1)


class Baseline:
    """Hooks that watch the unmasked rows of a forward pass: layer inputs, block influence, hidden states for the angles.

    rows: number of unmasked rows, the first ones. lengths: real tokens of each. keep_inputs: store what each layer is
    called with. variants: grow the batch behind each layer (the wavefront).
    """

    def __init__(self, model, lengths, variants=(), keep_inputs=False):
        self.model, self.lengths, self.rows = model, lengths, len(lengths)
        self.by_layer = defaultdict(list)
        for mode, layer, head in variants:
            self.by_layer[layer].append((mode, head))
        self.keep_inputs, self.inputs = keep_inputs, []
        self.influence = [[] for _ in lengths]            # per prompt, one value a layer
        # per prompt, input of each layer and output of the last, at the last token
        self.last_token = [[] for _ in lengths]
        self.order = []                                   # variants in the order of the rows

    def __enter__(self):
        self.hooks = []
        for i, layer in enumerate(decoder_layers(self.model)):
            self.hooks.append(layer.register_forward_pre_hook(self.fit_masks, with_kwargs=True))
            self.hooks.append(layer.register_forward_hook(lambda *call, i=i: self.after(i, *call), with_kwargs=True))
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def fit_masks(self, layer, args, kwargs):
        """All rows have the same causal mask; it was made for the first batch, so keep one row and let it broadcast."""
        def one_row(value):
            if torch.is_tensor(value) and value.dim() > 1 and self.rows > 1 and len(value) == self.rows:
                return value[:1]
            return tuple(one_row(v) for v in value) if isinstance(value, tuple) else value
        return (args[0], *map(one_row, args[1:])), {k: one_row(v) for k, v in kwargs.items()}

    def after(self, i, layer, args, kwargs, output):
        x, y = args[0][:self.rows], output[:self.rows]
        if self.keep_inputs:
            self.inputs.append(x)
        for p, n in enumerate(self.lengths):
            self.influence[p].append(1 - torch.cosine_similarity(x[p, :n].double(), y[p, :n].double(), dim=-1).mean().item())
            if i == 0:
                self.last_token[p].append(x[p, n - 1].clone())     # a view would keep the whole batch alive
            self.last_token[p].append(y[p, n - 1].clone())
        grown = [output]
        for mode, head in self.by_layer[i]:
            if mode == "layer":
                grown.append(x)
            else:
                with shortcut(self.model, i, mode, head):
                    grown.append(layer.forward(x, *args[1:], **kwargs))     # .forward: the hooks do not run again
            self.order.append((mode, i, head))
        return torch.cat(grown) if len(grown) > 1 else None

    def angles(self, prompt: int) -> list[list[float]]:
        """Angular distance in [0, 1] between the hidden states before layers a and b at the last token, (L + 1, L + 1)."""
        states = torch.nn.functional.normalize(torch.stack(self.last_token[prompt]).double(), dim=-1)
        return (torch.arccos((states @ states.T).clamp(-1, 1)) / math.pi).tolist()


class Scorer:
    """Compares final hidden states with the baseline's, `CHUNK` log-probabilities at a time, so that memory does not
    grow with prompts, layers or a vocabulary of 153376."""

    def __init__(self, model, prompt, base_hidden, kinds):
        self.model, self.base, self.kinds = model, base_hidden, kinds
        labels = prompt.get("labels", prompt.get("input_ids"))[0].to(base_hidden.device)
        self.targets = torch.cat([labels[1:], labels.new_full((1,), -100)])     # what position t should predict

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor):
        """hidden (K, N, d) of K variants -> K dictionaries of distances and nll, the baseline's nll, number of scored tokens."""
        vocabulary = apply_head(self.model, self.base[:1]).shape[-1]
        positions = max(1, min(len(self.base), CHUNK // vocabulary))
        group = max(1, CHUNK // (vocabulary * positions))
        values = {kind: torch.zeros(hidden.shape[:2]) for kind in self.kinds}
        nll, base_nll, scored = torch.zeros(len(hidden)), 0.0, int((self.targets != -100).sum())
        for start in range(0, len(self.base), positions):
            part = slice(start, start + positions)
            base = apply_head(self.model, self.base[part]).float().log_softmax(-1)
            target = self.targets[part]
            wanted, index = target != -100, target.clamp(min=0)[:, None]
            base_nll -= base.gather(-1, index)[wanted].sum().item()
            for first in range(0, len(hidden), group):
                some = slice(first, first + group)
                logprobs = apply_head(self.model, hidden[some, part]).float().log_softmax(-1)
                picked = logprobs.gather(-1, index.expand(len(logprobs), -1, 1)).squeeze(-1)
                nll[some] -= (picked * wanted).sum(-1).cpu()
                for kind in self.kinds:
                    values[kind][some, part] = position_distances(base, logprobs, kind).cpu()
        scores = {kind: combine(v, kind).tolist() for kind, v in values.items()}
        scores["nll"] = (nll / max(scored, 1)).tolist()
        return [{key: v[i] for key, v in scores.items()} for i in range(len(hidden))], base_nll / max(scored, 1), scored


@torch.no_grad()
def scan_batch(model, prompts, variants, kinds, method="wavefront") -> list[dict]:
    """Scores of a batch of prompts (dicts with name, input_ids (1, n) or inputs_embeds (1, n, d), and optional labels).

    Returns a record for each prompt: name, tokens, nll (per scored token), scored, block_influence (L,), angles
    (L+1, L+1) and variants: [{mode, layer, head, <distance> ..., nll}].
    """
    model = plain(model)
    device = next(model.parameters()).device
    batch = pad_prompts(prompts, device)
    lengths = [p["input_ids" if "input_ids" in p else "inputs_embeds"].shape[1] for p in prompts]
    rows = len(prompts)
    with Baseline(model, lengths, variants if method == "wavefront" else (), keep_inputs=method == "cached") as watch:
        hidden = model.get_decoder()(**batch, use_cache=False).last_hidden_state   # (rows * (1 + variants), N, d)
    if method == "wavefront":
        order, masked_hidden = watch.order, hidden.unflatten(0, (-1, rows))[1:]               # (variants, rows, N, d)
    else:
        order, stored = variants, watch.inputs or [None] * len(decoder_layers(model))
        masked_hidden = torch.stack([masked_pass(model, batch, mode, i, head, stored[i]) for mode, i, head in variants])
    records = []
    for p, prompt in enumerate(prompts):
        n = lengths[p]
        results, nll, scored = Scorer(model, prompt, hidden[p, :n], kinds)(masked_hidden[:, p, :n])
        records.append({
            "name": prompt["name"], "tokens": n, "nll": nll, "scored": scored, "block_influence": watch.influence[p],
            "angles": watch.angles(p),
            "variants": [{"mode": m, "layer": i, "head": h, **r} for (m, i, h), r in zip(order, results)],
        })
    return records


def masked_pass(model, batch, mode, layer, head, inputs=None) -> torch.Tensor:
    """Final hidden states (rows, N, d) of a padded batch with one part off; `inputs` (rows, N, d) of that layer spares the layers
    before it."""
    with contextlib.ExitStack() as stack:
        if inputs is None:
            stack.enter_context(masked(model, layer, mode, head))
        else:
            for before in decoder_layers(model)[:layer]:
                stack.enter_context(patched(before, lambda hidden_states, *args, **kwargs: inputs))
            if mode == "layer":
                stack.enter_context(patched(decoder_layers(model)[layer], lambda hidden_states, *args, **kwargs: inputs))
            else:
                stack.enter_context(shortcut(model, layer, mode, head))
        return model.get_decoder()(**batch, use_cache=False).last_hidden_state


# ------------------------------------------------------------------------------------------------ many prompts

def fingerprint(model) -> str:
    """Twelve digits that change with the architecture and with the weights (a few values of every tensor)."""
    digest = hashlib.sha1(json.dumps(plain(model).config.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in plain(model).named_parameters():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.flatten()[:8].tolist()}".encode())
    return digest.hexdigest()[:12]


def prompt_key(prompt) -> str:
    tensor = prompt["input_ids"] if "input_ids" in prompt else prompt["inputs_embeds"]
    labels = prompt["labels"].tolist() if "labels" in prompt else ""
    return hashlib.sha1(f"{tensor.tolist()}{labels}".encode()).hexdigest()[:12]


def scan(model, prompts, modes=("v",), kinds=("l1_mean", "kl"), method="wavefront", batch_size=1, journal=None,
         resume=False) -> list[dict]:
    """`scan_batch` over all prompts (an iterable). journal: a .jsonl path that gets each prompt's record as soon as it is known;
    with `resume`, records that stand there already are taken from it, if it belongs to this model and these settings."""
    model.eval()
    variants = list_variants(model, modes)
    header = {"model": fingerprint(model), "modes": sorted({v[0] for v in variants}), "distances": list(kinds)}
    done = {}
    if journal and resume and Path(journal).exists():
        done = read_journal(journal, header)
    if journal:
        atomic_write(journal, "".join(json.dumps(line) + "\n" for line in [header, *done.values()]))   # drops a cut last line
    records, waiting = [], []

    def flush():
        if not waiting:
            return
        for (key, _), record in zip(waiting, scan_batch(model, [p for _, p in waiting], variants, kinds, method)):
            record["key"] = key
            records.append(record)
            if journal:
                with open(journal, "a") as file:
                    file.write(json.dumps(record) + "\n")
        waiting.clear()
    for prompt in progress(prompts, desc=f"{method} scan", unit="prompt"):
        key = prompt_key(prompt)
        if key in done:
            records.append(done[key])
            continue
        if waiting and ("input_ids" in waiting[0][1]) != ("input_ids" in prompt):
            flush()
        waiting.append((key, prompt))
        if len(waiting) == batch_size:
            flush()
    flush()
    return records


def read_journal(path, header) -> dict:
    """{key: record} of an earlier scan; UserError if it scanned another model or asked for other things."""
    lines = Path(path).read_text().splitlines()
    try:
        before = json.loads(lines[0])
    except (IndexError, ValueError):
        return {}
    for field, value in header.items():
        if before.get(field) != value:
            raise UserError(f"{path}: was scanned with {field} {before.get(field)}, not {value}; use --overwrite or another "
                            f"--out")
    whole = []
    for line in lines[1:]:
        with contextlib.suppress(ValueError):             # the last line may be cut
            whole.append(json.loads(line))
    return {record["key"]: record for record in whole}


def summarise(records) -> list[dict]:
    """Rows {mode, layer, head, distance, score_mean, score_std, prompt_count}; std is the population's, as upstream."""
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
        rows.append({"mode": mode, "layer": layer, "head": head, "distance": kind, "score_mean": scores.mean().item(),
                     "score_std": scores.std(unbiased=False).item(), "prompt_count": len(scores)})
    return sorted(rows, key=lambda r: (r["mode"], r["distance"], r["layer"], -1 if r["head"] is None else r["head"]))


def layer_scores(rows, mode: str, distance: str) -> list[float]:
    """score_mean of each layer in order; for mode head the mean over the heads."""
    by_layer = defaultdict(list)
    for row in rows:
        if (row["mode"], row["distance"]) == (mode, distance):
            by_layer[row["layer"]].append(row["score_mean"])
    if not by_layer:
        raise UserError(f"the scan holds no {mode}/{distance}; run it with --mode {mode} --distance {distance}")
    return [sum(v) / len(v) for _, v in sorted(by_layer.items())]


def write_csv(path, rows, columns):
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue())


def draw(rows, path, title=""):
    """Bars of every measured mode and distance over the layers, with the standard deviation over prompts."""
    groups = defaultdict(list)
    for row in rows:
        if row["head"] is None:
            groups[row["mode"], row["distance"]].append(row)
    figure, axes = new_figure(math.ceil(len(groups) / 3), min(3, len(groups)), width=4.4, height=2.8, squeeze=False)
    for ax in axes.flat[len(groups):]:
        ax.set_axis_off()
    for ax, ((mode, distance), group) in zip(axes.flat, groups.items()):
        mean, std = [r["score_mean"] for r in group], [r["score_std"] for r in group]
        ax.bar([r["layer"] for r in group], mean, yerr=[[min(s, max(m, 0)) for m, s in zip(mean, std)], std], capsize=2,
               ecolor="#5b6770")
        ax.set(title=f"{mode} off: {distance}" if distance != "block_influence" else distance, xlabel="layer")
    figure.suptitle(title)
    save_figure(figure, path)


def sanity_check(model, prompt, variants, kinds, method):
    """Print the distance with a lifted mask (0) and the largest difference between `method` and naive on one prompt."""
    prompt = {key: value[:, :64] if torch.is_tensor(value) else value for key, value in prompt.items()}
    batch = pad_prompts([prompt], next(model.parameters()).device)
    whole = plain(model).get_decoder()(**batch, use_cache=False).last_hidden_state
    with masked(model, 0, variants[0][0], variants[0][2]):
        pass
    again = plain(model).get_decoder()(**batch, use_cache=False).last_hidden_state
    some = [v for v in variants if v[1] in (0, len(decoder_layers(model)) - 1)]
    fast, naive = (scan_batch(model, [prompt], some, kinds, m)[0]["variants"] for m in (method, "naive"))
    worst = max(abs(a[k] - b[k]) / max(1, abs(b[k])) for a, b in zip(fast, naive) for k in kinds)
    print(f"sanity check: mask lifted, largest change {(whole - again).abs().max().item():.1e}; {method} against naive "
          f"{worst:.1e}")
    if not torch.equal(whole, again) or not worst < (1e-4 if whole.dtype == torch.float32 else 5e-2):
        raise UserError(f"--method {method} does not reproduce the model's own forward pass; use --method naive")


def main(args):
    modes = [plain_mode(mode) for mode in args.mode]
    journal = args.out.with_suffix(".records.jsonl")
    if args.batch_size < 1:
        raise UserError("--batch-size needs at least 1")
    if journal.exists() and not (args.resume or args.overwrite):
        raise UserError(f"{journal}: a scan stands there; add --resume to go on with it or --overwrite to start again")
    model, _, prompts = load_with_prompts(args)
    variants = list_variants(model, modes)
    print(f"{len(decoder_layers(model))} layers, {len(prompts)} prompts, {len(variants)} variants, {args.method}")
    if args.sanity_check:
        with torch.no_grad():
            sanity_check(model, prompts[0], variants, args.distance, args.method)
    try:
        records = scan(model, prompts, modes, args.distance, args.method, args.batch_size, journal, args.resume)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; what is scored stands in {journal}; to go on, run the same command with --resume") from None
    rows = summarise(records)
    chosen = [r for r in rows if (r["mode"], r["distance"]) == (modes[0], args.distance[0])]
    for row in chosen:
        head = "" if row["head"] is None else f" head {row['head']:02d},"
        print(f"Layer {row['layer']:02d},{head} mean={row['score_mean']:.6f}, std={row['score_std']:.6f}")
    columns = ["layer", *(["head"] if modes[0] == "head" else []), "score_mean", "score_std", "prompt_count"]
    write_csv(args.out, chosen, columns)
    write_csv(args.out.with_suffix(".all.csv"), rows, COLUMNS)
    draw(rows, args.out.with_suffix(".png"), f"{Path(args.model).name}: {len(prompts)} prompts")
    print(f"wrote {args.out}, {args.out.with_suffix('.all.csv')}, {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    run(main, parse_args())
