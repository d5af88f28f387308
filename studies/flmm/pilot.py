"""The pilot: masks from the features of places times the embeddings of words, without any attention. It is
the control that the heads of the real study have to pass.

    python studies/flmm/pilot.py --base runs/real/flmm/base --data grounding/train* --test grounding/val* \\
        --out runs/real/flmm/pilot-0

It has the same photographs, tower features and word embeddings as the base, and learns from the masks of all
training photographs what base and head learn from parts of them. OUT gets results.json, phrases.csv and
masks.json as those of flmm/test.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import ConcatDataset

from common.arguments import Parser, number
from common.errors import run
from common.run import open_run, progress, seed_everything
from common.train import lr_at
from flmm.data.phrases import PhraseDataset
from flmm.data.samples import SampleBuilder
from flmm.losses import dice_loss, resize_masks
from flmm.models.flmm import confidence, unpad_crop
from flmm.models.frozen_efficientnet import FrozenEfficientNet
from flmm.test import score, write_results

RANK, DROPOUT = 64, 0.3  # numbers that are compared, and the share of each vector that is left out
TOGETHER = 8  # photographs a step


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base of teach_base.py")
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="folders of phrases to learn from"
    )
    parser.add_argument("--test", type=Path, nargs="+", required=True, help="folders of phrases to score")
    parser.add_argument("--steps", type=number(int, 1), default=225, help="optimizer steps")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="random seed")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder that --out names")
    return parser.parse_args(argv)


class Pilot(nn.Module):
    """Features (C, h, w) of a picture and words (n, d) of its phrases -> mask logits (n, 2h, 2w)."""

    def __init__(self, channels, width):
        super().__init__()
        self.places, self.words = nn.Conv2d(channels, RANK, 1), nn.Linear(width, RANK)
        self.size = nn.Linear(width, 1)  # how much of a picture such a thing covers

    def forward(self, features, words):
        places = self.places(F.dropout(features, DROPOUT, self.training)[None])[0]
        logits = (
            torch.einsum("nr,rhw->nhw", self.words(words), places) / RANK**0.5 + self.size(words)[..., None]
        )
        return F.interpolate(logits[:, None], scale_factor=2, mode="bilinear")[:, 0]


@torch.no_grad()
def samples_of(base, folders):
    """Samples of all records with "features" (C, h, w) of the tower and "words" (n, d), the mean embedding of
    each phrase; one for each picture and caption."""
    build, table = SampleBuilder.of(base), base.model.get_input_embeddings().weight
    spread, samples, seen = (table - table.mean(0)).norm(dim=1).mean(), [], {}
    data = ConcatDataset([PhraseDataset(folder, build=build) for folder in folders])
    for i in progress(range(len(data)), desc="features"):
        sample = data[i]
        name, grid = sample["file_name"], base.grid(sample)
        if name not in seen:
            states = base.model.model.vision_tower(sample["pixel_values"][None]).last_hidden_state[0]
            seen[name] = states.T.unflatten(1, grid)
        texts = [" " + info["text"].strip() for info in sample["mask_infos"]]
        ids = [base.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        words = torch.stack([(table[i].mean(0) - table.mean(0)) / spread for i in ids])
        samples.append({**sample, "features": seen[name], "words": words})
    return samples


def predict(pilot, sample):
    """Mask logits (n, h, w) of a sample, the padding cut off."""
    return unpad_crop(pilot(sample["features"], sample["words"]), sample["meta_data"])


def learn(pilot, samples, steps):
    """Train with the loss of the real study's heads: dice alone, because cross-entropy makes masks small
    where little is known."""
    optimizer = torch.optim.AdamW(pilot.parameters(), lr=2e-3, weight_decay=0.05)
    for step in progress(range(steps), desc="learning"):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * lr_at(step, steps, 20)
        chosen = torch.randint(len(samples), (TOGETHER,)).tolist()
        logits = [predict(pilot, samples[i]) for i in chosen]
        masks = [resize_masks(samples[i]["masks"], mask.shape[1:]) for i, mask in zip(chosen, logits)]
        loss = sum(map(dice_loss, logits, masks)) / TOGETHER
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(args):
    base = FrozenEfficientNet.load(args.base, template="plain", question="Describe.")
    out = open_run(args.out, args, Accelerator(), overwrite=args.overwrite)
    train, test = samples_of(base, args.data), samples_of(base, args.test)
    seed_everything(args.seed)
    pilot = Pilot(len(train[0]["features"]), train[0]["words"].shape[1])
    learn(pilot, train, args.steps)

    # Scored as heads are.
    pilot.eval()
    rows = []
    with torch.no_grad():
        for sample in test:
            logits = predict(pilot, sample)
            output = {"pred_masks": logits, "sam_pred_masks": None, "scores": confidence(logits)}
            rows += score([sample], [None], [output])
    results = write_results(out, rows, split="test")
    print(f"{len(rows)} phrases, mIoU {results['mIoU']:.3f}")


if __name__ == "__main__":
    run(main, parse_args())
