"""Narrower layers, or zeros inside them, chosen by the activations on a calibration set.

    python pruning/pruning_tools/prune_width.py --model path/to/llm --out narrow --mlp-ratio 0.25
    python pruning/pruning_tools/prune_width.py --model path/to/llm --out sparse --method wanda --sparsity 0.5

This is what removing whole layers competes with.

width      removes MLP neurons, and whole key-value heads with their query heads, as many in every layer, so
           that the result is an ordinary smaller model. The score of a neuron is its mean |activation| times
           the norm of its column in down_proj; of a head group, the same over its part of o_proj's input
           (activation importance of Minitron, arXiv 2407.14679)
wanda      sets weights to zero by the score |W| times the norm of the input, within each output row (arXiv
           2306.11695), layer after layer on the activations of the layers pruned before
magnitude  sets weights to zero by the score |W|, within each matrix: the control of wanda

--sparsity 2:4 keeps the two best of every four weights along the input.
"""

import contextlib
import json
import sys
from collections import defaultdict
from pathlib import Path

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from common.arguments import Parser, refuse
from common.checkpoint import atomic_dir
from common.errors import UserError, run
from pruning.layers import decoder, decoder_layers, head_counts, plain
from pruning.sensitivity_analyse.layer_sensitivity_scan import add_prompt_arguments, load_with_prompts
from pruning.sensitivity_analyse.scan_methods import pad_prompts, patched


def parse_args(argv=None):
    p = Parser(__doc__)
    p.add_argument(
        "--model",
        type=Path,
        required=True,
        help="folder of a language model; width needs Llama's gate_proj, up_proj and down_proj",
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
        help="width: fraction of the key-value heads to remove, in [0, 1), with their query heads",
    )
    p.add_argument(
        "--sparsity",
        default="0.5",
        help="wanda, magnitude: fraction of the weights that become zero, in (0, 1), or 2:4",
    )
    p.add_argument("--overwrite", action="store_true", help="replace the folder --out")
    add_prompt_arguments(p.add_argument_group("calibration prompts"))
    return p.parse_args(argv)


def llama_parts(layer):
    """(attention, MLP) of a decoder layer; UserError where they are not built as Llama's are."""
    mlp = getattr(layer, "mlp", None)
    if not all(hasattr(mlp, n) for n in ("gate_proj", "up_proj", "down_proj")) or not hasattr(
        layer.self_attn, "o_proj"
    ):
        raise UserError(
            f"{type(layer).__name__}: pruning in width knows layers with self_attn.{{q,k,v,o}}_proj and "
            f"mlp.{{gate,up,down}}_proj only"
        )
    return layer.self_attn, layer.mlp


@contextlib.contextmanager
def input_norms(modules: dict, real: torch.Tensor, power: int = 2):
    """Sum |input|^power over all real tokens, for each input feature of the Linear modules {name: module}.

    Yields {name: (features,)}, filled while the block runs. real: (B, N) bool, False at padding.
    """
    sums = {}

    def watch(name):
        def hook(module, args):
            sums[name] = sums.get(name, 0) + args[0][real.to(args[0].device)].float().abs().pow(power).sum(0)

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def calibration_batch(model, prompts):
    """Return (all prompts padded to one batch, (B, N) bool that is True at real tokens)."""
    batch = pad_prompts(prompts, next(model.parameters()).device)
    lengths = torch.tensor([p[next(iter(batch))].shape[1] for p in prompts])
    return batch, torch.arange(next(iter(batch.values())).shape[1])[None] < lengths[:, None]


# ---------------------------------------- width


@torch.no_grad()
def prune_width(model, prompts, mlp_ratio: float, kv_ratio: float) -> dict:
    """Cut `model` in place, in fractions of its neurons and key-value heads.

    Returns {"mlp": kept neurons of each layer, "kv": kept key-value heads of each layer}.
    """
    parts = [llama_parts(layer) for layer in decoder_layers(model)]
    config = plain(model).config
    heads, kv_heads, head_dim = head_counts(model)
    neurons = next(mlp for _, mlp in parts).down_proj.in_features
    watched = {}
    for i, (attention, mlp) in enumerate(parts):
        watched |= {(i, "mlp"): mlp.down_proj, (i, "kv"): attention.o_proj}
    batch, real = calibration_batch(model, prompts)
    with input_norms(watched, real, power=1) as sums:
        decoder(model)(**batch, use_cache=False)
    kept_neurons, kept_kv = neurons - round(mlp_ratio * neurons), kv_heads - round(kv_ratio * kv_heads)
    if min(kept_neurons, kept_kv) < 1:
        raise UserError(
            f"--mlp-ratio {mlp_ratio} --kv-ratio {kv_ratio}: nothing would be left of {neurons} neurons or "
            f"{kv_heads} key-value heads"
        )
    chosen = defaultdict(list)
    for i, (attention, mlp) in enumerate(parts):
        score = sums[i, "mlp"] * mlp.down_proj.weight.float().norm(dim=0)
        keep = score.topk(kept_neurons).indices.sort().values
        for linear in (mlp.gate_proj, mlp.up_proj):
            keep_rows(linear, keep)
        keep_columns(mlp.down_proj, keep)
        # query heads of a group lie side by side
        score = (sums[i, "kv"] * attention.o_proj.weight.float().norm(dim=0)).view(kv_heads, -1).sum(1)
        groups = score.topk(kept_kv).indices.sort().values
        rows = torch.arange(kv_heads * head_dim).view(kv_heads, -1)[groups].flatten()
        queries = torch.arange(heads * head_dim).view(kv_heads, -1)[groups].flatten()
        keep_rows(attention.q_proj, queries)
        keep_rows(attention.k_proj, rows)
        keep_rows(attention.v_proj, rows)
        keep_columns(attention.o_proj, queries)
        chosen["mlp"].append(keep.tolist())
        chosen["kv"].append(groups.tolist())
    config.head_dim, config.intermediate_size = head_dim, kept_neurons
    config.num_key_value_heads, config.num_attention_heads = kept_kv, kept_kv * (heads // kv_heads)
    return dict(chosen)


def keep_rows(linear, index):
    """Keep these output features of a Linear, in place."""
    linear.weight = nn.Parameter(linear.weight[index].clone(), requires_grad=linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[index].clone(), requires_grad=linear.bias.requires_grad)
    linear.out_features = len(index)


def keep_columns(linear, index):
    """Keep these input features of a Linear, in place."""
    linear.weight = nn.Parameter(linear.weight[:, index].clone(), requires_grad=linear.weight.requires_grad)
    linear.in_features = len(index)


# ---------------------------------------- zeros


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


@torch.no_grad()
def prune_unstructured(model, prompts, method: str, sparsity: str):
    """Set weights of every Linear in the decoder layers to zero, in place.

    wanda sees each layer's input as the pruned layers before it produce it, all in one forward pass.
    """
    batch, real = calibration_batch(model, prompts)
    with contextlib.ExitStack() as stack:
        for layer in decoder_layers(model):
            linears = {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}

            def prune_then_run(*args, original=layer.forward, linears=linears, **kwargs):
                with input_norms(linears, real) as sums:
                    if method == "wanda":
                        original(*args, **kwargs)
                for name, linear in linears.items():
                    score = linear.weight.float().abs() * (sums[name].sqrt() if method == "wanda" else 1)
                    linear.weight[zero_mask(score, sparsity, by_row=method == "wanda")] = 0
                return original(*args, **kwargs)

            stack.enter_context(patched(layer, prune_then_run))
        decoder(model)(**batch, use_cache=False)


def check(args):
    """Refuse numbers out of range and what would have no effect."""
    if args.method == "width":
        refuse(args, ["sparsity"], "with --method width")
        ratios = (args.mlp_ratio, args.kv_ratio)
        if not all(0 <= ratio < 1 for ratio in ratios) or sum(ratios) == 0:
            raise UserError("--method width needs --mlp-ratio or --kv-ratio, each in [0, 1)")
        return
    refuse(args, ["mlp_ratio", "kv_ratio"], f"with --method {args.method}")
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
    model, tokenizer, prompts = load_with_prompts(args)

    # prune in memory
    before = sum(p.numel() for p in model.parameters())
    if args.method == "width":
        chosen = prune_width(model, prompts, args.mlp_ratio, args.kv_ratio)
    else:
        prune_unstructured(model, prompts, args.method, args.sparsity)
        chosen = {"sparsity": args.sparsity}
    after = sum(p.numel() for p in model.parameters())
    matrices = [p for layer in decoder_layers(model) for p in layer.parameters() if p.dim() == 2]
    zeros = sum((matrix == 0).sum().item() for matrix in matrices)

    # write a folder that transformers loads
    with atomic_dir(args.out) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        about = {"method": args.method, "source": str(args.model), "kept": chosen}
        (temporary / "prune_width.json").write_text(json.dumps(about))
    print(
        f"{args.method}: values {before:,} -> {after:,} ({1 - after / before:.1%} removed), {zeros:,} zeros "
        f"in the layers' matrices, in {args.out}"
    )


if __name__ == "__main__":
    run(main, parse_args())
