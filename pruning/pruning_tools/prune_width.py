"""Narrower layers, or zeros inside them, chosen by the activations on a calibration set.

    python pruning/pruning_tools/prune_width.py --model path/to/llm --out narrow --mlp-ratio 0.25
    python pruning/pruning_tools/prune_width.py --model path/to/llm --out sparse --method wanda --sparsity 0.5

This is what removing whole layers competes with.

width      removes MLP neurons, and whole key-value heads with their query heads, as many in every layer, so
           that the result is an ordinary smaller model. The score of a neuron is its mean |activation| times
           the norm of its column in down_proj; of a head group, the same over its part of o_proj's input
           (activation importance of Minitron, arXiv 2407.14679)
           With --expert-ratio the experts of a mixture, as many in every layer, that write least to the
           hidden state: the mean square of what enters their last matrix, times its weights' squares
wanda      sets weights to zero by the score |W| times the norm of the input, within each output row (arXiv
           2306.11695), layer after layer on the activations of the layers pruned before
magnitude  sets weights to zero by the score |W|, within each matrix: the control of wanda

--sparsity 2:4 keeps the two best of every four weights along the input.
"""

import contextlib
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
from torch.overrides import TorchFunctionMode

from common.arguments import Parser, refuse
from common.checkpoint import atomic_dir
from common.errors import UserError, run
from pruning.layers import decoder, decoder_layers, head_counts, plain, refuse_quantized, text_config
from pruning.pruning_tools import read_back
from pruning.pruning_tools.language_model import copy_companions
from pruning.sensitivity_analyse.layer_mask import mixers, mlps
from pruning.sensitivity_analyse.layer_sensitivity_scan import add_prompt_arguments, load_with_prompts
from pruning.sensitivity_analyse.scan_methods import pad_prompts, patched
from pruning.shorter import CHOSEN, EXPERTS

# The last matrices of experts.
ENDS = ("down_proj", "w2", "output_linear.weight")


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument(
        "--model",
        type=Path,
        required=True,
        help="folder of a language model; width needs layers like Llama's",
    )
    p.add_argument("--out", type=Path, required=True, help="folder of the result")
    p.add_argument("--method", choices=("width", "wanda", "magnitude"), default="width", help="see above")
    p.add_argument(
        "--mlp-ratio", type=float, default=0.0, help="width: fraction of the MLP neurons to remove, in [0, 1)"
    )
    p.add_argument(
        "--kv-ratio",
        type=float,
        default=0.0,
        help="width: fraction of the key-value heads to remove, in [0, 1)",
    )
    p.add_argument(
        "--expert-ratio",
        type=float,
        default=0.0,
        help="width: fraction of a mixture's experts to remove, in [0, 1)",
    )
    p.add_argument(
        "--sparsity",
        default="0.5",
        help="wanda, magnitude: fraction of weights to set to zero, in (0, 1), or 2:4",
    )
    p.add_argument("--overwrite", action="store_true", help="replace the folder --out")
    add_prompt_arguments(p.add_argument_group("calibration prompts"))
    return p.parse_args(argv)


def llama_parts(layer):
    """(attention, MLP) of a decoder layer; UserError where they are not built as Llama's are."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    wanted = [(attention, "qkvo"), (mlp, ("gate", "up", "down"))]
    if not all(hasattr(part, f"{name}_proj") for part, names in wanted for name in names):
        raise UserError(
            f"{type(layer).__name__}: pruning in width knows layers with self_attn.{{q,k,v,o}}_proj and "
            "mlp.{gate,up,down}_proj only"
        )
    return attention, mlp


def calibration_batch(model, prompts):
    """Return (all prompts padded to one batch, (B, N) bool that is True at real tokens)."""
    batch = pad_prompts(prompts, next(model.parameters()).device)
    lengths = torch.tensor([p[next(iter(batch))].shape[1] for p in prompts])
    return batch, torch.arange(next(iter(batch.values())).shape[1])[None] < lengths[:, None]


def show_experts(model):
    """Let a mixture compute one product for each expert, instead of a fused one that cannot be watched."""
    choose = getattr(plain(model), "set_experts_implementation", None)
    if choose is not None:
        with contextlib.suppress(ValueError, AttributeError):
            choose("eager")


# ---------------------------------------- width


@torch.no_grad()
def prune_width(model, prompts, mlp_ratio: float, kv_ratio: float) -> dict:
    """Cut `model` in place, in fractions of its neurons and key-value heads.

    Returns {"mlp": kept neurons of each layer, "kv": kept key-value heads of each layer}.
    """
    # how many stay
    parts, config = [llama_parts(layer) for layer in decoder_layers(model)], text_config(model)
    heads, kv_heads, head_dim = head_counts(model)
    neurons = parts[0][1].down_proj.in_features
    kept_neurons, kept_kv = neurons - round(mlp_ratio * neurons), kv_heads - round(kv_ratio * kv_heads)
    if min(kept_neurons, kept_kv) < 1:
        raise UserError(
            f"--mlp-ratio {mlp_ratio} --kv-ratio {kv_ratio}: nothing would be left of {neurons} neurons or "
            f"{kv_heads} key-value heads"
        )
    if mlp_ratio and kept_neurons == neurons or kv_ratio and kept_kv == kv_heads:
        raise UserError(
            f"--mlp-ratio {mlp_ratio} --kv-ratio {kv_ratio}: one is too small to remove any of {neurons} "
            f"neurons or of {kv_heads} key-value heads"
        )

    # what enters the last matrix of each branch
    watched = {}
    for i, (attention, mlp) in enumerate(parts):
        watched |= {(i, "mlp"): mlp.down_proj.weight, (i, "kv"): attention.o_proj.weight}
    batch, real = calibration_batch(model, prompts)
    with Uses(watched, real, power=1) as uses:
        decoder(model)(**batch, use_cache=False)
    scores = {key: uses.norms[key][0] * w.double().norm(dim=0).cpu() for key, w in watched.items()}

    # the neurons and heads that add most; query heads of a group lie side by side
    chosen = {"mlp": [], "kv": []}
    for i, (attention, mlp) in enumerate(parts):
        keep = scores[i, "mlp"].topk(kept_neurons).indices.sort().values
        groups = scores[i, "kv"].view(kv_heads, -1).sum(1).topk(kept_kv).indices.sort().values
        cut_mlp(mlp, keep)
        cut_attention(attention, groups, heads, kv_heads, head_dim)
        chosen["mlp"].append(keep.tolist())
        chosen["kv"].append(groups.tolist())
    config.head_dim, config.intermediate_size = head_dim, kept_neurons
    config.num_key_value_heads, config.num_attention_heads = kept_kv, kept_kv * (heads // kv_heads)
    return chosen


def cut_mlp(mlp, keep):
    """Keep these neurons of an MLP, in place."""
    for norm in (part for name, part in mlp.named_children() if "norm" in name):  # BitNet
        keep_in_norm(norm, mlp.down_proj.in_features, keep)
    for linear in (mlp.gate_proj, mlp.up_proj):
        keep_rows(linear, keep)
    keep_columns(mlp.down_proj, keep)


def cut_attention(attention, groups, heads: int, kv_heads: int, head_dim: int):
    """Keep these key-value heads of an attention, with the query heads of each, in place."""
    rows = torch.arange(kv_heads * head_dim).view(kv_heads, -1)[groups].flatten()
    queries = torch.arange(heads * head_dim).view(kv_heads, -1)[groups].flatten()
    for name, norm in attention.named_children():
        if "norm" in name:  # over all heads together: OLMo 2, BitNet
            index, count = (rows, kv_heads) if name == "k_norm" else (queries, heads)
            keep_in_norm(norm, count * head_dim, index)
    keep_rows(attention.q_proj, queries)
    keep_rows(attention.k_proj, rows)
    keep_rows(attention.v_proj, rows)
    keep_columns(attention.o_proj, queries)


def keep_in_norm(norm, size: int, index):
    """Keep these features of a norm over `size` of them, in place; a norm over others stays."""
    if getattr(norm, "weight", None) is not None and norm.weight.shape == (size,):
        norm.weight.data = norm.weight.data[index].clone()


@torch.no_grad()
def prune_experts(model, prompts, ratio: float) -> list:
    """Remove a fraction of the experts of every mixture, in place; returns those kept, layer by layer."""
    config, every = text_config(model), expert_tensors(model)
    count = len(next(iter(every.values()))[0][1])
    kept = count - round(ratio * count)
    if kept == count:
        raise UserError(f"--expert-ratio {ratio:g}: is too small to remove any of {count} experts")
    chosen_at_once = max((getattr(config, name, None) or 1) for name in CHOSEN)
    if kept < chosen_at_once or (getattr(config, "n_group", None) or 1) > 1:
        raise UserError(
            f"--expert-ratio {ratio:g}: {kept} of {count} experts would be left, a token is sent to "
            f"{chosen_at_once}" + (", and they are chosen in groups" if kept >= chosen_at_once else "")
        )
    batch, real = calibration_batch(model, prompts)
    show_experts(model)
    last = {  # the last matrices of the experts; a token's values are small where it was not sent
        layer: next((p for name, p in tensors if p.dim() == 3 and name.endswith(ENDS)), None)
        for layer, tensors in every.items()
    }
    if None in last.values():
        raise UserError(f"{type(plain(model)).__name__}: its experts do not stand in one tensor a matrix")
    with contextlib.ExitStack() as stack:
        for layer in decoder_layers(model):
            stack.enter_context(real_tokens_only(layer, real))
        uses = stack.enter_context(Uses(last, real))
        decoder(model)(**batch, use_cache=False)
    kept_experts = []
    for layer, tensors in every.items():
        weight, axis = last[layer].float(), uses.axis[layer]
        size = weight.square().sum(-1 if axis == -2 else -2)  # (experts, input features)
        index = (uses.norms[layer].to(size) * size).sum(-1).topk(kept).indices.sort().values
        for _, tensor in tensors:
            tensor.data = tensor.data[index].clone()
        kept_experts.append(index.tolist())
    for holder in (config, *model.modules()):
        for name in EXPERTS:
            if getattr(holder, name, None) == count:
                setattr(holder, name, kept)
    return kept_experts


def expert_tensors(model) -> dict:
    """{layer: [(name, tensor with one part for each expert)]}; UserError where there is no mixture."""
    config = text_config(model)
    counts = {getattr(config, name, None) for name in EXPERTS} - {None}
    found = {}
    for i, layer in enumerate(decoder_layers(model)):
        stacks = [p for name, p in layer.named_parameters() if "experts" in name and p.dim() == 3]
        if not stacks:
            continue
        tensors = [*layer.named_parameters(), *layer.named_buffers()]
        found[i] = [
            (name, p)
            for name, p in tensors
            if len(p.shape)
            and len(p) == len(stacks[0])
            and re.search("expert|gate|router", name)
            and "shared" not in name
        ]
        counts.add(len(stacks[0]))
    if not found or len(counts) != 1:
        raise UserError(f"{type(plain(model)).__name__}: has no one number of stacked experts in its layers")
    return found


def keep_rows(linear, index):
    """Keep these output features of a Linear, in place."""
    for tensor in linear.parameters():
        tensor.data = tensor.data[index].clone()
    linear.out_features = len(index)


def keep_columns(linear, index):
    """Keep these input features of a Linear, in place."""
    linear.weight.data = linear.weight.data[:, index].clone()
    linear.in_features = len(index)


# ---------------------------------------- zeros


class Uses(TorchFunctionMode):
    """Sees every product with one of `weights` {name: parameter} while it is entered.

    Linear layers, GPT-2's Conv1D and experts stacked in one tensor are all products of inputs with a weight
    or with one slice of it; norms[name] sums |input|^power for each input feature, (slices, features) in
    float64 on the CPU, and axis[name] says along which axis the inputs lie. real: (B, N), False at padding.
    """

    PRODUCTS = {"linear": -1, "matmul": -2, "__matmul__": -2, "mm": -2, "bmm": -2, "addmm": -2, "baddbmm": -2}
    FACTORS = ("input", "weight", "other", "mat1", "batch1", "mat2", "batch2")  # where they are named

    def __init__(self, weights: dict, real: torch.Tensor, power: int = 2):
        super().__init__()
        self.real, self.power, self.norms, self.axis = real, power, {}, {}
        self.known = {w.untyped_storage().data_ptr(): (name, w) for name, w in weights.items()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self.PRODUCTS:
            named = [(kwargs or {}).get(key) for key in self.FACTORS]
            factors = [*args, *(value for value in named if value is not None)]["add" in name :]
            if len(factors) > 1:
                with torch._C.DisableTorchFunctionSubclass():
                    self.note(*factors[:2], self.PRODUCTS[name])
        return func(*args, **(kwargs or {}))

    def note(self, inputs, weight, axis):
        """Add one product to the sums, where its second factor is a known weight or a slice of one."""
        name, whole = self.known.get(weight.untyped_storage().data_ptr(), (None, None))
        if name is None or weight.dim() not in (whole.dim(), whole.dim() - 1) or weight.dim() < 2:
            return
        turned = weight.stride(-1) != whole.stride(-1)
        self.axis[name] = axis if not turned else -3 - axis
        slices, features = whole[..., 0, 0].numel(), whole.shape[self.axis[name]]
        sums = self.norms.setdefault(name, torch.zeros(slices, features, dtype=torch.double))
        first = 0
        if weight.dim() < whole.dim():
            first = (weight.storage_offset() - whole.storage_offset()) // whole.stride(0)
        rows = (
            self.tokens(inputs) if weight.dim() == 2 else inputs
        )  # a product of stacks: (slices, tokens, d)
        added = rows.detach().double().abs().pow(self.power).sum(-2).cpu().view(-1, features)
        sums[first : first + len(added)] += added

    def tokens(self, inputs):
        """(tokens, features) without the padding, where the inputs are those of a whole batch."""
        if inputs.shape[:-1] == self.real.shape:
            return inputs[self.real.to(inputs.device)]
        if inputs.shape[0] == self.real.numel():
            return inputs.flatten(1)[self.real.flatten().to(inputs.device)]
        return inputs.reshape(-1, inputs.shape[-1])


@contextlib.contextmanager
def real_tokens_only(layer, real: torch.Tensor):
    """Within the block, padding has no part in the sums of a layer's experts.

    An expert sees its own choice of tokens, among which padding could not be told any more. What enters a
    branch is therefore zero at padding, and experts that are given all tokens are given no padding at all:
    a bias would make something of zeros.
    """

    def without_padding(module, args, kwargs):
        def cleared(x):
            same = torch.is_tensor(x) and x.shape[:2] == real.shape and x.is_floating_point() and x.dim() == 3
            return torch.where(real.to(x.device)[..., None], x, 0) if same else x

        hidden = {"hidden_states"} & {*kwargs}
        return tuple(map(cleared, args)), kwargs | {name: cleared(kwargs[name]) for name in hidden}

    def chosen_alone(original):
        def call(*args, **kwargs):
            chosen = real.flatten().to(args[0].device)
            if args[0].dim() != 2 or len(args[0]) != len(chosen):
                return original(*args, **kwargs)

            def take(v):
                return v[chosen] if torch.is_tensor(v) and len(v) == len(chosen) else v

            out = original(*map(take, args), **{k: take(v) for k, v in kwargs.items()})
            whole = out.new_zeros(len(chosen), *out.shape[1:])
            whole[chosen] = out
            return whole

        return call

    hooks = [
        branch.register_forward_pre_hook(without_padding, with_kwargs=True)
        for branch in (*mixers(layer), *mlps(layer))
    ]
    try:
        with contextlib.ExitStack() as stack:
            for module in layer.modules():
                if any(p.dim() == 3 for p in module.parameters(recurse=False)):
                    stack.enter_context(patched(module, chosen_alone(module.forward)))
            yield
    finally:
        for hook in hooks:
            hook.remove()


def zero_mask(score: torch.Tensor, sparsity: str, by_row: bool) -> torch.Tensor:
    """True where a weight becomes zero. score: (out, in), low where a weight matters little.

    by_row: the fraction holds within each output row, else within the whole matrix.
    """
    if sparsity == "2:4":
        if score.shape[1] % 4:
            raise UserError(
                f"--sparsity 2:4: a matrix has {score.shape[1]} input features, not a multiple of 4"
            )
        rank = score.view(len(score), -1, 4).argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
        return (rank < 2).view_as(score)
    flat = score if by_row else score.reshape(1, -1)
    rank = flat.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    return (rank < round(float(sparsity) * flat.shape[-1])).view_as(score)


def zero_out(weight, norms, axis: int, method: str, sparsity: str):
    """Set a part of one weight to zero, in place. norms: (slices, input features) of `Uses`."""
    stack = weight.data if weight.dim() == 3 else weight.data[None]
    for matrix, norm in zip(stack, norms):
        score = matrix.float().abs()
        if axis == -2:  # (in, out), as Conv1D and some experts hold theirs
            score = score.T
        if method == "wanda" and norm.any():  # an expert that no token chose is judged by its weights alone
            score = score * norm.sqrt().to(score)
        mask = zero_mask(score.contiguous(), sparsity, by_row=method == "wanda")
        matrix[mask.T if axis == -2 else mask] = 0


@torch.no_grad()
def prune_unstructured(model, prompts, method: str, sparsity: str):
    """Set weights of every matrix that a decoder layer multiplies with to zero, in place.

    wanda sees each layer's input as the pruned layers before it produce it, all in one forward pass.
    """
    batch, real = calibration_batch(model, prompts)
    show_experts(model)
    with contextlib.ExitStack() as stack:
        for layer in decoder_layers(model):

            def prune_then_run(*args, layer=layer, original=layer.forward, **kwargs):
                weights = {name: p for name, p in layer.named_parameters() if p.dim() in (2, 3)}
                with real_tokens_only(layer, real), Uses(weights, real) as uses:
                    original(*args, **kwargs)
                for name, norms in uses.norms.items():
                    zero_out(weights[name], norms, uses.axis[name], method, sparsity)
                return original(*args, **kwargs)

            stack.enter_context(patched(layer, prune_then_run))
        decoder(model)(**batch, use_cache=False)


def check_share(model, sparsity: str) -> tuple[int, int]:
    """(zeros, all weights) of the matrices in the layers; UserError where they are not the asked share."""
    asked = 0.5 if sparsity == "2:4" else float(sparsity)
    matrices = {
        name: p
        for name, p in decoder_layers(model).named_parameters()
        if p.dim() in (2, 3) and not name.endswith("bias") and ".conv" not in name
    }
    zeros = {name: (p == 0).sum().item() for name, p in matrices.items()}
    values = sum(p.numel() for p in matrices.values())
    share = sum(zeros.values()) / values
    if not sum(zeros.values()):
        raise UserError(f"--sparsity {sparsity}: is too small to make any weight zero; nothing is written")
    if abs(share - asked) > 0.02:
        whole = [name for name, count in zeros.items() if count < asked / 2 * matrices[name].numel()]
        raise UserError(
            f"--sparsity {sparsity}: {share:.3f} of the layers' weights are zero, because this model does "
            f"not multiply with {', '.join(whole[:3])} in a way that is known here; nothing is written"
        )
    return sum(zeros.values()), values


def check(args):
    """Refuse numbers out of range and what would have no effect."""
    if args.method == "width":
        refuse(args, ["sparsity"], "with --method width")
        ratios = (args.mlp_ratio, args.kv_ratio, args.expert_ratio)
        if not all(0 <= ratio < 1 for ratio in ratios) or sum(ratios) == 0:
            raise UserError("--method width needs --mlp-ratio, --kv-ratio or --expert-ratio, each in [0, 1)")
        return
    refuse(args, ["mlp_ratio", "kv_ratio", "expert_ratio"], f"with --method {args.method}")
    try:
        valid = args.sparsity == "2:4" or 0 < float(args.sparsity) < 1
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"--sparsity {args.sparsity}: give a fraction between 0 and 1, or 2:4")


def main(args):
    check(args)
    if args.out.exists() and not args.overwrite:
        raise UserError(f"{args.out} exists; add --overwrite or choose another --out")
    model, prompts = load_with_prompts(args)
    refuse_quantized(model, f"--method {args.method}")

    # prune in memory
    before = sum(p.numel() for p in model.parameters())
    if args.method == "width":
        chosen = {}
        if args.expert_ratio:
            chosen["experts"] = prune_experts(model, prompts, args.expert_ratio)
        if args.mlp_ratio or args.kv_ratio:
            chosen |= prune_width(model, prompts, args.mlp_ratio, args.kv_ratio)
    else:
        prune_unstructured(model, prompts, args.method, args.sparsity)
        chosen = {"sparsity": args.sparsity}
    after = sum(p.numel() for p in model.parameters())
    sparse = ""
    if args.method != "width":
        zeros, weights = check_share(model, args.sparsity)
        sparse = f", {zeros:,} of {weights:,} weights in the layers are zero ({zeros / weights:.3f})"

    # write a folder that transformers loads, and see that it does
    with atomic_dir(args.out) as temporary:
        model.save_pretrained(temporary)
        copy_companions(args.lang_model_path or args.model, temporary)
        read_back.check_folder(temporary)
        about = {"method": args.method, "source": str(args.model), "kept": chosen}
        (temporary / "prune_width.json").write_text(json.dumps(about))
    print(
        f"{args.method}: values {before:,} -> {after:,} ({1 - after / before:.1%} removed){sparse}, in "
        f"{args.out}"
    )


if __name__ == "__main__":
    run(main, parse_args())
