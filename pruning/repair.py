"""Repairs of a pruned model gap by gap, from a few thousand tokens: none trains the model as a whole.

linear       the least-squares map from the output of the MLP before the gap to what the whole model has
             behind it, merged into that MLP's last matrix, so that nothing is added (ReplaceMe, 2505.02819)
compensate   one factor, by which the hidden state that reaches the gap is too short, merged into everything
             that writes to the state before it (Prune&Comp, arXiv 2507.18212)
replace      the layer before the gap learns, alone, to return what the gap's last layer returned
             (LLM-Streamline, arXiv 2403.19135)

Each is kept for a gap only where it lowers the loss on calibration texts that it was not fitted to: a
least-squares map of some gaps is far worse than none.
"""

import contextlib
import copy
import sys
from pathlib import Path

import torch
from torch import nn

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.errors import UserError
from common.train import lr_at
from pruning.layers import DOWN, OUTPUT, child, decoder, decoder_layers, find_layers, plain

# shares of the mean square of the MLP's output; each pulls the map to doing nothing
RIDGES = (0.0, 0.01, 0.1, 1.0)
# peak learning rates of a replacement layer, and passes over the texts
RATES = (3e-4, 1e-3)
PASSES = 8


def gaps(drop: list[int]) -> list[tuple[int, int]]:
    """(first, last) of each stretch of neighbouring layers in an ascending list."""
    found = []
    for layer in drop:
        if found and layer == found[-1][1] + 1:
            found[-1] = (found[-1][0], layer)
        else:
            found.append((layer, layer))
    return found


def last_matrix(layer):
    """(MLP branch, its last linear module) of a decoder layer whose output is what comes in plus the MLP's
    output; UserError where a layer has no such MLP."""
    mlp = child(layer, ("mlp", "feed_forward", "ffn"))
    down = None if mlp is None else child(mlp, DOWN)
    if down is None or down.weight.dim() != 2:
        raise UserError(
            f"{type(layer).__name__}: --repair linear needs an MLP with one last matrix in front of the gap"
        )
    return mlp, down


@contextlib.contextmanager
def recorded(module, rows: list):
    """Append what `module` returns, (tokens, d) in float64 on the CPU, to `rows` while the block runs."""

    def note(module, args, output):
        states = output[0] if isinstance(output, tuple) else output
        rows.append(states.reshape(-1, states.shape[-1]).double().cpu())

    handle = module.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def states_behind(model, prompts, modules) -> list[torch.Tensor]:
    """What each of `modules` returns for all prompts, (tokens, d) in float64."""
    rows = [[] for _ in modules]
    with contextlib.ExitStack() as stack:
        for module, some in zip(modules, rows):
            stack.enter_context(recorded(module, some))
        for prompt in prompts:
            decoder(model)(input_ids=prompt["input_ids"].to(model.device), use_cache=False)
    return [torch.cat(some) for some in rows]


@torch.no_grad()
def mean_loss(model, prompts) -> float:
    """Mean loss per token on prompts {input_ids (1, N)}."""
    total = tokens = 0
    for prompt in prompts:
        ids = prompt["input_ids"].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return total / tokens


def least_squares(inputs, wanted, ridge: float) -> torch.Tensor:
    """A (d, d) for which inputs @ A is nearest to `wanted`; ridge pulls it to the identity. float64."""
    square = inputs.T @ inputs
    change = inputs.T @ wanted - square
    weight = (ridge + 1e-9) * square.diagonal().mean()
    eye = torch.eye(len(square), dtype=square.dtype)
    return torch.linalg.solve(square + weight * eye, change) + eye


def merge_map(down, matrix: torch.Tensor):
    """Let `down` return its output times `matrix` (d, d), in place."""
    weight = down.weight.data
    turned = hasattr(down, "nf")  # Conv1D holds (in, out)
    new = weight.double().cpu() @ matrix if turned else matrix.T @ weight.double().cpu()
    down.weight.data = new.to(weight)
    if down.bias is not None:
        down.bias.data = (down.bias.data.double().cpu() @ matrix).to(down.bias)


@torch.no_grad()
def repair_linear(student, teacher, drop, prompts, held_out) -> list[dict]:
    """Repair every gap of `student` in place, from the first on.

    teacher: the model with all layers, of which `student` lacks `drop`. prompts, held_out: {input_ids (1,
    N)}; the second choose the ridge, or no map. Returns a row for each gap: gap, ridge (None where nothing
    was changed), loss_before and loss_after on `held_out`.
    """
    spans, rows = gaps(drop), []
    originals = decoder_layers(teacher)
    targets = states_behind(teacher, prompts, [originals[last] for _, last in spans])
    for (first, last), target in zip(spans, targets):
        row = new_row("linear", first, last, mean_loss(student, held_out), ridge=None)
        rows.append(row)
        before = kept_before(drop, first)
        if not before:
            continue  # nothing stands before it

        layer = decoder_layers(student)[before - 1]
        mlp, down = last_matrix(layer)
        check_sum(student, layer, mlp, prompts[:1])
        inputs, outputs = states_behind(student, prompts, [mlp, layer])
        original = {name: p.data.clone() for name, p in down.named_parameters()}
        best = original
        for ridge in RIDGES:
            merge_map(down, least_squares(inputs, target - (outputs - inputs), ridge))
            loss = mean_loss(student, held_out)
            if loss < row["loss_after"]:
                row |= {"ridge": ridge, "loss_after": loss}
                best = {name: p.data.clone() for name, p in down.named_parameters()}
            put(down, original)
        put(down, best)
    return rows


def new_row(repair: str, first: int, last: int, loss: float, **setting) -> dict:
    """What becomes of one gap, before anything is tried."""
    return {"repair": repair, "gap": f"{first}-{last}", **setting, "loss_before": loss, "loss_after": loss}


def put(module, values: dict):
    """Give the parameters of a module these values."""
    for name, parameter in module.named_parameters():
        parameter.data = values[name].clone()


def kept_before(drop: list[int], layer: int) -> int:
    """How many layers before `layer` are kept."""
    return layer - sum(gone < layer for gone in drop)


def check_sum(student, layer, mlp, prompts):
    """UserError unless the layer's output is a sum with the MLP's output in it: some normalise it again."""

    def nothing(module, args, output):
        return torch.zeros_like(output[0] if isinstance(output, tuple) else output)

    part, whole = states_behind(student, prompts, [mlp, layer])
    handle = mlp.register_forward_hook(nothing)
    try:
        (rest,) = states_behind(student, prompts, [layer])
    finally:
        handle.remove()
    if not torch.allclose(rest + part, whole, rtol=1e-2, atol=1e-2 * whole.abs().max().item()):
        raise UserError(
            f"{type(layer).__name__} changes its MLP's output before it adds it; --repair linear cannot be "
            "merged"
        )


@torch.no_grad()
def repair_compensate(student, teacher, drop, prompts, held_out) -> list[dict]:
    """Scale what writes to the hidden state before each gap of `student`, in place, from the first gap on.

    The layers before see their input through a norm and do not notice; a tied output head is set right in the
    final norm. Arguments and rows as of `repair_linear`, with factor instead of ridge.
    """
    originals, rows = decoder_layers(teacher), []
    for first, last in gaps(drop):
        row = new_row("compensate", first, last, mean_loss(student, held_out), factor=None)
        rows.append(row)
        before = kept_before(drop, first)
        if not before:
            continue
        layers = list(decoder_layers(student))[:before]
        (here,) = states_behind(student, prompts, layers[-1:])
        (behind,) = states_behind(teacher, prompts, [originals[last]])
        factor = (behind.norm(dim=-1) / here.norm(dim=-1).clamp(min=1e-9)).mean().item()
        scale_before(student, layers, factor)
        loss = mean_loss(student, held_out)
        if loss < row["loss_after"]:
            row |= {"factor": factor, "loss_after": loss}
        else:
            scale_before(student, layers, 1 / factor)
    return rows


@torch.no_grad()
def scale_before(model, layers, factor: float):
    """Multiply everything that embeds tokens or that `layers` add to the hidden state by `factor`, in
    place."""
    base = plain(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    modules = [embedding]
    for layer in layers:
        attention = child(layer, ("self_attn", "attn", "attention", "self_attention"))
        output = None if attention is None else child(attention, OUTPUT)
        if output is None:
            raise UserError(f"{type(layer).__name__}: --repair compensate finds no output projection in it")
        modules += [output, last_matrix(layer)[1]]
    for module in modules:
        module.weight.data *= factor
        if getattr(module, "bias", None) is not None:
            module.bias.data *= factor
    if head is not None and head.weight is embedding.weight:
        norm = final_norm(model)
        norm.weight.data /= factor
        if getattr(norm, "bias", None) is not None:
            norm.bias.data /= factor


def final_norm(model):
    """The norm between the last layer and the output head; UserError where there is none."""
    around = decoder(model)
    holder, name = find_layers(model)
    inside = {id(part) for part in getattr(holder, name).modules()}
    norms = [m for m in around.modules() if id(m) not in inside and "norm" in type(m).__name__.lower()]
    if not norms or not hasattr(norms[-1], "weight"):
        raise UserError(f"{type(plain(model)).__name__}: no final norm with a weight found")
    return norms[-1]


def copies(value):
    """Tensors of a layer's call for a float32 copy of the layer; anything else as it is."""
    if torch.is_tensor(value):
        return value.float() if value.is_floating_point() else value
    return type(value)(map(copies, value)) if type(value) in (tuple, list) else value


@torch.no_grad()
def calls_of(model, prompts, layer) -> list[tuple]:
    """(arguments, keywords) with which `model` calls one of its layers for each prompt."""
    calls = []

    def note(module, args, kwargs):
        calls.append((copies(args), {name: copies(value) for name, value in kwargs.items()}))

    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        for prompt in prompts:
            decoder(model)(input_ids=prompt["input_ids"].to(model.device), use_cache=False)
    finally:
        handle.remove()
    return calls


def repair_replace(student, teacher, drop, prompts, held_out) -> list[dict]:
    """Train the layer before each gap of `student` alone, in place, to return what the gap's last layer did.

    It then stands for itself and for the gap, as LLM-Streamline's replacement layer, which begins as the
    first of those that it replaces. Arguments and rows as of `repair_linear`, with rate instead of ridge.
    """
    originals, rows = decoder_layers(teacher), []
    for first, last in gaps(drop):
        row = new_row("replace", first, last, mean_loss(student, held_out), rate=None)
        rows.append(row)
        before = kept_before(drop, first)
        if not before:
            continue
        layer = decoder_layers(student)[before - 1]
        calls = calls_of(student, prompts, layer)
        targets = [states_behind(teacher, [p], originals[last : last + 1])[0].float() for p in prompts]
        best = original = {name: p.data.clone() for name, p in layer.named_parameters()}
        for rate in RATES:
            trained = imitate(copy.deepcopy(layer).float(), calls, targets, rate)
            put(layer, {name: p.data.to(original[name]) for name, p in trained.named_parameters()})
            loss = mean_loss(student, held_out)
            if loss < row["loss_after"]:
                row |= {"rate": rate, "loss_after": loss}
                best = {name: p.data.clone() for name, p in layer.named_parameters()}
        put(layer, best)
    return rows


def imitate(layer, calls, targets, rate: float):
    """Train `layer` to turn each of `calls` into its target (tokens, d); one step a call, PASSES times.

    Every token's error counts by its own length: the first token of many models is a hundred times as long
    as the others, and would be all that is learnt.
    """
    parameters = [p.requires_grad_() for p in layer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    steps = PASSES * len(calls)
    with torch.enable_grad():
        for step in range(steps):
            args, kwargs = calls[step % len(calls)]
            target = targets[step % len(calls)].to(parameters[0].device)
            output = layer(*args, **kwargs)
            states = output[0] if isinstance(output, tuple) else output
            error = (states.flatten(0, 1) - target).square().sum(-1) / target.square().sum(-1)
            error.mean().backward()
            optimizer.param_groups[0]["lr"] = rate * lr_at(step, steps, 0.05, "cosine")
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return layer


REPAIRS = {"linear": repair_linear, "compensate": repair_compensate, "replace": repair_replace}


def repair(student, teacher, drop, kinds, prompts) -> list[dict]:
    """Apply the closed forms `kinds` in this order to `student`, which lacks the layers `drop` of `teacher`.

    Three of four prompts are fitted, every fourth judges. Returns the rows of all, and prints them.
    """
    held_out = prompts[::4]
    fitted = [prompt for i, prompt in enumerate(prompts) if i % 4]
    if not fitted:
        raise UserError("--repair: give at least two calibration texts: some are fitted, others judge")
    rows = [row for kind in kinds for row in REPAIRS[kind](student, teacher, drop, fitted, held_out)]
    for row in rows:
        helped = row["loss_after"] < row["loss_before"]
        change = f"held-out loss {row['loss_before']:.4f} -> {row['loss_after']:.4f}"
        print(f"{row['repair']} repair of layers {row['gap']}: " + (change if helped else "none helps"))
    return rows
