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
from functools import partial

import torch
from torch import nn

from common.errors import UserError
from common.train import lr_at
from pruning.layers import (
    ATTENTION,
    DOWN,
    OUTPUT,
    child,
    decoder,
    decoder_layers,
    gaps,
    plain,
    refuse_quantized,
)
from pruning.sensitivity_analyse.layer_mask import states_of

# shares of the mean square of the MLP's output; each pulls the map to doing nothing
RIDGES = (0.0, 0.01, 0.1, 1.0)
# peak learning rates of a replacement layer, and passes over the texts
RATES = (3e-4, 1e-3)
PASSES = 8


def last_matrix(layer):
    """(MLP branch, its last linear module) of a decoder layer whose output is what comes in plus the MLP's
    output; UserError where a layer has no such MLP."""
    mlp = child(layer, ("mlp", "feed_forward", "ffn"))
    down = None if mlp is None else child(mlp, DOWN)
    if down is None or down.weight.dim() != 2:
        raise UserError(
            f"{type(layer).__name__}: --repair linear and compensate need an MLP with one last matrix in "
            "front of the gap"
        )
    return mlp, down


@contextlib.contextmanager
def recorded(module, rows: list):
    """Append what `module` returns, (tokens, d) in float64 on the CPU, to `rows` while the block runs."""

    def note(module, args, output):
        states = states_of(output)
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


def linear(student, layers, prompts, target) -> tuple:
    """What to try on a gap behind `layers`, of which the last one's MLP is changed; see `repair_gaps`."""
    layer = layers[-1]
    mlp, down = last_matrix(layer)
    check_sum(student, layer, mlp, prompts[:1])
    inputs, outputs = states_behind(student, prompts, [mlp, layer])
    wanted = target - (outputs - inputs)
    maps = ((ridge, least_squares(inputs, wanted, ridge)) for ridge in RIDGES)
    return [down], ((ridge, partial(merge_map, down, matrix)) for ridge, matrix in maps)


def check_sum(student, layer, mlp, prompts):
    """UserError unless the layer's output is a sum with the MLP's output in it: some normalise it again."""

    def nothing(module, args, output):
        return torch.zeros_like(states_of(output))

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


def compensate(student, layers, prompts, target) -> tuple:
    """What to try on a gap behind `layers`: one factor for all that they write; see `repair_gaps`."""
    (here,) = states_behind(student, prompts, layers[-1:])
    factor = (target.norm(dim=-1) / here.norm(dim=-1).clamp(min=1e-9)).mean().item()
    writers, norm = writers_before(student, layers)
    modules = [*writers, norm] if norm is not None else writers
    return modules, [(factor, partial(scale, writers, norm, factor))]


def writers_before(model, layers) -> tuple:
    """(what embeds tokens and what `layers` add to the hidden state with, the final norm or None).

    The layers before the gap see their input through a norm and do not notice a factor; an output head that
    is tied to the embeddings is set right in the final norm.
    """
    base = plain(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    writers = [embedding]
    for layer in layers:
        attention = child(layer, ATTENTION)
        output = None if attention is None else child(attention, OUTPUT)
        if output is None:
            raise UserError(f"{type(layer).__name__}: --repair compensate finds no output projection in it")
        writers += [output, last_matrix(layer)[1]]
    tied = head is not None and head.weight is embedding.weight
    return writers, final_norm(model) if tied else None


def scale(writers, norm, factor: float):
    """Multiply the weights and biases of `writers` by `factor`, and divide the norm's by it, in place."""
    for module in writers:
        for parameter in module.parameters(recurse=False):
            parameter.data *= factor
    for parameter in norm.parameters() if norm is not None else ():
        parameter.data /= factor


@torch.no_grad()
def final_norm(model):
    """The norm that runs behind the last layer; UserError where there is none."""
    around, layers, ran = decoder(model), list(decoder_layers(model)), []
    watched = [module for module in around.modules() if "norm" in type(module).__name__.lower()]
    hooks = [m.register_forward_hook(lambda module, *call: ran.append(module)) for m in watched + layers]
    try:
        around(input_ids=torch.zeros(1, 1, dtype=torch.long, device=plain(model).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if ran[-1] in layers or not hasattr(ran[-1], "weight"):
        raise UserError(f"{type(plain(model)).__name__}: no final norm with a weight found")
    return ran[-1]


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


def replace(student, layers, prompts, target) -> tuple:
    """What to try on a gap behind `layers`: the last one learns to return what the gap's last layer did.

    It then stands for itself and for the gap, as LLM-Streamline's replacement layer, which begins as the
    first of those that it replaces. See `repair_gaps`.
    """
    layer = layers[-1]
    calls = calls_of(student, prompts, layer)
    targets = target.float().split([prompt["input_ids"].shape[1] for prompt in prompts])

    def learn(rate):
        trained = imitate(copy.deepcopy(layer).float(), calls, targets, rate)
        put([layer], values_of([trained]))

    return [layer], [(rate, partial(learn, rate)) for rate in RATES]


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
            states = states_of(output)
            error = (states.flatten(0, 1) - target).square().sum(-1) / target.square().sum(-1)
            error.mean().backward()
            optimizer.param_groups[0]["lr"] = rate * lr_at(step, steps, 0.05, "cosine")
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return layer


REPAIRS = {"linear": linear, "compensate": compensate, "replace": replace}


@torch.no_grad()
def repair_gaps(kind: str, student, teacher, drop, prompts, held_out) -> list[dict]:
    """Repair every gap of `student` in place, from the first on, in one of the ways of `REPAIRS`.

    teacher: the model with all layers, of which `student` lacks `drop`. prompts, held_out: {input_ids (1,
    N)}; a way is fitted to the first, the second choose among its settings, or none. A way gets the kept
    layers before a gap and what the gap's last layer returns to the teacher, (tokens, d); it returns the
    modules that it changes and [(setting, function that changes them)]. Returns a row for each gap: repair,
    gap, setting (None where nothing was changed), loss_before and loss_after on `held_out`.
    """
    refuse_quantized(student, f"--repair {kind}")
    spans, rows = gaps(drop), []
    originals = decoder_layers(teacher)
    targets = states_behind(teacher, prompts, [originals[last] for _, last in spans])
    loss = mean_loss(student, held_out)
    for (first, last), target in zip(spans, targets):
        row = {"repair": kind, "gap": f"{first}-{last}", "setting": None}
        row |= {"loss_before": loss, "loss_after": loss}
        rows.append(row)
        layers = list(decoder_layers(student))[: first - sum(gone < first for gone in drop)]
        if not layers:
            continue  # nothing stands before it
        modules, tries = REPAIRS[kind](student, layers, prompts, target)
        original = best = values_of(modules)
        for setting, change in tries:
            change()
            loss = mean_loss(student, held_out)
            if loss < row["loss_after"]:
                row |= {"setting": setting, "loss_after": loss}
                best = values_of(modules)
            put(modules, original)
        put(modules, best)
        loss = row["loss_after"]
    return rows


def values_of(modules) -> list[torch.Tensor]:
    """A copy of the values of all parameters of `modules`."""
    return [parameter.data.clone() for module in modules for parameter in module.parameters()]


def put(modules, values):
    """Give the parameters of `modules` the values of `values_of`, in their own types."""
    for parameter, value in zip((p for module in modules for p in module.parameters()), values):
        parameter.data = value.to(parameter, copy=True)


def repair(student, teacher, drop, kinds, prompts) -> list[dict]:
    """Apply the closed forms `kinds` in this order to `student`, which lacks the layers `drop` of `teacher`.

    Four of five prompts are fitted, every fifth judges: where two or three kinds of texts take turns, each
    judges in turn too. Returns the rows of all, and prints them.
    """
    held_out = prompts[::5]
    fitted = [prompt for i, prompt in enumerate(prompts) if i % 5]
    if not fitted:
        raise UserError("--repair: give at least two calibration texts: some are fitted, others judge")
    rows = [row for kind in kinds for row in repair_gaps(kind, student, teacher, drop, fitted, held_out)]
    for row in rows:
        helped = row["loss_after"] < row["loss_before"]
        change = f"held-out loss {row['loss_before']:.4f} -> {row['loss_after']:.4f}"
        print(f"{row['repair']} repair of layers {row['gap']}: " + (change if helped else "none helps"))
    return rows
