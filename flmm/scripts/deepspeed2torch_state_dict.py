"""Turn a DeepSpeed ZeRO-1/2 checkpoint folder of a head into one file of upstream's key names.

    python flmm/scripts/deepspeed2torch_state_dict.py iter_95080.pth head.safetensors

fp32 weights are put together from the optimizer shards; where these cannot be read safely, the module's own
(bf16) weights are taken. Only the trained keys are kept. ZeRO-3 spreads the module itself: run DeepSpeed's
zero_to_fp32.py there first.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
from safetensors.torch import save_file

from common.arguments import Parser
from common.checkpoint import atomic_path
from common.errors import UserError, run
from common.files import check
from common.weights import read_checkpoint, strip_prefixes
from flmm.models.flmm import SAM_PARTS

TRAINED = ("mask_head.", *SAM_PARTS)


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument(
        "folder", type=Path, help="checkpoint folder with *_model_states.pt and *_optim_states.pt"
    )
    parser.add_argument("output", type=Path, help=".safetensors to write")
    return parser.parse_args(argv)


def merge_shards(shards, param_shapes):
    """fp32 tensors by name. shards: per rank the list of flat partitions (one per parameter group);
    param_shapes: per group {name: shape} in the order in which they lie in the joined partitions."""
    out = {}
    for group, shapes in enumerate(param_shapes):
        flat, at = torch.cat([rank[group].flatten() for rank in shards]), 0
        for name, shape in shapes.items():
            size = torch.Size(shape).numel()
            if at + size > len(flat):
                raise UserError(
                    f"the shards hold {len(flat)} numbers, {name} ends at {at + size}: a rank's file is "
                    "missing"
                )
            out[name] = flat[at : at + size].view(torch.Size(shape)).clone()
            at += size
    return out


def main(args):
    models = sorted(args.folder.glob("*model_states.pt")) if args.folder.is_dir() else []
    if not models:
        raise UserError(f"{args.folder}: no *_model_states.pt; expected a DeepSpeed checkpoint folder")
    if any(p.name.startswith("zero_pp_rank") for p in models):
        raise UserError(
            f"{args.folder}: ZeRO-3 checkpoint; run its zero_to_fp32.py first and load the result directly"
        )
    states = read_checkpoint(models[0])
    check(states, {"module": dict}, models[0])
    tensors, source = dict(states["module"]), "module weights"
    # rank 10 comes after rank 9
    optimizers = sorted(args.folder.glob("*optim_states.pt"), key=lambda p: (len(p.name), p.name))
    try:
        optimizer_states = [read_checkpoint(path)["optimizer_state_dict"] for path in optimizers]
        shards = [state["single_partition_of_fp32_groups"] for state in optimizer_states]
        if shards and states.get("param_shapes"):
            tensors |= merge_shards(shards, states["param_shapes"])
            source = f"fp32 weights of {len(shards)} optimizer shards"
    except (KeyError, UserError) as error:
        print(f"optimizer shards not used: {error}")
    named = {strip_prefixes(key): value for key, value in tensors.items()}
    kept = {key: value.contiguous() for key, value in named.items() if key.startswith(TRAINED)}
    if not kept:
        raise UserError(f"{models[0]}: none of the keys belongs to a head ({', '.join(TRAINED)})")
    with atomic_path(args.output) as temporary:
        save_file(kept, temporary)
    print(f"wrote {len(kept)} tensors to {args.output} ({source})")


if __name__ == "__main__":
    run(main, parse_args())
