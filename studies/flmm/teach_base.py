"""Join EfficientNet-lite0 and SmolLM2-135M to a base of the LLaVA class and teach it on photographs with
captions and boxes of their phrases.

    python studies/flmm/teach_base.py --tower efficientnet-lite0.pth --llm SmolLM2-135M-Instruct \\
        --data grounding --out runs/real/flmm/base-0

First the projector, in closed form: what lies in the box of a phrase becomes, as nearly as a linear map can,
the mean embedding of its words. (LLaVA-1.5 has seen the boxes of RefCOCO and Visual Genome; captions alone do
not suffice with so few photographs, see RESULTS.md.) Then projector and LoRA together learn to write the
captions. LoRA is merged, and OUT/base is the folder that stays frozen. --random names what gets random
weights instead: the controls.
"""

import sys
from pathlib import Path

# repository root: every way of starting this file finds it
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch.utils.data import ConcatDataset, Dataset
from transformers import LlavaConfig, LlavaForConditionalGeneration

from common.arguments import Parser, add_run_arguments, number
from common.errors import run
from common.llm import add_lora, load_llm, load_tokenizer
from common.run import describe, open_run, seed_everything
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
)
from common.weights import read_weights
from flmm.data.phrases import PhraseDataset
from flmm.data.samples import SampleBuilder
from flmm.models.frozen_efficientnet import EfficientNetLite, EfficientNetLiteConfig, FrozenEfficientNet
from flmm.models.tiny import save_base
from studies.flmm.pretrain_base import caption_batch

QUESTION = "Describe."
COMPONENTS, RIDGE = 256, 300.0  # of the closed form: principal components of the features, weight decay


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--tower", type=Path, required=True, help="weights of EfficientNet-lite0 (.pth)")
    parser.add_argument("--llm", type=Path, required=True, help="folder of the language model")
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="folders of phrases to learn from"
    )
    parser.add_argument("--random", choices=["tower", "llm"], help="the part that gets random weights")
    parser.add_argument("--side", type=number(int, 64), default=448, help="pixels of a picture's long side")
    parser.add_argument("--rank", type=number(int, 1), default=16, help="rank of LoRA")
    add_run_arguments(
        parser,
        omit=["eval_every"],
        lr=5e-4,
        batch_size=4,
        max_steps=200,
        warmup=20,
        save_every=0,
        log_every=20,
    )
    return parser.parse_args(argv)


def join(args):
    """Tower, fresh projector and language model as one base of the LLaVA class, with an image token."""
    tokenizer = load_tokenizer(args.llm)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    llm = load_llm(args.llm, torch.float32)
    llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = LlavaConfig(
        vision_config=EfficientNetLiteConfig(image_size=args.side),
        text_config=llm.config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(args.side // 32) ** 2,
        projector_hidden_act="linear",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    if args.random != "tower":
        tower = EfficientNetLite(config.vision_config)
        tower.load_state_dict(read_weights(args.tower))
        model.model.vision_tower.load_state_dict(tower.state_dict())
    if args.random != "llm":
        model.model.language_model.load_state_dict(llm.model.state_dict())
        model.tie_weights()
    return model, tokenizer


class Captions(Dataset):
    """Samples of a base without masks, closed by the end token."""

    def __init__(self, base, records):
        self.build, self.records = SampleBuilder.of(base), records
        self.end = torch.tensor([base.tokenizer.eos_token_id])

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = {k: v for k, v in self.records[index].items() if k != "masks"}
        sample = self.build(record)
        for name in ("input_ids", "labels"):
            sample[name] = torch.cat([sample[name], self.end])
        return sample


def boxes_of(masks, side):
    """Padded masks (n, S, S) -> (n, side^2) bool: the cells of a side x side grid in the box of each."""
    cells = F.adaptive_max_pool2d(masks[None].float(), side)[0] > 0
    rows, columns = cells.any(2), cells.any(1)

    def between(flags):
        """From the first True of each row to the last."""
        return (flags.cumsum(1) > 0) & (flags.flip(1).cumsum(1) > 0).flip(1)

    return (between(rows)[:, :, None] & between(columns)[:, None]).flatten(1)


@torch.no_grad()
def patches_and_words(base, records):
    """Tower features of the patches in the boxes of all phrases (P, C), the mean word embedding of each
    patch's phrase (P, d), and its weight (P,): the patches of a box weigh less the more they are."""
    build, words = SampleBuilder.of(base), base.model.get_input_embeddings().weight
    features, targets, weights, seen = [], [], [], {}
    for record in records:
        sample, name = build(record), record["file_name"]
        if name not in seen:
            seen[name] = base.model.model.vision_tower(sample["pixel_values"][None]).last_hidden_state[0]
        inside = boxes_of(sample["padded_masks"], base.grid(sample)[0])
        for info, box in zip(record["mask_infos"], inside):
            ids = base.tokenizer(" " + info["text"].strip(), add_special_tokens=False).input_ids
            count = int(box.sum())
            features.append(seen[name][box])
            targets.append(words[ids].mean(0).expand(count, -1))
            weights.append(torch.full((count,), max(count, 1) ** -0.5))
    return torch.cat(features), torch.cat(targets), torch.cat(weights)


@torch.no_grad()
def align(base, records):
    """Set the projector in closed form: ridge regression of a phrase's words on the features in its box,
    brought to the length of word embeddings. Returns the cosine of what it predicts and the words."""
    features, targets, weights = patches_and_words(base, records)
    words = base.model.get_input_embeddings().weight
    centre = words.mean(0)
    mean = features.mean(0)
    _, deviations, axes = torch.linalg.svd(torch.cov((features - mean).T))
    whiten = axes[:COMPONENTS].T / (deviations[:COMPONENTS] + 1e-3).sqrt()
    x, y = (features - mean) @ whiten * weights[:, None], (targets - centre) * weights[:, None]
    solved = torch.linalg.solve(x.T @ x + RIDGE * torch.eye(x.shape[1]), x.T @ y)
    predicted = (features - mean) @ whiten @ solved
    scale = (words - centre).norm(dim=1).mean() / predicted.norm(dim=1).mean()

    # The projector is two linear maps; the second one starts as the identity.
    projector, matrix = base.model.model.multi_modal_projector, (whiten @ solved * scale).T
    projector.linear_1.weight.copy_(matrix)
    projector.linear_1.bias.copy_(centre - matrix @ mean)
    projector.linear_2.weight.copy_(torch.eye(len(centre)))
    projector.linear_2.bias.zero_()
    return F.cosine_similarity(predicted, targets - centre).mean().item()


def main(args):
    accelerator = make_accelerator(args)
    seed_everything(args.seed)
    model, tokenizer = join(args)
    processor = FrozenEfficientNet.make_processor(model.config, {})
    base = FrozenEfficientNet(model, tokenizer, processor, question=QUESTION)
    data = ConcatDataset([PhraseDataset(folder, build=lambda record: record) for folder in args.data])
    records = [data[i] for i in range(len(data))]
    out = open_run(args.out, args, accelerator, args.resume, args.overwrite)
    accelerator.print(f"{describe(model)}; {len(records)} captions")
    accelerator.print(f"patches and words of their phrases: cosine {align(base, records):.3f}")

    # The captions train the projector and LoRA.
    tuned = add_lora(model, args.rank, 2 * args.rank, targets=["q_proj", "k_proj", "v_proj", "o_proj"])
    model.model.multi_modal_projector.requires_grad_(True)
    loader = make_loader(Captions(base, records), args, collate_fn=list)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    group = {"params": trained, "lr": args.lr, "peak": args.lr}
    optimizer = torch.optim.AdamW([group], weight_decay=args.weight_decay)
    tuned, optimizer, loader = accelerator.prepare(tuned, optimizer, loader)
    steps = plan_steps(args, loader)

    # The loop. The loss is a mean over the words of the captions, so the share is counted in words.
    training = start(accelerator, args, steps, [optimizer])
    for samples, share in batches(
        training, loader, lambda batch: sum((s["labels"] != -100).sum() for s in batch)
    ):
        with accelerator.accumulate(tuned):
            loss = tuned(**caption_batch(base, samples)).loss * share
            check_finite(training, [s["file_name"] for s in samples], loss=loss)
            accelerator.backward(loss)
            grad = update(training, tuned, [optimizer], lr_at(training.state["step"], steps, args.warmup))
        if accelerator.sync_gradients:
            finish_step(training, grad=grad)

    # LoRA becomes part of the weights, and the folder is one that `from_pretrained` reads.
    if accelerator.is_main_process:
        merged = accelerator.unwrap_model(tuned).merge_and_unload()
        save_base(merged.eval(), tokenizer, out / "base")
        print(f"wrote {out / 'base'}")
    finish(training)
    accelerator.end_training()


if __name__ == "__main__":
    run(main, parse_args())
