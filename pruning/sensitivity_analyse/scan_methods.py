"""What one batch of prompts tells about every layer, by three methods that agree.

    naive      1 + L full forward passes per prompt, through the model's own forward: the reference
    cached     the pass with layer i masked starts from the stored input of layer i: half the arithmetic
    wavefront  one pass; behind layer i the batch grows by the variant masked at i, so that a layer's weights
               are read once or twice per batch instead of L / 2 times

All work through hooks on the model's own modules: no architecture is written again.
"""

import contextlib
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.errors import UserError
from pruning.layers import ATTENTION, OUTPUT, child, decoder_layers, head_counts, plain
from pruning.sensitivity_analyse.eval_metric import combine, position_distances
from pruning.sensitivity_analyse.layer_mask import masked, plain_mode

METHODS = ("wavefront", "cached", "naive")
CHUNK = 1 << 23  # log-probabilities held at once, in values


class Variant(NamedTuple):
    """One thing to switch off: `mode` in decoder layer `layer`; head is None but for mode "head"."""

    mode: str
    layer: int
    head: int | None = None


def list_variants(model, modes) -> list[Variant]:
    """Everything to switch off for these modes; leaving out each whole layer is always among it."""
    heads = range(head_counts(model)[0])
    modes = list(dict.fromkeys([*map(plain_mode, modes), "layer"]))
    return [
        Variant(mode, layer, head)
        for layer in range(len(decoder_layers(model)))
        for mode in modes
        for head in (heads if mode == "head" else [None])
    ]


@contextlib.contextmanager
def shortcut(model, layer_idx: int, mode: str, head=None):
    """As `masked`, but a layer whose attention is off does not compute any.

    With v masked, attention returns o_proj(0), bit for bit.
    """
    if mode not in ("v", "qv", "attention"):
        with masked(model, layer_idx, mode, head):
            yield
        return
    attention = child(decoder_layers(model)[layer_idx], ATTENTION)
    output = child(attention, OUTPUT)
    weight = next(output.parameters())
    heads, _, head_dim = head_counts(model)
    constant = output(torch.zeros(1, 1, heads * head_dim, dtype=weight.dtype, device=weight.device))
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


def pad_prompts(prompts, device) -> dict:
    """Stack prompts (1, n) or (1, n, d) with zeros on the right.

    Attention is causal, so no mask is needed: the real positions never see the padding, and the rest is not
    scored.
    """
    key = "input_ids" if "input_ids" in prompts[0] else "inputs_embeds"
    tensors = [p[key][0].to(device) for p in prompts]
    return {key: torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)}


@dataclass
class DecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """What any model's head may look for behind its decoder; mixtures of experts want router_logits too."""

    router_logits: tuple | None = None


def apply_head(model, hidden_states: torch.Tensor) -> torch.Tensor:
    """Logits (..., V) of final hidden states (..., d), through the model's own head.

    Scaling and soft caps are included: the whole model runs, with a decoder that returns these states.
    """
    rows = hidden_states.reshape(1, -1, hidden_states.shape[-1])
    token = torch.zeros(1, 1, dtype=torch.long, device=rows.device)
    with patched(model.get_decoder(), lambda *args, **kwargs: DecoderOutput(last_hidden_state=rows)):
        logits = model(input_ids=token, use_cache=False).logits
    return logits.reshape(*hidden_states.shape[:-1], -1)


class Baseline:
    """Hooks that watch the unmasked rows of a forward pass, which are the first ones.

    They collect block influence and the hidden states for the angles. lengths: real tokens of each row.
    keep_inputs: store what each layer is called with. variants: grow the batch behind each layer by its
    masked variants (the wavefront).
    """

    def __init__(self, model, lengths, variants=(), keep_inputs=False):
        self.model, self.lengths, self.rows = model, lengths, len(lengths)
        self.by_layer = defaultdict(list)
        for mode, layer, head in variants:
            self.by_layer[layer].append((mode, head))
        self.keep_inputs, self.inputs = keep_inputs, []
        self.influence = [[] for _ in lengths]  # per prompt, one value a layer
        self.last_token = [[] for _ in lengths]  # per prompt, input of each layer and output of the last
        self.order = []  # variants in the order of the rows

    def __enter__(self):
        self.hooks = []
        for i, layer in enumerate(decoder_layers(self.model)):
            self.hooks.append(layer.register_forward_pre_hook(self.fit_masks, with_kwargs=True))
            self.hooks.append(
                layer.register_forward_hook(lambda *call, i=i: self.after(i, *call), with_kwargs=True)
            )
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def fit_masks(self, layer, args, kwargs):
        """Keep one row of each mask: it was made for the first rows, and is the same causal mask for all."""

        def one_row(value):
            if torch.is_tensor(value) and value.dim() > 1 and self.rows > 1 and len(value) == self.rows:
                return value[:1]
            return tuple(one_row(v) for v in value) if isinstance(value, tuple) else value

        return (args[0], *map(one_row, args[1:])), {k: one_row(v) for k, v in kwargs.items()}

    def after(self, i, layer, args, kwargs, output):
        """Watch layer `i`, and add its masked variants behind the rows that there are."""
        if not torch.is_tensor(output):
            raise UserError(
                f"{type(layer).__name__} returns more than its hidden states; such models cannot be scanned"
            )
        x, y = args[0][: self.rows], output[: self.rows]
        if self.keep_inputs:
            self.inputs.append(x)
        for p, n in enumerate(self.lengths):
            self.influence[p].append(
                1 - torch.cosine_similarity(x[p, :n].double(), y[p, :n].double(), dim=-1).mean().item()
            )
            if i == 0:
                self.last_token[p].append(x[p, n - 1].clone())  # a view would keep the whole batch alive
            self.last_token[p].append(y[p, n - 1].clone())
        grown = [output]
        for mode, head in self.by_layer[i]:
            if mode == "layer":
                grown.append(x)
            else:
                with shortcut(self.model, i, mode, head):  # .forward: the hooks do not run again
                    grown.append(layer.forward(x, *args[1:], **kwargs))
            self.order.append(Variant(mode, i, head))
        return torch.cat(grown) if len(grown) > 1 else None

    def angles(self, prompt: int) -> list[list[float]]:
        """(L + 1, L + 1) angular distances in [0, 1] between the states before layers a and b, last token."""
        states = torch.nn.functional.normalize(torch.stack(self.last_token[prompt]).double(), dim=-1)
        return (torch.arccos((states @ states.T).clamp(-1, 1)) / math.pi).tolist()


class Scorer:
    """Compares final hidden states with the baseline's, `CHUNK` log-probabilities at a time.

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
        return (
            [{key: v[i] for key, v in scores.items()} for i in range(len(hidden))],
            base_nll / max(scored, 1),
            scored,
        )


@torch.no_grad()
def scan_batch(model, prompts, variants, kinds, method="wavefront") -> list[dict]:
    """Scores of a batch of prompts {name, input_ids (1, n) or inputs_embeds (1, n, d), and perhaps labels}.

    Returns a record for each prompt: name, tokens, nll (per scored token), scored, block_influence (L,),
    angles (L+1, L+1) and variants: [{mode, layer, head, <distance> ..., nll}].
    """
    # the pass without masks, which the wavefront extends by the masked variants
    model, variants = plain(model), [Variant(*variant) for variant in variants]
    device = next(model.parameters()).device
    batch = pad_prompts(prompts, device)
    lengths = [p["input_ids" if "input_ids" in p else "inputs_embeds"].shape[1] for p in prompts]
    rows = len(prompts)
    grown = variants if method == "wavefront" else ()
    with Baseline(model, lengths, grown, keep_inputs=method == "cached") as watch:
        hidden = model.get_decoder()(
            **batch, use_cache=False
        ).last_hidden_state  # (rows * (1 + variants), N, d)

    # the masked variants, (variants, rows, N, d)
    if method == "wavefront":
        order, masked_hidden = watch.order, hidden.unflatten(0, (-1, rows))[1:]
    else:
        order, stored = variants, watch.inputs or [None] * len(decoder_layers(model))
        passes = [masked_pass(model, batch, *variant, stored[variant.layer]) for variant in variants]
        masked_hidden = torch.stack(passes)

    # their scores
    records = []
    for p, prompt in enumerate(prompts):
        n = lengths[p]
        results, nll, scored = Scorer(model, prompt, hidden[p, :n], kinds)(masked_hidden[:, p, :n])
        records.append(
            {
                "name": prompt["name"],
                "tokens": n,
                "nll": nll,
                "scored": scored,
                "block_influence": watch.influence[p],
                "angles": watch.angles(p),
                "variants": [{**v._asdict(), **result} for v, result in zip(order, results)],
            }
        )
    return records


def masked_pass(model, batch, mode, layer, head, inputs=None) -> torch.Tensor:
    """Final hidden states (rows, N, d) of a padded batch with one part off.

    inputs: (rows, N, d), what that layer is given; it spares the layers before it.
    """
    with contextlib.ExitStack() as stack:
        if inputs is None:
            stack.enter_context(masked(model, layer, mode, head))
        else:
            for before in decoder_layers(model)[:layer]:
                stack.enter_context(patched(before, lambda hidden_states, *args, **kwargs: inputs))
            if mode == "layer":
                stack.enter_context(
                    patched(decoder_layers(model)[layer], lambda hidden_states, *args, **kwargs: inputs)
                )
            else:
                stack.enter_context(shortcut(model, layer, mode, head))
        return model.get_decoder()(**batch, use_cache=False).last_hidden_state
