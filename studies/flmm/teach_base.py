"""Join EfficientNet-lite0 and SmolLM2-135M to a base of the LLaVA class and teach it on captions of
photographs; no mask is looked at.

    python studies/flmm/teach_base.py --tower efficientnet-lite0.pth --llm SmolLM2-135M-Instruct \\
        --data grounding --out runs/real/flmm/base-0

First the projector alone: each phrase of a caption must be nearer to some patch of its own picture than to
the patches of other pictures, in the language model's word embeddings. Then projector and LoRA together learn
to write the captions. LoRA is merged, and OUT/base is the folder that stays frozen. --random names what gets
random weights instead: the controls.
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


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--tower", type=Path, required=True, help="weights of EfficientNet-lite0 (.pth)")
    parser.add_argument("--llm", type=Path, required=True, help="folder of the language model")
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="folders of phrases to learn from"
    )
    parser.add_argument("--random", choices=["tower", "llm"], help="the part that gets random weights")
    parser.add_argument("--side", type=number(int, 64), default=448, help="pixels of a picture's long side")
    parser.add_argument(
        "--align-steps", type=number(int, 0), default=400, help="steps of the projector before the captions"
    )
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


@torch.no_grad()
def patches_and_phrases(base, records):
    """Tower features (pictures, N, C), and per picture its phrases as mean word embeddings (n, d)."""
    words = base.model.get_input_embeddings().weight
    features, phrases, seen = [], [], {}
    for record in records:
        name = record["file_name"]
        if name not in seen:
            seen[name] = len(features)
            pixels = base.image_processor(record["image"])["pixel_values"][None]
            features.append(base.model.model.vision_tower(pixels).last_hidden_state[0])
            phrases.append({})
        for info in record["mask_infos"]:
            ids = base.tokenizer(" " + info["text"].strip(), add_special_tokens=False).input_ids
            phrases[seen[name]][info["text"]] = words[ids].mean(0)
    return torch.stack(features), [torch.stack(list(p.values())) for p in phrases]


def align(base, records, steps, seed, pictures=16, temperature=0.07):
    """Teach the projector where words belong from captions alone: multiple-instance contrast over patches.

    The score of a phrase in a picture is the soft maximum over patches of their cosine; among the pictures of
    a step the phrase's own must win.
    """
    projector = base.model.model.multi_modal_projector.requires_grad_(True)
    features, phrases = patches_and_phrases(base, records)
    words = base.model.get_input_embeddings().weight.detach()
    centre, length = words.mean(0), (words - words.mean(0)).norm(dim=1).mean()
    optimizer = torch.optim.AdamW(projector.parameters(), 1e-3, weight_decay=0.05)
    rng = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = torch.randperm(len(features), generator=rng)[:pictures].tolist()
        projected = projector(features[chosen])  # (P, N, d)
        tokens = F.normalize(projected - centre, dim=-1)
        targets = torch.cat([phrases[k] for k in chosen])
        owner = torch.tensor([i for i, k in enumerate(chosen) for _ in phrases[k]])
        cosine = torch.einsum("qd,pnd->qpn", F.normalize(targets - centre, dim=-1), tokens)
        scores = (cosine / temperature).logsumexp(-1)
        # a phrase that another picture of the step holds, too, is no contrast there
        same = F.normalize(targets, dim=-1) @ F.normalize(targets, dim=-1).T > 0.999
        holds = torch.zeros(len(targets), len(chosen), dtype=torch.bool)
        for q in range(len(targets)):
            holds[q, owner[same[q]]] = True
        holds[torch.arange(len(targets)), owner] = False
        loss = F.cross_entropy(scores.masked_fill(holds, -1e4), owner)
        loss = loss + ((projected - centre).norm(dim=-1) / length - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps)
    return loss.item() if steps else float("nan")


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
    accelerator.print(f"alignment loss {align(base, records, args.align_steps, args.seed):.3f}")

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
