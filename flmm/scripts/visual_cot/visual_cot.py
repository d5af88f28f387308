"""Visual chain-of-thought: look for the object that matters, cut it out, ask again with both pictures.

    python flmm/scripts/visual_cot/visual_cot.py --config CONFIG --head HEAD \\
        --image street.jpg --question "What is on the sign?"

Versions as upstream (scripts/visual_cot): v1 asks for the most relevant object and grounds that answer, v2
grounds the question, v3 is the baseline without a crop. --resample asks again with the picture's own tokens
inside the box instead of a crop that is encoded anew (upstream: visual_cot_resample of the Qwen fork).
--benchmark FILE scores a list [{"image", "question", "answer"}] with a scorer that can be replaced: the
built-in one counts an answer as right if it has the words of the reference.
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch

from common.arguments import Parser, number, refuse
from common.checkpoint import atomic_write
from common.errors import UserError, run
from common.files import inside, read_json
from flmm.build import add_config_arguments, read_config
from flmm.conversation import Grounder
from flmm.data.text import encode_text, words_of
from flmm.data.transforms import load_image

RELEVANT = "First think which object in this image is most relevant to the question."
BENCHMARK = [{"image": str, "question": str, "answer": str}]
STARTED = " The object most relevant to the question is"
SHORT = "Answer the question using a single word or phrase."


def mask_to_crop(mask, scale=1.0):
    """(H, W) mask, > 0 inside -> crop [x0, y0, x1, y1] in whole pixels: half sides at least 8, enlarged by
    `scale`, clipped.

    The whole picture if the mask is empty.
    """
    h, w = mask.shape
    ys, xs = torch.where(mask > 0)
    if not len(ys):
        return [0, 0, w, h]
    box = []
    for at, side in ((xs, w), (ys, h)):
        low, high = at.min().item(), at.max().item()
        centre, half = (low + high) / 2, max((high - low) / 2, 8) * scale
        box.append((max(0, int(centre - half)), min(side, int(centre + half))))
    return [box[0][0], box[1][0], box[0][1], box[1][1]]


def contains(answer, reference):
    """The offline scorer: 1 if the answer has the words of the reference one after another, else 0."""
    said, wanted = (f" {' '.join(words_of(text))} " for text in (answer, reference))
    return float(wanted in said)


@torch.no_grad()
def answer(grounder, images, text, started="", max_new_tokens=32):
    """Greedy answer about one or two pictures; the answer may be started for the model."""
    base = grounder.base
    ids = base.encode_prompt(text)
    if started:
        ids = ids + encode_text(base.tokenizer, started)
    pictures = [{"image": i, **base.image_processor(i)} for i in images]
    new = base.generate({"input_ids": torch.tensor(ids), "pictures": pictures}, max_new_tokens)
    return base.tokenizer.decode(new, skip_special_tokens=True).strip()


def tokens_in_box(box, sample, grid):
    """Flat indices of the image tokens that a box [x0, y0, x1, y1] in pixels of the picture touches, at least
    one.

    grid: (rows, columns) of the padded picture. Start rounded down, end rounded up, as upstream.
    """
    meta, image = sample["meta_data"], sample["image"]

    def cells(low, high, side, original, count):
        """Numbers of the rows or columns between two pixels of the picture."""
        scale, before = meta["image_shape"][side] / original, meta["padding"][f"before_{side}"]
        share = count / meta["padded_shape"][side]  # token sides per processed pixel
        start = min(math.floor((low * scale + before) * share), count - 1)
        end = min(math.ceil((high * scale + before) * share), count)
        return torch.arange(start, max(start + 1, end))

    columns = cells(box[0], box[2], "width", image.width, grid[1])
    rows = cells(box[1], box[3], "height", image.height, grid[0])
    return (rows[:, None] * grid[1] + columns).flatten()


@torch.no_grad()
def visual_cot_resample(base, sample, embeds, positions, box, text, max_new_tokens=32):
    """Greedy answer to `text` that sees only the image tokens inside `box`; the picture is not encoded again.

    embeds (N, d), positions (..., N): the image tokens' input embeddings and rotary positions in an earlier
    pass over the same picture. The tokens left keep their places and the text its own, as if the others were
    there and nobody looked at them. Upstream's Qwen fork drops the positions, and the picture becomes a line
    of text.
    """
    model, ids, embed = base.model, base.encode_prompt(text), base.model.get_input_embeddings()
    at, chosen = ids.index(base.image_token_id), tokens_in_box(box, sample, base.grid(sample))
    words, chosen = torch.tensor(ids, device=embeds.device), chosen.to(embeds.device)
    before, after = embed(words[:at]), embed(words[at + 1 :])

    # Positions (..., S) of the words before the picture, of what is left of it, and of the words after it.
    lead, steps = positions.shape[:-1], torch.arange(max(at, len(after)), device=positions.device)
    behind = positions.max() + 1 + steps[: len(after)]
    where = [steps[:at].expand(*lead, at), positions[..., chosen], behind.expand(*lead, len(after))]
    where = torch.cat(where, -1)
    inputs, cache, seen, new = torch.cat([before, embeds[chosen], after])[None], None, 0, []
    ends = model.generation_config.eos_token_id
    while len(new) < max_new_tokens:
        # without a mask, gaps between positions would be read as borders between packed texts
        seen += inputs.shape[1]
        out = base.decoder(
            inputs_embeds=inputs,
            position_ids=where[..., None, :],
            past_key_values=cache,
            attention_mask=torch.ones(1, seen, device=inputs.device),
            use_cache=True,
        )
        token = int(model.get_output_embeddings()(out.last_hidden_state[:, -1]).argmax())
        if token in (ends if isinstance(ends, list) else [ends]):
            break
        new.append(token)
        cache, where = out.past_key_values, where[..., -1:] + 1
        inputs = embed(torch.tensor([[token]], device=inputs.device))
    return base.tokenizer.decode(new, skip_special_tokens=True).strip()


def chain_of_thought(
    grounder, image, question, version="v1", box_scale=1.0, discard_sam=False, resample=False
):
    """{"answer", "box", "thought"}; box and thought are None for v3."""
    base, short = grounder.base, f"{question} {SHORT}"
    if version == "v3":
        return {"answer": answer(grounder, [image], short), "box": None, "thought": None}
    thought = ""
    if version == "v1":
        told = answer(grounder, [image], f"{question} {RELEVANT}", STARTED, max_new_tokens=16)
        thought = told.split(".")[0]
    thought, kept = thought or question, {}

    def keep(module, args, inputs):
        kept.update(embeds=inputs["inputs_embeds"][0], positions=inputs["position_ids"][..., 0, :])

    hook = base.decoder.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        result = grounder.ground(image, phrases=[thought])
    finally:
        hook.remove()
    mask = torch.from_numpy(result["coarse_masks" if discard_sam else "masks"][0])
    box = mask_to_crop(mask, box_scale)
    if resample:
        sample = {"image": image, **base.image_processor(image)}
        if base.maps_per_head > 1:
            name = type(base).__name__
            raise UserError(f"--resample: {name} writes a picture as tiles, no plain grid; leave it out")
        # the picture stands before every word that differs; separators in it are no part of the grid
        ids = base.expand(torch.tensor(base.encode_prompt()), sample)
        at = base.columns_of(ids, sample)
        embeds, positions = kept["embeds"][at], kept["positions"][..., at]
        reply = visual_cot_resample(base, sample, embeds, positions, box, short)
    else:
        region = f"This is the image region that might help you answer the question: {short}"
        reply = answer(grounder, [image, image.crop(box)], ["This is the whole image. ", region])
    return {"answer": reply, "box": box, "thought": thought}


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_config_arguments(parser, data=False)
    parser.add_argument("--head", type=Path, required=True, help="trained head")
    parser.add_argument("--image", type=Path, help="picture to ask about")
    parser.add_argument("--question", help="what to ask")
    parser.add_argument(
        "--benchmark", type=Path, help="JSON list of {image, question, answer}; images relative to the file"
    )
    parser.add_argument("--version", choices=["v1", "v2", "v3"], default="v1", help="see above")
    parser.add_argument(
        "--box-scale", type=number(float, 0.1), default=1.0, help="enlarge the crop by this factor"
    )
    parser.add_argument("--discard-sam", action="store_true", help="crop by the coarse mask")
    parser.add_argument(
        "--resample",
        action="store_true",
        help="ask again with the picture's tokens inside the box, not with a crop",
    )
    parser.add_argument("--out", type=Path, help="write the results of --benchmark here (.json)")
    return parser.parse_args(argv)


def main(args):
    if args.version == "v3":
        refuse(args, ["box_scale", "discard_sam", "resample"], "with --version v3, which looks for no box")
    if args.benchmark:
        refuse(args, ["image", "question"], "beside --benchmark")
        items = read_json(args.benchmark, BENCHMARK)
        paths = [inside(args.benchmark.parent, item["image"]) for item in items]
    elif args.image and args.question:
        items, paths = [{"image": args.image.name, "question": args.question}], [args.image]
    else:
        raise UserError("give --image and --question, or --benchmark")
    if not items:
        raise UserError(f"{args.benchmark}: holds no question")
    images = [load_image(path) for path in paths]
    grounder = Grounder.load(read_config(args.config, args.set), args.head)
    for item, image in zip(items, images):
        reference = item.get("answer")
        item |= chain_of_thought(
            grounder, image, item["question"], args.version, args.box_scale, args.discard_sam, args.resample
        )
        if args.benchmark:
            item["score"] = contains(item["answer"], reference)
        print(json.dumps(item))
    if args.benchmark:
        print(f"score {sum(i['score'] for i in items) / len(items):.3f} over {len(items)} questions")
    if args.out:
        atomic_write(args.out, json.dumps(items, indent=1))


if __name__ == "__main__":
    run(main, parse_args())
