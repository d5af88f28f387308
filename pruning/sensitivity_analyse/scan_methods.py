"""What one batch of prompts tells about every layer, by three methods that agree.

    naive      1 + L full forward passes per prompt, through the model's own forward: the reference
    cached     the pass with layer i masked starts from the stored input of layer i: half the arithmetic
    wavefront  one pass; behind layer i the batch grows by the variant masked at i, so that a layer's weights
               are read once or twice per batch instead of L / 2 times

All work through hooks on the model's own modules: no architecture is written again.
"""

import contextlib
import math
from collections import defaultdict
from typing import NamedTuple

import torch
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from common.errors import UserError
from common.files import first_line, free_memory
from pruning.layers import (
    OUTPUT,
    child,
    decoder,
    decoder_layers,
    input_width,
    plain,
    query_heads,
    text_config,
)
from pruning.sensitivity_analyse.eval_metric import combine, position_distances
from pruning.sensitivity_analyse.layer_mask import (
    as_output,
    given,
    layer_input,
    masked,
    mixers,
    plain_mode,
    states_of,
    why_not,
)

METHODS = ("wavefront", "cached", "naive")
CHUNK = None  # log-probabilities held at once, in values; None: by the free memory
COPIES = 16  # bytes for each: its logit, itself and two that are made of it, in float32
ROOM = None  # bytes of a batch that grows, in one wavefront; None: by the free memory


class Variant(NamedTuple):
    """One thing to switch off: `mode` in decoder layer `layer`.

    head: which one, for mode "head"; for "window" how many layers, of which `layer` is the last, are left
    out together. None elsewhere.
    """

    mode: str
    layer: int
    head: int | None = None


def list_variants(model, modes) -> list[Variant]:
    """Everything to switch off for these modes; leaving out each whole layer is always among it.

    A layer without such a part, as in hybrids, is left out; UserError where no layer has one.
    """
    modes = list(dict.fromkeys([*map(plain_mode, modes), "layer"]))
    layers = range(len(decoder_layers(model)))
    reasons = {(layer, mode): why_not(model, layer, mode) for layer in layers for mode in modes}
    for mode in modes:
        if all(reasons[layer, mode] for layer in layers):
            raise UserError(f"--mode {mode}: {reasons[0, mode]}")
    return [
        Variant(mode, layer, head)
        for layer in layers
        for mode in modes
        if not reasons[layer, mode]
        for head in (range(query_heads(model, layer)[0]) if mode == "head" else [None])
    ]


@contextlib.contextmanager
def shortcut(model, layer_idx: int, mode: str, head, form):
    """As `masked`, but a layer whose attention is off does not compute any.

    With v masked, attention returns o_proj(0), bit for bit. form: what attention returned in this layer, a
    tensor or a tuple whose first element counts; None where it is not known.
    """
    branches = mixers(decoder_layers(model)[layer_idx])
    output = child(branches[0], OUTPUT) if branches else None
    simple = form is not None and len(branches) == 1 and (mode == "attention" or output is not None)
    if mode not in ("v", "qv", "attention") or not simple:
        with masked(model, layer_idx, mode, head):
            yield
        return
    states = states_of(form)
    constant = torch.zeros(1, 1, states.shape[-1], dtype=states.dtype, device=states.device)
    if mode != "attention":
        constant = output(torch.zeros(1, 1, input_width(output), dtype=states.dtype, device=states.device))

    def no_attention(*args, **kwargs):
        nothing = constant.expand(*layer_input(args, kwargs).shape[:-1], -1)
        if (residual := given(branches[0], "residual", args, kwargs)) is not None:
            nothing = nothing + residual
        return as_output(form, nothing)

    with patched(branches[0], no_attention):
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


def pad_prompts(prompts, device) -> dict:
    """Stack prompts (1, n) or (1, n, d) with zeros on the right.

    Attention is causal, so no mask is needed: no real position sees the padding, which is not scored.
    """
    key = "input_ids" if "input_ids" in prompts[0] else "inputs_embeds"
    tensors = [p[key][0].to(device) for p in prompts]
    return {key: torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)}


class DecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """What any model's head may look for behind its decoder: None for whatever else it hands on."""

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)


def apply_head(model, hidden_states: torch.Tensor) -> torch.Tensor:
    """Logits (..., V) of final hidden states (..., d), through the model's own head.

    Scaling and soft caps are included: the whole model runs, with a decoder that returns these states.
    """
    rows = hidden_states.reshape(1, -1, hidden_states.shape[-1])
    token = torch.zeros(1, 1, dtype=torch.long, device=rows.device)
    with patched(decoder(model), lambda *args, **kwargs: DecoderOutput(last_hidden_state=rows)):
        logits = model(input_ids=token, use_cache=False).logits
    return logits.reshape(*hidden_states.shape[:-1], logits.shape[-1])


def is_stream(part, states) -> bool:
    """Whether a part of a layer's output is a second state of each token, as that of Zaya's router is."""
    return torch.is_tensor(part) and part.is_floating_point() and part.shape[:-1] == states.shape[:-1]


class Baseline:
    """Hooks that watch the unmasked rows of a forward pass, which are the first ones.

    They collect block influence and the hidden states for the angles. lengths: real tokens of each row.
    keep_inputs: store what each layer is called with. variants: grow the batch behind each layer by its
    masked variants (the wavefront). split: end with the first rows alone, for a decoder that gives its output
    the shape of its input; the variants then wait in `grown`. one_row: see `fit_rows`.
    """

    def __init__(self, model, lengths, variants=(), keep_inputs=False, one_row=True, split=False):
        self.one_row = one_row
        self.split, self.grown, self.last_output, self.forms = split, None, None, {}
        self.model, self.lengths, self.rows = model, lengths, len(lengths)
        self.by_layer = defaultdict(list)
        for mode, layer, head in variants:
            self.by_layer[layer].append((mode, head))
        self.windows = any(variant[0] == "window" for variant in variants)
        self.entries = []  # what entered each layer, where windows end behind a later one
        self.keep_inputs, self.inputs = keep_inputs, []
        self.influence = [[] for _ in lengths]  # per prompt, one value a layer
        self.last_token = [[] for _ in lengths]  # per prompt, input of each layer and output of the last
        self.order = []  # variants in the order of the rows

    def __enter__(self):
        self.hooks = []
        self.layers = decoder_layers(self.model)
        for i, layer in enumerate(self.layers):
            self.hooks.append(layer.register_forward_pre_hook(self.fit_rows, with_kwargs=True))
            self.hooks.append(
                layer.register_forward_hook(lambda *call, i=i: self.after(i, *call), with_kwargs=True)
            )
            branches = mixers(layer)
            if self.by_layer[i] and len(branches) == 1 or self.keep_inputs and len(branches) == 1:
                hook = branches[0].register_forward_hook(lambda *call, i=i: self.note(i, call[-1]))
                self.hooks.append(hook)
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def note(self, i, output):
        """Remember what form the token mixer of layer `i` returns its states in."""
        self.forms[i] = output

    def fit_rows(self, layer, args, kwargs):
        """Make what was made for the first rows fit all: one row where all are equal, such as causal masks,
        else (and for a model that wants a mask for each row) the same rows again for every group."""
        groups = len(layer_input(args, kwargs)) // self.rows
        if groups == 1:
            return None

        def fit(value, name=""):
            if name == "position_bias":  # of each head (MPT), whatever the rows
                return value
            if torch.is_tensor(value) and name == "alibi":  # rows and heads in one axis
                return value.repeat(groups, *[1] * (value.dim() - 1))
            if torch.is_tensor(value) and value.dim() > 1 and len(value) == self.rows > self.one_row:
                if self.one_row and torch.equal(value, value[:1].expand_as(value)):
                    return value[:1]
                return value.repeat(groups, *[1] * (value.dim() - 1))
            return tuple(fit(v) for v in value) if isinstance(value, tuple) else value

        kept = {k: v if k == "hidden_states" else fit(v, k) for k, v in kwargs.items()}
        return (*args[:1], *map(fit, args[1:])), kept

    def after(self, i, layer, args, kwargs, output):
        """Watch layer `i`, and add its masked variants behind the rows that there are."""
        states = states_of(output)
        further = output[1:] if isinstance(output, (tuple, list)) else ()
        if states.dim() != 3 or any(is_stream(part, states) for part in further):
            raise UserError(
                f"{type(layer).__name__} works on several streams of hidden states at once; such models "
                "cannot be scanned"
            )
        x, y = layer_input(args, kwargs)[: self.rows], states[: self.rows]
        if self.keep_inputs:
            self.inputs.append(as_output(output, x))
        if self.windows:
            self.entries.append(x.clone())  # a view would keep the whole batch alive
        for p, n in enumerate(self.lengths):
            self.influence[p].append(
                1 - torch.cosine_similarity(x[p, :n].double(), y[p, :n].double(), dim=-1).mean().item()
            )
            if i == 0:
                self.last_token[p].append(x[p, n - 1].clone())  # a view would keep the whole batch alive
            self.last_token[p].append(y[p, n - 1].clone())
        grown = [states]
        for mode, head in self.by_layer[i]:
            if mode == "layer":
                grown.append(x)
            elif mode == "window":
                grown.append(self.entries[i - head + 1])
            else:
                total = len(states)
                own = {k: self.first_rows(v, total, k) for k, v in kwargs.items()}
                rest = [self.first_rows(v, total) for v in args[1:]]
                with shortcut(self.model, i, mode, head, self.forms.get(i)):  # .forward: no hook runs again
                    masked_output = layer.forward(*([x] if args else []), *rest, **own)
                grown.append(states_of(masked_output))
            self.order.append(Variant(mode, i, head))
        if self.split and i == len(self.layers) - 1:
            self.grown, self.last_output = torch.cat(grown)[self.rows :], output
            return as_output(output, y)
        return as_output(output, torch.cat(grown)) if len(grown) > 1 else None

    def first_rows(self, value, total: int, name: str = ""):
        """What `fit_rows` repeated up to `total` rows, for the first rows alone."""
        if name == "position_bias":
            return value
        if torch.is_tensor(value) and name == "alibi":
            return value[: len(value) // (total // self.rows)]
        if torch.is_tensor(value) and value.dim() > 1 and self.rows < total == len(value):
            return value[: self.rows]
        return tuple(self.first_rows(v, total) for v in value) if isinstance(value, tuple) else value

    def angles(self, prompt: int) -> list[list[float]]:
        """(L + 1, L + 1) angular distances in [0, 1] between the states before layers a and b, last token."""
        states = torch.nn.functional.normalize(torch.stack(self.last_token[prompt]).double(), dim=-1)
        return (torch.arccos((states @ states.T).clamp(-1, 1)) / math.pi).tolist()


def free_bytes(device) -> int:
    """An eighth of the free memory."""
    return (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()) // 8


def free_values(device) -> int:
    """How many log-probabilities may be held at once, with what is made of them.

    Every run of the output head reads all its weights, so that few large pieces beat many small ones; a
    vocabulary of 153,376 and 34 layers would need 70 runs for one prompt in pieces of 32 MB.
    """
    return CHUNK if CHUNK is not None else min(max(free_bytes(device) // COPIES, 1 << 23), 1 << 28)


def grouped(model, variants, tokens: int) -> list[list]:
    """The variants in groups whose rows of `tokens` tokens fit into memory together, in a layer's widest
    part: a mode with a variant for every head has thousands."""
    config = text_config(model)
    widths = [getattr(config, name, None) for name in ("intermediate_size", "hidden_size")]
    widest = max([width for width in widths if isinstance(width, int)], default=1 << 14)
    first = next(model.parameters())
    row = 4 * tokens * widest * first.itemsize  # about four such tensors live at a time
    most = max(1, (free_bytes(first.device) if ROOM is None else ROOM) // row)
    ordered = sorted(variants, key=lambda variant: variant.layer)
    return [ordered[start : start + most] for start in range(0, len(ordered), most)] or [[]]


class Scorer:
    """Compares final hidden states with the baseline's, as many log-probabilities at a time as fit.

    Memory does not grow with the prompts, the layers or a vocabulary of 153376.
    """

    def __init__(self, model, prompt, base_hidden, kinds):
        self.model, self.base, self.kinds = model, base_hidden, kinds
        labels = prompt.get("labels", prompt.get("input_ids"))[0].to(base_hidden.device)
        self.targets = torch.cat([labels[1:], labels.new_full((1,), -100)])  # what position t should predict

    @torch.no_grad()
    def __call__(self, hidden: torch.Tensor):
        """Score the final hidden states (K, N, d) of K variants.

        Returns K dictionaries of distances and nll, the baseline's nll, and the number of scored tokens.
        """
        head = self.model.get_output_embeddings()
        vocabulary = len(head.weight) if head is not None else apply_head(self.model, self.base[:1]).shape[-1]
        room = free_values(self.base.device) // vocabulary  # rows of log-probabilities
        positions = max(1, min(len(self.base), room // (1 + len(hidden)) or room // 2))
        group = max(1, room // positions - 1)
        self.values = {kind: torch.zeros(hidden.shape[:2]) for kind in self.kinds}
        self.nll, base_nll = torch.zeros(len(hidden)), 0.0
        scored = int((self.targets != -100).sum())
        for start in range(0, len(self.base), positions):
            part = slice(start, start + positions)
            target = self.targets[part]
            wanted, index = target != -100, target.clamp(min=0)[:, None]
            base = None
            for first in range(0, max(1, len(hidden)), group):
                states = hidden[first : first + group, part]
                if base is None:  # the baseline goes through the head with the first group
                    states = torch.cat([self.base[None, part], states])
                logprobs = apply_head(self.model, states).float().log_softmax(-1)
                if base is None:
                    base, logprobs = logprobs[0], logprobs[1:]
                    base_nll -= base.gather(-1, index)[wanted].sum().item()
                self.compare(base, logprobs, slice(first, first + len(logprobs)), part, wanted, index)
        scores = {kind: combine(v, kind).tolist() for kind, v in self.values.items()}
        scores["nll"] = (self.nll / max(scored, 1)).tolist()
        return (
            [{key: v[i] for key, v in scores.items()} for i in range(len(hidden))],
            base_nll / max(scored, 1),
            scored,
        )

    def compare(self, base, logprobs, some, part, wanted, index):
        """Add what the log-probabilities (k, n, V) of some variants say at some positions to the sums."""
        picked = logprobs.gather(-1, index.expand(len(logprobs), -1, 1)).squeeze(-1)
        self.nll[some] -= (picked * wanted).sum(-1).cpu()
        for kind in self.kinds:
            rows = [position_distances(base, one, kind) for one in logprobs]  # one variant stays in the cache
            if rows:
                self.values[kind][some, part] = torch.stack(rows).cpu()


@torch.no_grad()
def scan_batch(model, prompts, variants, kinds, method="wavefront") -> list[dict]:
    """Scores of a batch of prompts {name, input_ids (1, n) or inputs_embeds (1, n, d), and perhaps labels}.

    Returns a record for each prompt: name, tokens, nll (per scored token), scored, block_influence (L,),
    angles (L+1, L+1) and variants: [{mode, layer, head, <distance> ..., nll}].
    """
    model, variants = plain(model), [Variant(*variant) for variant in variants]
    if method != "naive" and getattr(text_config(model), "num_kv_shared_layers", 0):
        raise UserError(
            f"--method {method}: layers of {type(model).__name__} share keys and values; use --method naive"
        )
    batch = pad_prompts(prompts, next(model.parameters()).device)
    lengths = [p["input_ids" if "input_ids" in p else "inputs_embeds"].shape[1] for p in prompts]
    if getattr(text_config(model), "index_topk", None) and len(set(lengths)) > 1:
        raise UserError(
            f"{type(model).__name__} chooses the tokens that it attends to by the length of the prompt, so "
            "that padding would matter; use --batch-size 1"
        )
    records = []
    for group in grouped(model, variants, len(prompts) * max(lengths)):
        # the pass without masks, which the wavefront extends by the masked variants
        grown = group if method == "wavefront" else ()
        hidden, watch = watched_pass(model, batch, lengths, grown, method == "cached")
        masked_hidden = hidden.unflatten(0, (-1, len(prompts)))[1:]  # (variants, rows, N, d)
        if method != "wavefront" and group:
            stored = watch.inputs or [None] * len(decoder_layers(model))
            passes = [masked_pass(model, batch, variant, stored, watch.forms) for variant in group]
            masked_hidden = torch.stack(passes)

        # the scores of both
        for p, prompt in enumerate(prompts):
            n = lengths[p]
            results, nll, scored = Scorer(model, prompt, hidden[p, :n], kinds)(masked_hidden[:, p, :n])
            if len(records) < len(prompts):
                records.append({"name": prompt["name"], "tokens": n, "nll": nll, "scored": scored})
                records[p] |= {"block_influence": watch.influence[p], "angles": watch.angles(p)}
            order = watch.order if method == "wavefront" else group
            named = [{**v._asdict(), **result} for v, result in zip(order, results)]
            records[p].setdefault("variants", []).extend(named)
    return records


def watched_pass(model, batch, lengths, variants, keep_inputs) -> tuple:
    """(final hidden states (rows * (1 + variants), N, d), the `Baseline` that watched the pass)."""
    whole, split = {"one_row": True}, {"one_row": False, "split": True}
    for options in (whole, {"one_row": False}, split) if variants else (whole,):
        try:
            with Baseline(model, lengths, variants, keep_inputs, **options) as watch:
                hidden = decoder(model)(**batch, use_cache=False).last_hidden_state
            break
        except Exception as error:
            # some want a mask for every row, some give their output the shape of their input
            if not variants or isinstance(error, (UserError, torch.OutOfMemoryError)):
                raise
            if options is split:
                raise UserError(
                    f"--method wavefront: {type(plain(model)).__name__} takes no rows beside those of its "
                    f"prompts ({first_line(error)}); use --method cached or naive"
                ) from error
    if not variants or watch.grown is None:
        return hidden, watch

    # each group once more through what follows the layers
    parts = [final_states(model, batch, s, watch.last_output) for s in watch.grown.split(len(lengths))]
    return torch.cat([hidden, *parts]), watch


def final_states(model, batch, states, form) -> torch.Tensor:
    """What a decoder makes of the states (rows, N, d) behind its last layer, which returns them as `form`."""
    with contextlib.ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.enter_context(patched(layer, lambda *args, **kwargs: as_output(form, states)))
        return decoder(model)(**batch, use_cache=False).last_hidden_state


def masked_pass(model, batch, variant, stored, forms) -> torch.Tensor:
    """Final hidden states (rows, N, d) of a padded batch with one part off.

    stored: what each layer returns when it is passed by, its input (rows, N, d); None where nothing was kept.
    That spares the layers before. forms: of `Baseline`.
    """
    mode, layer, head = variant
    inputs = stored[layer]
    with contextlib.ExitStack() as stack:
        if inputs is None:
            stack.enter_context(masked(model, layer, mode, head))
        else:
            before = decoder_layers(model)[: layer + (mode == "layer")]
            for passed in before:
                stack.enter_context(patched(passed, lambda *args, **kwargs: inputs))
            if mode != "layer":
                stack.enter_context(shortcut(model, layer, mode, head, forms.get(layer)))
        return decoder(model)(**batch, use_cache=False).last_hidden_state
