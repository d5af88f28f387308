"""Show that grounding leaves the base as it was: same weights, same answers, to the bit.

    python studies/flmm/check_base_untouched.py --config CONFIG --data DATA --head HEAD --out untouched.json

In one process: answers with transformers' own attention function; then a head is trained on the base for a
few steps and phrases are grounded; then the weights are compared with those before and with the file, and the
questions are asked again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, whatever folder we start in
__import__("common")  # says in one line where PyTorch is missing

import torch
from accelerate import Accelerator

from common.arguments import Parser
from common.checkpoint import atomic_json
from common.errors import UserError, run
from flmm.build import add_config_arguments, build_base, build_dataset, load_trained, read_config
from flmm.conversation import Grounder
from flmm.data.samples import SampleBuilder
from flmm.models.flmm import extract


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_config_arguments(parser)
    parser.add_argument("--head", type=Path, required=True, help="trained head")
    parser.add_argument("--pictures", type=int, default=12, help="pictures to ask about")
    parser.add_argument("--steps", type=int, default=3, help="training steps in between")
    parser.add_argument("--out", type=Path, required=True, help=".json to write")
    return parser.parse_args(argv)


def main(args):
    config, device = read_config(args.config, args.set), Accelerator().device
    base, head, encoder, _ = load_trained(config, args.head, device)
    model, untouched = base.model, {k: v.clone() for k, v in base.model.state_dict().items()}
    dataset = build_dataset(config, "test", args.data, SampleBuilder.of(base))
    samples = [dataset[i] for i in range(min(args.pictures, len(dataset)))]

    def answers():
        prompt = torch.tensor(base.encode_prompt())
        return [base.generate({**s, "input_ids": prompt}, 32) for s in samples]

    plain = dict.fromkeys(("text_config", "vision_config"), "sdpa")
    model.set_attn_implementation(plain)  # the model as anyone loads it
    before = answers()
    base.read_attention("rows")
    head.train()
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(args.steps):
        outputs, masks = head(extract(base, encoder, samples)), [s["masks"].to(device) for s in samples]
        head.compute_loss(outputs, masks)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    Grounder(base, head, encoder).converse(samples[0]["image"])
    after = answers()
    # loaded anew, because the names in the file are others than those of the model
    stored = build_base(config).model.state_dict()
    changed = [
        k
        for k, v in model.state_dict().items()
        if not torch.equal(v, untouched[k]) or not torch.equal(v.cpu(), stored[k])
    ]
    differing = sum(a != b for a, b in zip(before, after))
    result = {
        "tensors": len(untouched),
        "tensors_changed": len(changed),
        "answers": len(before),
        "answers_changed": differing,
        "example": base.tokenizer.decode(after[0]),
    }
    atomic_json(args.out, result)
    print(
        f"{len(untouched) - len(changed)} of {len(untouched)} weight tensors and {len(before) - differing} "
        f"of {len(before)} "
        "answers are identical to the bit"
    )
    if changed or differing:
        raise UserError(f"the base has changed: {changed[:3]}, {differing} answers")


if __name__ == "__main__":
    run(main, parse_args())
