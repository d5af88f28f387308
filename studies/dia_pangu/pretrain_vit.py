r"""Pre-train the vision part on patch labels, so that the later stages have features to work with.

    python studies/dia_pangu/pretrain_vit.py --data data/dia_pangu --size tiny --out runs/patches
    python studies/dia_pangu/pretrain_vit.py --data data/dia_pangu --size tiny --start runs/patches \
        --contrast 2 --out runs/contrast

Upstream's first stage trains the Perceiver behind a ViT that Dia-LLaMA has trained; behind an untrained ViT
it learns nothing. Here an evidence head on every patch token learns which findings the voxels of the patch
carry (from masks/ of the data). With --contrast the prototypes, memories and the temperature also learn to
separate present from absent, as in the loss of the full model. The prototypes start at the logarithm of how
often each patch carries each finding in the training masks, the memories as `start_memories` says.

Then a logistic vote of prototypes and patches is fitted on the training volumes, and places.json says on
which side and where the head sees each finding in the volumes of train and val, for prompts that name it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from common.arguments import Parser, add_run_arguments, number, refuse
from common.checkpoint import atomic_json, atomic_path, find_resume
from common.errors import UserError
from common.errors import run as run_script
from common.run import describe, open_run, progress, seed_everything
from common.train import (
    batches,
    check_finite,
    finish,
    finish_step,
    lr_at,
    make_accelerator,
    make_loader,
    parameter_groups,
    plan_steps,
    start,
    update,
    watched,
)
from dia_pangu.evaluate.evidence import locate_all
from dia_pangu.evaluate.findings import finding_scores
from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset, collate, raise_bad
from dia_pangu.src.Dataset.preprocess import PREPROCESS
from dia_pangu.src.Model.build import SIZES, load_start, make_grid, read_config, settle_preparation
from dia_pangu.src.Model.my_embedding_layer import NUM_FINDINGS, MyEmbedding

# The few parameters of the contrastive loss, which get a higher learning rate than the network.
PROTOTYPES = ("prototype", "pos_sample_memory", "neg_sample_memory", "temp")
KEPT = ("vision_encoder.", "evidence_", "prototype", "proj.", "pos_", "neg_", "temp")  # what is saved


class PatchModel(nn.Module):
    """The evidence head on the patch tokens, and with `contrast` above 0 the contrastive loss of the full
    model.

    weight: (14,) factor on the loss of the patches that carry a finding. contrast: weight of the
    contrastive loss.
    """

    def __init__(self, embedding_layer: MyEmbedding, weight: torch.Tensor, contrast: float):
        super().__init__()
        self.embedding_layer = embedding_layer
        nn.init.constant_(embedding_layer.evidence_head.bias, -4.0)  # most patches carry nothing
        self.register_buffer("weight", weight)
        self.contrast = contrast

    def forward(self, vision_x, patch_labels, cls_labels) -> dict:
        """Return loss, its parts, and the probability of the findings, (B, 14).

        vision_x: (B, 1, 3, H, W, D). patch_labels: (B, n_tok, 14). cls_labels: (B, 14), 1 = present.
        """
        layer = self.embedding_layer
        tokens = layer.encode(vision_x)
        logits = layer.evidence_head(tokens[:, 0])
        patch_loss = F.binary_cross_entropy_with_logits(logits, patch_labels, pos_weight=self.weight)
        if not self.contrast:
            return {
                "loss": patch_loss,
                "patch_loss": patch_loss,
                "probability": logits.sigmoid().amax(1).detach(),
            }
        sim = layer.own_similarity(tokens, cls_labels)
        ctr_loss = F.cross_entropy(sim, sim.new_zeros(len(sim), dtype=torch.long))
        return {
            "loss": patch_loss + self.contrast * ctr_loss,
            "patch_loss": patch_loss,
            "ctr_loss": ctr_loss,
            "probability": layer.probability(tokens).detach(),
        }


def patch_statistics(train_set, n_tok: int) -> tuple[torch.Tensor, range]:
    """Return how often each patch carries each finding, (n_tok, 14), over at most 400 training volumes, and
    their indices."""
    # A few hundred volumes say enough about where findings lie.
    counted = range(0, len(train_set), max(1, len(train_set) // 400))
    frequency = torch.zeros(n_tok, NUM_FINDINGS)
    for i in counted:
        sample = train_set[i]
        raise_bad(sample)
        frequency += sample["patch_labels"] / len(counted)
    return frequency, counted


@torch.no_grad()
def start_memories(layer: MyEmbedding, data: CTRGDataset, volumes):
    """Set `proj` and the memories so that the contrastive loss starts from what the patch labels have taught.

    `proj` whitens the finding features of the training volumes `volumes`: what all volumes share is
    removed, so that a cosine measures their difference. The memories are the means of the volumes with and
    without each finding. That separates the findings before any training; from random memories it takes
    many epochs.
    """
    layer.eval()
    samples = [collate([data[i]]) for i in volumes]
    features = torch.cat(
        [layer.finding_features(layer.encode(b["vision_x"])) for b in samples]
    )  # (N, 14, dim)
    present = torch.cat([b["cls_labels"] for b in samples]).float()
    # ZCA whitening; axes of almost no variance are held back, they are noise.
    centred = (features - features.mean(0)).flatten(0, 1)
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
    whiten = (axes * variance.clamp(min=1e-4 * variance.max()).rsqrt()) @ axes.T
    layer.proj.weight.copy_(whiten)
    layer.proj.bias.copy_(-whiten @ features.mean((0, 1)))

    # A finding that never occurs keeps its random memory.
    z = F.normalize(layer.proj(features), dim=-1)
    for memory, chosen in ((layer.pos_sample_memory, present), (layer.neg_sample_memory, 1 - present)):
        count = chosen.sum(0)[:, None]
        mean = torch.einsum("bc,bcd->cd", chosen, z) / count.clamp(min=1)
        memory[:, 0] = torch.where(count > 0, F.normalize(mean, dim=-1), memory[:, 0])


@torch.no_grad()
def evaluate(model, loader, accelerator) -> dict:
    """Return the F1 of the findings at threshold 0.5: by the prototypes where these train, else by the
    clearest patch."""
    model.eval()
    probabilities, labels = [], []
    for batch in loader:
        raise_bad(batch)
        found = model(batch["vision_x"], batch["patch_labels"], batch["cls_labels"])["probability"]
        found, truth = accelerator.gather_for_metrics((found, batch["cls_labels"]))
        probabilities.append(found)
        labels.append(truth)
    model.train()
    scores = finding_scores(torch.cat(labels).cpu().numpy(), (torch.cat(probabilities) >= 0.5).cpu().numpy())
    return {"micro_f1": scores["micro"]["F1"], "macro_f1": scores["macro"]["F1"]}


@torch.no_grad()
def look_at_all(layer: MyEmbedding, data: CTRGDataset, device) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Look at every volume of a set once; return {id: {finding: (side, place)}}, the vote's inputs (N, 28)
    and labels (N, 14)."""
    places, inputs, labels = {}, [], []
    # Batches of 8: as many as fit beside a training that has just ended.
    for first in progress(range(0, len(data), 8), desc=f"evidence, {data.split}"):
        batch = collate([data[i] for i in range(first, min(first + 8, len(data)))])
        raise_bad(batch)
        vision_x = batch["vision_x"].to(device)
        tokens = layer.encode(vision_x)
        _, where = locate_all(layer, tokens, vision_x, data.grid.preprocess, batch["verdict"])
        places |= dict(zip(batch["id"], where))
        inputs.append(layer.vote_inputs(tokens).cpu())
        labels.append(batch["cls_labels"])
    return places, torch.cat(inputs), torch.cat(labels)


@torch.no_grad()
def fit_vote(layer: MyEmbedding, inputs: torch.Tensor, labels: torch.Tensor):
    """Fit the logistic vote of prototypes and patches; inputs (N, 28) and labels (N, 14) are those of
    training volumes."""
    for c in range(NUM_FINDINGS):
        if 0 < labels[:, c].sum() < len(labels):
            fitted = LogisticRegression(C=0.3, max_iter=1000).fit(inputs.numpy(), labels[:, c].numpy())
            layer.evidence_vote.weight[c] = torch.from_numpy(fitted.coef_[0])
            layer.evidence_vote.bias[c] = float(fitted.intercept_[0])


def set_trained(layer: MyEmbedding, contrast: bool):
    """Train ViT and evidence head, with `contrast` also what the contrastive loss reaches; freeze
    everything else."""
    learns = (*PROTOTYPES, "proj.weight", "proj.bias") if contrast else ()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.startswith(("vision_encoder.", "evidence_head.")) or name in learns)


def make_groups(layer: MyEmbedding, args) -> list[dict]:
    """Return the AdamW groups of what trains: the prototypes learn faster than the network, and do not
    decay."""
    parts = (layer.vision_encoder, layer.evidence_head, layer.proj)
    groups = [
        g for part in parts for g in parameter_groups(part, args.lr, args.weight_decay, ("pos_embedding",))
    ]
    fast = [p for name, p in layer.named_parameters() if name in PROTOTYPES and p.requires_grad]
    if fast:
        rate = args.lr * args.prototype_lr_scale
        groups.append({"params": fast, "weight_decay": 0.0, "lr": rate, "peak": rate})
    return groups


def save_vision(layer: MyEmbedding, out, train_set, val_set, contrast: bool, device):
    """Write vision.safetensors and, after the contrastive training, fit the vote and write places.json."""
    # The vote is fitted on training volumes alone; the places of val are read off, nothing is fitted on them.
    if contrast:
        places, inputs, labels = look_at_all(layer, train_set, device)
        fit_vote(layer, inputs, labels)
        places |= look_at_all(layer, val_set, device)[0]
        atomic_json(out / "places.json", places)
    # Only the vision part is kept: the language model comes later.
    keep = {
        f"embedding_layer.{key}": value.cpu().contiguous()
        for key, value in layer.state_dict().items()
        if key.startswith(KEPT)
    }
    with atomic_path(out / "vision.safetensors") as temporary:
        save_file(keep, temporary)


def main(args):
    if not args.contrast:
        refuse(args, ["prototype_lr_scale"], "without --contrast")
    accelerator = make_accelerator(args)
    seed_everything(args.seed)

    config = settle_preparation(read_config(args), args, [args.start] if args.start else [])
    grid = make_grid(config)
    layer = MyEmbedding(num_embeddings=1, embedding_dim=8, **config["embedding"] | {"evidence_head": True})
    options = {"cache": args.cache, "patches": layer.vision_encoder.patch, "limit": args.limit}
    train_set, val_set = (CTRGDataset(args.data, split, grid, **options) for split in ("train", "val"))
    if not (train_set.data / "masks").is_dir():
        raise UserError(
            f"{args.data}: has no folder masks/, but patch labels need the bit masks masks/<id>.nii.gz; "
            "see dia_pangu/make_data.py"
        )

    # Model: rare findings weigh more, the prototypes start where the training masks show each finding.
    frequency, counted = patch_statistics(train_set, layer.n_tok)
    weight = (0.05 / frequency.mean(0).clamp(min=1e-4)).clamp(1, 5)
    model = PatchModel(layer, weight, args.contrast)
    if args.start:
        load_start(model, args.start)
    layer.prototype.data = (frequency.T + 0.003).log()
    if args.start and args.contrast and not (args.resume and find_resume(args.out, accelerator)):
        start_memories(layer, train_set, counted)
    set_trained(layer, bool(args.contrast))
    accelerator.print(f"{describe(model)} | {layer.n_tok} patches | {len(train_set)} volumes")
    out = open_run(args.out, args, accelerator, args.resume, args.overwrite)

    # Two learning rates, one for the network and one for the prototypes.
    optimizer = torch.optim.AdamW(make_groups(layer, args), lr=args.lr, betas=(0.9, args.adam_beta2))
    if args.compile:
        model.compile()
    loader = make_loader(train_set, args, collate_fn=collate)
    val_loader = make_loader(val_set, args, train=False, collate_fn=collate)
    model, optimizer, loader, val_loader = accelerator.prepare(model, optimizer, loader, val_loader)
    steps = plan_steps(args, loader)

    def count(batch) -> int:
        raise_bad(batch)
        return len(batch["id"])

    def eval_scores():
        found = evaluate(model, watched(run, val_loader), accelerator)
        return {f"eval_{key}": value for key, value in found.items()}

    # The loop: a batch's share is its number of volumes.
    run = start(accelerator, args, steps, [optimizer], eval_scores)
    model.train()
    for batch, share in batches(run, loader, count):
        with accelerator.accumulate(model):
            losses = model(batch["vision_x"], batch["patch_labels"], batch["cls_labels"])
            del losses["probability"]
            losses = {name: value * share for name, value in losses.items()}
            check_finite(run, batch["id"], **losses)
            accelerator.backward(losses["loss"])
            grad = update(run, model, [optimizer], lr_at(run.state["step"], steps, args.warmup))
        if accelerator.sync_gradients:
            finish_step(run, grad=grad)
    # What the head is worth on the validation volumes.
    scores = evaluate(model, val_loader, accelerator)

    # The evidence: vote, places, and the folder that --start of the next stage takes.
    if accelerator.is_main_process:
        layer = accelerator.unwrap_model(model).embedding_layer.eval()
        save_vision(layer, out, train_set, val_set, bool(args.contrast), accelerator.device)
        atomic_json(out / "dia_config.json", config)  # how volumes are prepared belongs to the weights
    finish(run, **{f"eval_{key}": value for key, value in scores.items()})


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data", required=True, help="folder in the CTRG format with masks/")
    add("--size", choices=SIZES, default="tiny", help="sizes of the vision part")
    add("--config", help="JSON file with the keys of dia_config.json, instead of --size")
    add("--preprocess", choices=PREPROCESS, help="preparation, instead of that of --start or of the data")
    add("--cache", help="folder for prepared volumes, which makes the second epoch fast")
    add("--limit", type=number(int, 0), default=0, help="use only the first volumes; 0: all")
    add("--start", help="run folder of this script to start from")
    add(
        "--contrast",
        type=number(float, 0),
        default=0.0,
        help="weight of the contrastive loss; 0: patch labels alone",
    )
    add(
        "--prototype-lr-scale",
        type=number(float, 0),
        default=5.0,
        help="learning rate of prototypes, memories and temperature as a multiple of --lr",
    )
    add("--adam-beta2", type=number(float, 0, 1), default=0.98, help="beta 2 of AdamW")
    parser.set_defaults(language=None)  # no text is read here
    # Small batches and a high rate: the ViT of the phantoms is small.
    add_run_arguments(
        parser, lr=2e-3, weight_decay=0.0, max_steps=800, batch_size=8, accum=1, warmup=20, seed=42
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_script(main, parse_args())
