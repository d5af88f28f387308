"""Train F-LMM's heads (UNet mask head, text projection, SAM decoder) on a frozen LLM. arXiv 2406.05821.

    python flmm/train.py --config flmm/configs/llava/frozen_llava_1_5_vicuna_7b_unet_sam_l_refcoco_png.yaml \\
        --data /data/coco --out runs/flmm/llava
    torchrun --nproc_per_node 8 flmm/train.py ...      # DDP: every GPU holds the base (bf16) and the heads

Upstream: `xtuner train configs/...py --deepspeed deepspeed_zero2`. Only the heads are trained and saved;
OUT/head.safetensors has upstream's key names. With --cache-attention the base runs once over the data and is
not needed after that. Learning rate, batch size and the like stand in the configuration's part `optim`; an
option on the command line goes before it, and the defaults shown below apply where both are silent.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
from accelerate import DistributedDataParallelKwargs
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Subset

from common.arguments import Parser, add_run_arguments, refuse
from common.checkpoint import atomic_json, atomic_path
from common.errors import UserError, run
from common.run import describe, open_run, seed_everything
from common.sharding import refuse_sharding
from common.together import meet
from common.train import (
    batches,
    check_finite,
    finish,
    finish_step,
    lr_at,
    make_accelerator,
    make_loader,
    plan_steps,
    start,
    update,
    watched,
)
from common.weights import read_weights
from flmm.build import (
    add_base_arguments,
    add_config_arguments,
    add_skip_argument,
    attach,
    build_base,
    build_dataset,
    build_head,
    build_sam,
    family_of,
    read_config,
)
from flmm.data.cache import CachedFeatures, write_cache
from flmm.data.samples import SampleBuilder
from flmm.data.skip import SkipBad, keep_good
from flmm.evaluation import phrase_rows
from flmm.models.flmm import extract
from flmm.models.mask_head.mask_refiner import SAMImageEncoder


def parse_args(argv=None):
    parser = Parser(__doc__)
    # which base, head and data: the YAML file says it, --set and --base-path change single values
    data = parser.add_argument_group("data and model")
    add_config_arguments(data)
    add_base_arguments(data)

    # the frozen base is what fills the memory and takes the time: spread it, or run it only once
    data.add_argument(
        "--shard-base",
        action="store_true",
        help="FSDP2 for the frozen base: every process keeps only its part of the decoder layers",
    )
    data.add_argument(
        "--cache-attention",
        type=Path,
        metavar="DIR",
        help="keep the frozen features in this folder and train from them; expressions are then drawn only "
        "once",
    )

    # where the head starts from, and at which size its masks are judged
    data.add_argument("--init-head", type=Path, help="start from this trained head instead of a random one")
    data.add_argument(
        "--targets",
        choices=["processed", "original"],
        default="processed",
        help="resolution of the masks that the losses compare with: the size of the processed picture, as "
        "upstream, or that of the original picture",
    )
    add_skip_argument(data)

    # upstream's recipe: 3 % warm-up, a checkpoint every 500 steps; `optim` of the YAML goes before these
    add_run_arguments(parser, lr=1e-4, epochs=8.0, warmup=0.03, save_every=500)
    return parser.parse_args(argv)


def settle_options(args, config):
    """Bring command line and configuration together: `optim` decides about what the command line leaves
    open."""
    # `_given` holds what really stood on the command line, so that a flag that repeats a default still wins
    optim = config["optim"]
    for name in ("lr", "epochs", "batch_size", "accum", "weight_decay", "warmup", "clip"):
        if name in optim and name not in args._given:
            setattr(args, name, optim[name])


def refuse_idle_options(args, config, processes: int):
    """Refuse what has no effect with this configuration and this number of processes."""
    # without SAM there is only the coarse stage, and without a validation split nothing to evaluate
    if config["optim"].get("coarse_first") and not config["sam"].get("path"):
        raise UserError("optim.coarse_first has no effect without sam.path; leave it out")
    if not config["data"].get("val"):
        refuse(args, ["eval_every"], "without data.val in the configuration")
    # one process has nobody to share with, and a cached base runs once and is then given up
    if args.shard_base and (processes == 1 or args.cache_attention):
        raise UserError("--shard-base needs several processes (NPROC_PER_NODE=8) and no --cache-attention")


def warmup_steps(warmup: float, steps: int) -> int:
    """Number of warm-up steps, a fraction of `steps` rounded down as mmengine rounds it."""
    return int(warmup if warmup >= 1 else warmup * steps)


def to_device(features, device):
    """Move the tensors of a list of feature dictionaries to `device`; pictures and texts stay where they
    are."""
    return [{k: v.to(device) if torch.is_tensor(v) else v for k, v in f.items()} for f in features]


def frozen_part(config, args, accelerator, sam_encoder):
    """The frozen base with its data sets, or the features that it left in --cache-attention.

    Where the cache lacks a split, that split is written first. Returns the base (None if its features are
    cached), the data sets {"train", and "val" where the configuration names one}, and the base's dimensions
    (channels, layers, hidden size).
    """
    # which splits still need the base: all of them without a cache, with one those that it lacks
    splits = ["train", *(["val"] if config["data"].get("val") else [])]
    cache = args.cache_attention
    missing = [split for split in splits if cache is None or not any((cache / split).glob("features-*.h5"))]
    meet()  # all processes have looked before one of them writes
    if not missing:
        refuse(args, ["attention"], f"because {cache} holds the features already")

    # the data are checked before the base is loaded, which happens only if it has to run
    base, dims = None, None
    sets = {
        split: build_dataset(config, split, args.data, seed=args.seed, skip_bad=args.skip_bad)
        for split in missing
    }
    if missing:
        # `shard` before `to`: otherwise every GPU would hold the whole base for a moment
        base = build_base(config, random_seed=args.random_base, attention=args.attention)
        if args.shard_base:
            base.shard(accelerator.device)
        base.to(accelerator.device)
        # how a picture becomes pixels and a caption becomes ids depends on the base
        dims = base.dims
        builder = SampleBuilder.of(base, sam_encoder)
        sets = {split: attach(dataset, builder) for split, dataset in sets.items()}
    # training, a cache and a sharded base need a sample for every index, so the next good one takes the place
    # of a bad one
    if args.skip_bad:
        sets = {
            split: SkipBad(dataset, replace=split == "train" or cache is not None or args.shard_base)
            for split, dataset in sets.items()
        }
    if cache is None:
        return base, sets, dims

    # what the features depend on is kept beside them, so that a cache of another base is refused
    origin = {split: made_from(config, split, args) for split in splits}
    for split, dataset in sets.items():  # the missing splits alone
        write_cache(cache / split, base, sam_encoder, dataset, origin[split], accelerator)

    # from here on every split is read from disk; nothing holds the base any longer
    cached = {split: CachedFeatures(cache / split, origin[split]) for split in splits}
    return None, cached, cached["train"].dims


def made_from(config, split: str, args) -> dict:
    """What the features of a split depend on."""
    # one expression an object is drawn by --seed, unless the configuration fixes the seed or the expression
    entries = [
        {"seed": args.seed, **entry}
        if entry["type"] == "refcoco" and entry.get("text_mode", "random") == "random"
        else entry
        for entry in config["data"][split]
    ]
    return {
        "base": config["base"],
        "random_base": args.random_base,
        "precision": args.precision,
        "data": entries,
        "data_root": str(args.data.resolve()),
        "sam": config["sam"].get("path"),
        "skip_bad": args.skip_bad,
    }


def validation_loader(dataset, args, accelerator):
    """This process's share of the validation samples, in order.

    With --shard-base every process must run the base equally often, so a rest of fewer samples than
    processes is left out.
    """
    # not prepared by accelerate, which would repeat samples to fill the last batch; a mean would count them
    total = len(dataset)
    if args.shard_base:
        total -= total % accelerator.num_processes
    mine = range(accelerator.process_index, total, accelerator.num_processes)
    return DataLoader(Subset(dataset, mine), args.batch_size, collate_fn=keep_good)


@torch.no_grad()
def validate(head, loader, get_features, accelerator):
    """Mean IoU over the phrases of all processes at the original size of the pictures, of coarse and refined
    masks."""
    # `head` without the wrapper of DDP, so that the processes may have unequally many batches
    head.eval()
    rows = []  # one for each phrase; --skip-bad can leave a batch empty
    for samples in filter(None, loader):
        for sample, output in zip(samples, head(get_features(samples))):
            rows += phrase_rows(output, sample["gt_masks"], sample.get("ignore"))
    head.train()

    # sums and a count instead of means: the processes' shares hold unequally many phrases
    sums = torch.zeros(3, dtype=torch.float32, device=accelerator.device)
    for row in rows:
        sums += torch.tensor([row["iou_coarse"], row["iou"], 1.0], device=accelerator.device)
    coarse, refined, count = accelerator.reduce(sums).tolist()
    if not count:  # every picture was bad, or --shard-base had fewer than processes
        return {}
    return {"val_miou_coarse": coarse / count, "val_miou": refined / count}


def describe_base(base) -> str:
    """Class and size of the base, or that its features were cached."""
    if base is None:
        return "cached features"
    return f"{type(base).__name__} {describe(base.model)}, {base.values_here:,} held by this process"


def make_head(config, dims, sam, args, accelerator):
    """The part that is trained."""
    # upstream weighs dice and cross-entropy alike, 1 and 1
    head = build_head(config, dims, sam)
    head.mask_weight = config["optim"].get("mask_weight", head.mask_weight)
    if args.init_head:
        accelerator.print(head.load_upstream(read_weights(args.init_head), args.init_head))

    # only the parts that see nothing but tensors; lists of pictures of different sizes stay outside
    if args.compile:
        head.mask_head.compile()
        if head.sam is not None:
            head.sam.mask_decoder.compile()
    return head


def make_optimizer(head, args):
    """AdamW with one group, so that weight decay holds for every tensor, as upstream; the schedule multiplies
    "peak"."""
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    group = {"params": trained, "lr": args.lr, "peak": args.lr, "weight_decay": args.weight_decay}
    return torch.optim.AdamW([group])


def make_ddp_accelerator(args):
    """The accelerator, for DDP alone, which has to look for the parts of SAM that get no gradient."""
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = make_accelerator(args, kwargs_handlers=[ddp])

    # upstream ran under ZeRO-2, which 12 million trained values (DeepSeek-VL-1.3B) do not need
    way_out = "its heads are small, and --shard-base spreads the base; leave ACCELERATE_CONFIG unset, for DDP"
    refuse_sharding(accelerator, way_out)
    return accelerator


def learn(training, model, loader, get_features, coarse_first):
    """The loop, to the last step of the run. model: FLMM, or DDP around it; SAM's decoder joins after
    `coarse_first` steps."""
    accelerator, args, steps = training.accelerator, training.args, training.steps
    head, warmup = accelerator.unwrap_model(model), warmup_steps(args.warmup, steps)
    # "masks" have the size of the processed picture (long side 336 with LLaVA), "gt_masks" that of the file
    mask_name = "gt_masks" if args.targets == "original" else "masks"

    # the losses of a batch are means over its phrases, so its share is counted in phrases
    model.train()
    for samples, share in batches(training, loader, lambda batch: sum(len(s["masks"]) for s in batch)):
        with accelerator.accumulate(model):
            # SAM's decoder joins after `coarse_first` steps: before, its prompts (coarse masks) mean nothing
            outputs = model(get_features(samples), refine=training.state["step"] >= coarse_first)

            # one (n, h, w) for each picture; `compute_loss` brings it to the size of each head's masks
            targets = [sample[mask_name].to(accelerator.device) for sample in samples]
            parts = {key: value * share for key, value in head.compute_loss(outputs, targets).items()}

            # a loss that is not finite ends the run: on a CPU before the weights change, on a GPU at the
            # latest before a save
            check_finite(training, [sample["file_name"] for sample in samples], **parts)
            accelerator.backward(parts["loss"])

            # as upstream: from 1e-5 of the rate to the peak at the warm-up's last step, then a cosine to 0
            factor = lr_at(training.state["step"], steps, warmup, ramp="mmengine")
            grad = update(training, model, training.optimizers, factor)

        # after the last batch of an optimizer step: validate where it is due, log, save, stop
        if accelerator.sync_gradients:
            finish_step(training, grad=grad)


def save_results(head, dims, out, steps, found):
    """Write the trained tensors under upstream's names, with `dims` of the base in the file's metadata, and
    the scores of the validation."""
    with atomic_path(out / "head.safetensors") as temporary:
        save_file(head.upstream_state(), temporary, metadata={"dims": json.dumps(dims)})
    atomic_json(out / "metrics.json", {"steps": steps, **found})
    print(" ".join([f"wrote {out / 'head.safetensors'}", *(f"{k} {v:.3f}" for k, v in found.items())]))


def main(args):
    # the configuration says what the model is and how it is trained; the command line has the last word
    config = read_config(args.config, args.set, args.base_path)
    settle_options(args, config)
    family_of(config)

    # one seed on all processes: DDP starts from equal heads
    accelerator = make_ddp_accelerator(args)
    refuse_idle_options(args, config, accelerator.num_processes)
    seed_everything(args.seed)

    # what is frozen: the base, its data sets (or the features that it left), and SAM's image encoder
    sam, sam_encoder = build_sam(config), None
    if sam is not None:  # bf16 as upstream, whose autocast holds for the encoder, too
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        sam_encoder = SAMImageEncoder(sam).to(accelerator.device, dtype)
    base, sets, dims = frozen_part(config, args, accelerator, sam_encoder)

    # what is trained; the same seed gives the same head whether or not features were cached just now
    seed_everything(args.seed)
    head = make_head(config, dims, sam, args, accelerator)

    def get_features(samples):
        """Features of a batch on the device: the cached ones, or what the frozen part makes of it now."""
        return to_device(samples if base is None else extract(base, sam_encoder, samples), accelerator.device)

    # a batch stays a list, because pictures and numbers of phrases differ; the number of steps follows from
    # the prepared loader, whose length is that of one process
    loader = make_loader(sets["train"], args, collate_fn=list)
    model, optimizer, loader = accelerator.prepare(head, make_optimizer(head, args), loader)
    val_loader = validation_loader(sets["val"], args, accelerator) if "val" in sets else None
    steps = plan_steps(args, loader)

    # everything is checked: from here on the run folder holds what happens
    out = open_run(args.out, args, accelerator, args.resume, args.overwrite)
    accelerator.print(f"base: {describe_base(base)}; attention channels {dims[0]}\nhead: {describe(head)}")
    pictures = args.batch_size * args.accum * accelerator.num_processes
    accelerator.print(f"{len(sets['train'])} samples, {pictures} a step, {steps} steps, lr {args.lr:g}")

    # a stop signal ends the validation between two batches; with a sharded base all processes at the same one
    def scores():
        if val_loader is None:
            return {}
        # a process whose share is empty has to meet the others all the same
        seen = watched(training, val_loader, together=args.shard_base)
        return validate(head, seen, get_features, accelerator)

    training = start(accelerator, args, steps, [optimizer], scores)
    learn(training, model, loader, get_features, config["optim"].get("coarse_first", 0))

    # the head alone and its validation; every step is saved, so a stop signal now ends the run at once
    found = scores()
    if accelerator.is_main_process:
        save_results(head, dims, out, steps, found)
    finish(training, **found)


if __name__ == "__main__":
    run(main, parse_args())
