"""Pre-train the vision part on patch labels, so that the later stages have something to look at.

    python dia_pangu/pretrain_vit.py --data data/dia_pangu --size tiny --out runs/dia_pangu/vit
    python dia_pangu/pretrain_vit.py --data data/dia_pangu --size tiny --start runs/dia_pangu/vit --contrast 6 --out runs/dia_pangu/ctr

Upstream's first stage trains the Perceiver behind a ViT that Dia-LLaMA has trained; behind an untrained ViT it learns
nothing. Here every patch token learns which findings its voxels carry (masks/ of the data), and with --contrast the
prototypes, memories and temperature learn to tell present from absent, as in the loss of the full model. The prototypes
start at the logarithm of where each finding is seen in the training masks, the memories as `start_memories` says. Then a
logistic vote joins prototypes and patches to one diagnosis, and places.json says on which side and where each volume of
train and val shows each finding, for prompts that name it.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # repository root: every way of starting this file finds it

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from common.checkpoint import atomic_path, atomic_write
from common.errors import UserError, run
from common.run import describe, open_run, progress, seed_everything
from dia_pangu.evaluate.evidence import locate_all
from dia_pangu.evaluate.findings import finding_scores
from dia_pangu.src.Dataset.CTRG_dataset import CTRGDataset, collate
from dia_pangu.src.Model.build import SIZES, load_start, make_grid, read_config
from dia_pangu.src.Model.my_embedding_layer import NUM_FINDINGS, MyEmbedding
from dia_pangu.src.My_Trainer.trainer import Trainer, add_optimization, with_dashes


class PatchModel(nn.Module):
    """The evidence head on the patch tokens; with `contrast` also the model's own contrastive loss."""

    def __init__(self, embedding_layer: MyEmbedding, weight: torch.Tensor, contrast: float):
        super().__init__()
        self.embedding_layer = embedding_layer
        nn.init.constant_(embedding_layer.evidence_head.bias, -4.0)  # most patches carry nothing
        self.register_buffer("weight", weight)
        self.contrast = contrast

    def forward(self, vision_x, patch_labels, cls_labels, num_tokens=None, num_samples=None):
        tokens = self.embedding_layer.encode(vision_x)
        logits = self.embedding_layer.evidence_head(tokens[:, 0])
        share = len(vision_x) / (num_samples or len(vision_x))
        losses = F.binary_cross_entropy_with_logits(logits, patch_labels, pos_weight=self.weight)
        found = logits.sigmoid().amax(1) if not self.contrast else self.embedding_layer.probability(tokens)
        out = {"loss": losses * share, "patch_loss": losses * share, "probability": found.detach()}
        if self.contrast:
            sim = self.embedding_layer.similarity(tokens)
            own = (
                torch.where(cls_labels.bool()[..., None], sim, sim.flip(-1))
                / self.embedding_layer.temperature()
            )
            out["ctr_loss"] = (
                F.cross_entropy(own.flatten(0, 1), own.new_zeros(own.shape[:2], dtype=torch.long).flatten())
                * share
            )
            out["loss"] = out["loss"] + self.contrast * out["ctr_loss"]
        return out


@torch.no_grad()
def start_memories(layer: MyEmbedding, data: CTRGDataset, volumes):
    """Begin the contrast where the patch labels have led: `proj` whitens the finding features of these training volumes
    (what all volumes share is gone, so that a cosine speaks of the difference), memories are the means of the volumes with
    and without each finding. Before any training this tells findings apart; from random memories it takes many epochs."""
    layer.eval()
    samples = [collate([data[i]]) for i in volumes]
    features = torch.cat(
        [layer.finding_features(layer.encode(batch["vision_x"])) for batch in samples]
    )  # (N, 14, dim)
    present = torch.cat([batch["cls_labels"] for batch in samples]).float()
    centred = (features - features.mean(0)).flatten(0, 1)
    spread, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
    whiten = (axes * spread.clamp(min=1e-4 * spread.max()).rsqrt()) @ axes.T
    layer.proj.weight.copy_(whiten)
    layer.proj.bias.copy_(-whiten @ features.mean((0, 1)))
    z = F.normalize(layer.proj(features), dim=-1)
    for memory, share in ((layer.pos_sample_memory, present), (layer.neg_sample_memory, 1 - present)):
        mean = torch.einsum("bc,bcd->cd", share, z) / share.sum(0)[:, None].clamp(min=1)
        memory[:, 0] = torch.where(share.sum(0)[:, None] > 0, F.normalize(mean, dim=-1), memory[:, 0])


@torch.no_grad()
def evaluate(model, loader, accelerator) -> dict:
    """Micro-F1 of the findings: by the prototypes when these are trained, else by the most suspicious patch."""
    probabilities, labels = [], []
    for batch in loader:
        found = model(batch["vision_x"], batch["patch_labels"], batch["cls_labels"])["probability"]
        found, truth = accelerator.gather_for_metrics((found, batch["cls_labels"]))
        probabilities.append(found)
        labels.append(truth)
    scores = finding_scores(torch.cat(labels).cpu().numpy(), (torch.cat(probabilities) >= 0.5).cpu().numpy())
    return {"micro_f1": scores["micro"]["F1"], "macro_f1": scores["macro"]["F1"]}


@torch.no_grad()
def look_again(layer: MyEmbedding, train_set, val_set, device) -> dict:
    """Fit the vote of prototypes and patches on the training volumes, and return {id: {finding: [side, place]}} of train and
    val: what the evidence head sees there, for training prompts; in a new volume the model sees it for itself."""
    places, heard, labels = {}, [], []
    for data in (train_set, val_set):
        for first in progress(range(0, len(data), 8), desc=f"evidence, {data.split}"):
            batch = collate([data[i] for i in range(first, min(first + 8, len(data)))])
            if "error" in batch:
                raise UserError(batch["error"])
            vision_x = batch["vision_x"].to(device)
            tokens = layer.encode(vision_x)
            places |= dict(zip(batch["id"], locate_all(layer, tokens, vision_x, data.grid.preprocess)[1]))
            if data is train_set:
                heard.append(layer.witnesses(tokens).cpu())
                labels.append(batch["cls_labels"])
    heard, labels = torch.cat(heard).numpy(), torch.cat(labels).numpy()
    for c in range(NUM_FINDINGS):
        if 0 < labels[:, c].sum() < len(labels):
            fitted = LogisticRegression(C=0.3, max_iter=1000).fit(heard, labels[:, c])
            layer.evidence_vote.weight[c] = torch.from_numpy(fitted.coef_[0])
            layer.evidence_vote.bias[c] = float(fitted.intercept_[0])
    return places


def main(args):
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    seed_everything(args.seed)
    config = read_config(args)
    grid = make_grid(config)
    layer = MyEmbedding(num_embeddings=1, embedding_dim=8, **config["embedding"] | {"evidence_head": True})
    options = {"language": config["language"], "cache": args.cache, "patches": layer.vision_encoder.patch}
    train_set = CTRGDataset(args.data, "train", grid, limit=args.limit, **options)
    val_set = CTRGDataset(args.data, "val", grid, limit=args.limit, **options)
    if not (train_set.data / "masks").is_dir():
        raise UserError(
            f"{args.data}: no masks/ folder; patch labels need <id>.nii.gz bit masks there (see make_data.py)"
        )

    share = torch.zeros(
        layer.n_tok, NUM_FINDINGS
    )  # how often each patch carries each finding, over at most 400 volumes
    counted = range(0, len(train_set), max(1, len(train_set) // 400))
    for i in counted:
        sample = train_set[i]
        if "error" in sample:
            raise UserError(sample["error"])
        share += sample["patch_labels"] / len(counted)
    weight = (0.05 / share.mean(0).clamp(min=1e-4)).clamp(1, 5)
    model = PatchModel(layer, weight, args.contrast)
    if args.start:
        load_start(model, args.start)
    layer.prototype.data = (share.T + 0.003).log()
    if args.start and args.contrast and not args.resume:
        start_memories(layer, train_set, counted)
    fast = {"prototype", "pos_sample_memory", "neg_sample_memory", "temp"}
    named = dict(layer.named_parameters())
    learns = (*fast, "proj.weight", "proj.bias") if args.contrast else ()
    trained = [
        name for name in named if name.startswith(("vision_encoder.", "evidence_head.")) or name in learns
    ]
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)
    groups = [
        {"params": [named[name] for name in trained if name not in fast]},
        {"params": [named[name] for name in trained if name in fast], "lr_scale": args.prototype_lr_scale},
    ]
    accelerator.print(describe(model), "| patches", layer.n_tok, "| volumes", len(train_set))
    out = open_run(args.output_dir, args, accelerator, args.resume, args.overwrite)
    trainer = Trainer(
        model,
        args,
        accelerator,
        train_set,
        collate,
        ("vision_x", "patch_labels", "cls_labels"),
        [group for group in groups if group["params"]],
        val_set,
        evaluate,
    )
    trainer.train()
    if accelerator.is_main_process:
        layer = accelerator.unwrap_model(trainer.model).embedding_layer.eval()
        if args.contrast:
            atomic_write(
                out / "places.json", json.dumps(look_again(layer, train_set, val_set, accelerator.device))
            )
        keep = {
            f"embedding_layer.{key}": value.cpu().contiguous()
            for key, value in layer.state_dict().items()
            if key.startswith(("vision_encoder.", "evidence_", "prototype", "proj.", "pos_", "neg_", "temp"))
        }
        with atomic_path(out / "vision.safetensors") as temporary:
            save_file(keep, temporary)
    accelerator.end_training()


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="folder in the CTRG format with masks/")
    parser.add_argument(
        "--size", choices=SIZES, default="tiny", help="sizes of the vision part (default %(default)s)"
    )
    parser.add_argument("--config", help="JSON file with the keys of dia_config.json, instead of --size")
    parser.add_argument(
        "--preprocess", choices=("windows", "upstream"), help="default: the configuration's, windows"
    )
    parser.add_argument("--cache", help="folder for prepared volumes; makes the second epoch fast")
    parser.add_argument("--limit", type=int, default=0, help="use only the first volumes; 0: all")
    parser.add_argument("--start", help="run directory of this script to start from")
    parser.add_argument(
        "--contrast",
        type=float,
        default=0.0,
        help="weight of the contrastive loss; 0: patch labels alone (default)",
    )
    parser.add_argument(
        "--prototype-lr-scale",
        type=float,
        default=5.0,
        help="rate of prototypes, memories and temperature, as a multiple (default %(default)s)",
    )
    parser.set_defaults(language=None)  # no text is read here
    add_optimization(
        parser,
        learning_rate=2e-3,
        max_steps=800,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        adam_beta2=0.98,
    )
    return parser.parse_args(with_dashes(sys.argv[1:]))


if __name__ == "__main__":
    run(main, parse_args())
