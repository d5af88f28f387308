"""Join EfficientNet-lite0 and SmolLM2-135M to a base of the LLaVA class that has seen photographs with
captions and the boxes of their phrases.

    python studies/flmm/teach_base.py --tower efficientnet-lite0.pth --llm SmolLM2-135M-Instruct \\
        --data grounding --out runs/real/flmm/base

Only the projector between them learns, and in closed form: what lies in the box of a phrase becomes, as
nearly as a linear map can, the mean embedding of its words. (LLaVA-1.5 has seen the boxes of RefCOCO and
Visual Genome; captions alone do not suffice with so few photographs, see RESULTS.md.) OUT is the folder that
stays frozen. --random names what gets random weights instead: the controls.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
import torch.nn.functional as F
from torch.utils.data import ConcatDataset
from transformers import LlavaConfig, LlavaForConditionalGeneration

from common.arguments import Parser, number
from common.errors import UserError, run
from common.llm import load_llm, load_tokenizer
from common.run import describe
from common.weights import read_weights
from flmm.data.phrases import PhraseDataset
from flmm.data.samples import SampleBuilder
from flmm.models.frozen_efficientnet import EfficientNetLite, EfficientNetLiteConfig, FrozenEfficientNet
from flmm.models.tiny import save_base

QUESTION = "Describe."
RIDGE = 1000.0  # weight decay of the closed form


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--tower", type=Path, required=True, help="weights of EfficientNet-lite0 (.pth)")
    parser.add_argument("--llm", type=Path, required=True, help="folder of the language model")
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="folders of phrases to learn from"
    )
    parser.add_argument(
        "--fifths", type=number(int, 0, 4), nargs="+", help="learn from these fifths of the pictures only"
    )
    parser.add_argument("--random", choices=["tower", "llm"], help="the part that gets random weights")
    parser.add_argument("--side", type=number(int, 64), default=448, help="pixels of a picture's long side")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="random seed of the random weights")
    parser.add_argument("--out", type=Path, required=True, help="folder of the base to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder that --out names")
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
    centre, mean = words.mean(0), features.mean(0)
    features, targets = features - mean, targets - centre
    x, y = features * weights[:, None], targets * weights[:, None]
    solved = torch.linalg.solve(x.T @ x + RIDGE * torch.eye(x.shape[1]), x.T @ y)
    predicted = features @ solved
    matrix = ((words - centre).norm(dim=1).mean() / predicted.norm(dim=1).mean() * solved).T

    # The projector is two linear maps; the second one starts as the identity.
    projector = base.model.model.multi_modal_projector
    projector.linear_1.weight.copy_(matrix)
    projector.linear_1.bias.copy_(centre - matrix @ mean)
    projector.linear_2.weight.copy_(torch.eye(len(centre)))
    projector.linear_2.bias.zero_()
    return F.cosine_similarity(predicted, targets).mean().item()


def main(args):
    if args.out.exists() and not args.overwrite:
        raise UserError(f"{args.out} is there already; choose a new folder or add --overwrite")
    torch.manual_seed(args.seed)
    model, tokenizer = join(args)
    processor = FrozenEfficientNet.make_processor(model.config, {})
    base = FrozenEfficientNet(model, tokenizer, processor, question=QUESTION)
    data = ConcatDataset(
        [PhraseDataset(folder, build=lambda record: record, fifths=args.fifths) for folder in args.data]
    )
    records = [data[i] for i in range(len(data))]
    phrases = sum(len(record["mask_infos"]) for record in records)
    print(f"{describe(model)}; {phrases} phrases in {len(records)} captions")
    print(f"patches and words of their phrases: cosine {align(base, records):.3f}")
    save_base(model, tokenizer, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main, parse_args())
