"""F-LMM (arXiv 2406.05821): the trained part, and the frozen part that feeds it.

    frozen   base + SAM image encoder   picture, words -> attention maps, hidden states, image embedding
    trained  FLMM                       these -> coarse masks (UNet) -> refined masks (SAM decoder)

What is frozen is not a parameter of what is trained: a checkpoint holds the trainable keys only, DDP and the
optimizer see nothing else, and features can be cached on disk so that heads train without the base.
"""

import torch
import torch.nn as nn

from common.errors import UserError
from common.weights import refuse_nan
from flmm.losses import mask_losses
from flmm.models.mask_head.mask_decoder import UNetHead
from flmm.models.mask_head.mask_refiner import GROUP, SAMWrapper, original_keys, to_transformers_key

# what the trained part of SAM is called in a head's file, and the buffer among it that is not trained
SAM_PARTS = ("text_proj.", "text_layer_weights", "sam.model.prompt_encoder.", "sam.model.mask_decoder.")
BUFFERS = ("sam.model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",)


def extract(base, sam_encoder, samples, likelihood=False):
    """Frozen features of a list of samples, one dict each, all that `FLMM.forward` needs; with `likelihood`
    also what a calibration does.

    Beside the base's output: image_embedding of `sam_encoder` or None, image_size (H, W), meta_data, unpad.
    """
    features, embeddings = base(samples, likelihood), [None] * len(samples)
    if sam_encoder is not None:
        embeddings = sam_encoder([s.get("sam_pixels", s["image"]) for s in samples])
    for feature, sample, embedding in zip(features, samples, embeddings):
        feature.update(
            image_embedding=embedding,
            image_size=(sample["image"].height, sample["image"].width),
            meta_data=sample["meta_data"],
            unpad=base.unpad,
        )
    return features


def unpad_crop(masks, meta):
    """Cut the padded border from (n, h, w) masks of the padded picture."""
    h, w = masks.shape[-2:]
    ph, pw = meta["padded_shape"]["height"], meta["padded_shape"]["width"]
    top, left = int(meta["padding"]["before_height"] * h / ph), int(meta["padding"]["before_width"] * w / pw)
    height = max(1, int(meta["image_shape"]["height"] * h / ph + 0.5))  # a 1-pixel side must not vanish
    width = max(1, int(meta["image_shape"]["width"] * w / pw + 0.5))
    return masks[:, top : top + height, left : left + width]


class FLMM(nn.Module):
    """Mask head, text projection and SAM decoder on the features of a frozen base.

    channels, num_layers, hidden_size: of the base (`base.channels` ...). sam: SamModel or None (coarse masks
    only). unet, sam_options: keyword arguments of UNetHead and SAMWrapper.
    """

    mask_weight = 1.0  # of the cross-entropies beside the dice losses, upstream's loss_weight

    def __init__(self, channels, num_layers, hidden_size, sam=None, unet=None, sam_options=None):
        super().__init__()
        self.mask_head = UNetHead(channels, **(unet or {}))
        self.sam = None
        if sam is not None:
            self.sam = SAMWrapper(sam, **(sam_options or {}))
            self.text_layer_weights = nn.Parameter(torch.ones(num_layers))
            self.text_proj = nn.Linear(hidden_size, self.sam.dim)

    def weigh_hidden(self, hidden_states):
        """(L, R, d) -> (R, d): softmax-weighted sum over layers."""
        weights = self.text_layer_weights.softmax(0)
        return torch.einsum("l,lrd->rd", weights, hidden_states.to(weights.dtype))

    def coarse(self, features):
        """Coarse logits per image, (n_i, h_i, w_i)."""
        maps = [f["mask_attentions"].float() for f in features]
        if torch.is_grad_enabled():  # maps of one size share one pass of the UNet
            logits = [None] * len(maps)
            for shape in {m.shape[1:] for m in maps}:
                rows = [i for i, m in enumerate(maps) if m.shape[1:] == shape]
                together = self.mask_head(torch.cat([maps[i] for i in rows]))[:, 0]
                for i, part in zip(rows, together.split([len(maps[i]) for i in rows])):
                    logits[i] = part
        else:  # one picture after the other, its phrases in groups
            logits = [torch.cat([self.mask_head(part)[:, 0] for part in m.split(GROUP)]) for m in maps]
        return [unpad_crop(part, f["meta_data"]) if f["unpad"] else part for part, f in zip(logits, features)]

    def forward(self, features, refine=True, finish=None):
        """List of feature dicts -> list of {"pred_masks" (n, h, w), "sam_pred_masks" (n, H, W) or None,
        "scores" (n,)}.

        refine=False leaves SAM out; finish is applied to the refined logits (1, H, W) of each phrase. Logits;
        scores are SAM's predicted IoU (without SAM: the mean probability inside the coarse mask).
        """
        coarse = self.coarse(features)
        if self.sam is None or not refine:
            return [{"pred_masks": p, "sam_pred_masks": None, "scores": confidence(p)} for p in coarse]
        words = []
        for f in features:
            projected = self.text_proj(self.weigh_hidden(f["hidden_states"]))
            words.append([projected[f["mask_ids"] == k] for k in range(len(f["mask_attentions"]))])
        refined = self.sam.refine(
            [f["image_embedding"] for f in features],
            [f["image_size"] for f in features],
            coarse,
            words,
            finish,
        )
        return [
            {"pred_masks": p, "sam_pred_masks": m, "scores": s, "sureness": sure}
            for p, (m, s, *sure) in zip(coarse, refined)
        ]

    def compute_loss(self, outputs, masks):
        """The total loss, its four parts and the metrics: means over all phrases of the images, in which
        every phrase weighs the same however many its image has.

        outputs: of `forward`. masks: for each image the targets of its n phrases, (n, h, w).
        """
        parts, count = {}, sum(len(o["pred_masks"]) for o in outputs)
        for output, target in zip(outputs, masks):
            share = len(output["pred_masks"]) / count
            for name, value in mask_losses(output["pred_masks"], output["sam_pred_masks"], target).items():
                parts[name] = parts.get(name, 0) + share * value
        weights = {"loss_dice": 1, "loss_mask": self.mask_weight}
        parts["loss"] = sum(weights.get(name.removeprefix("sam_"), 0) * part for name, part in parts.items())
        return parts

    # ---- checkpoints under upstream's names

    def upstream_names(self):
        """{own parameter name: upstream name} of everything that is trained."""
        own = [name for name, p in self.named_parameters() if p.requires_grad]
        inner = [n.removeprefix("sam.") for n in own if n.startswith("sam.")]
        names = original_keys(inner, self.sam.iou_depth) if inner else {}
        return {n: f"sam.model.{names[n.removeprefix('sam.')]}" if n.startswith("sam.") else n for n in own}

    def upstream_state(self):
        """Trained tensors under upstream's key names, on the CPU."""
        parameters = dict(self.named_parameters())
        return {
            theirs: parameters[ours].detach().cpu().contiguous()
            for ours, theirs in self.upstream_names().items()
        }

    def load_upstream(self, tensors, source="head"):
        """Load a published or own head: {upstream key: tensor}. Keys of other parts (the base, SAM's image
        encoder) are ignored and counted; missing ones, and keys of the mask head or of SAM's decoder that
        this model does not have, are refused.

        Raises UserError that lists them, or names the key whose shape differs (a head of another base).
        Returns one line on what was loaded.
        """
        parameters, names = dict(self.named_parameters()), self.upstream_names()
        own = ("mask_head.", *(SAM_PARTS if self.sam is not None else ()))
        others = set(tensors) - set(names.values())
        if left := sorted(k for k in others if k.startswith(own) and k not in BUFFERS):
            raise UserError(
                f"{source}: {len(left)} tensors have no place in this model: {some(left, 4)}; the head has "
                "another shape, so set unet.* (num_stages, enc_num_convs, dec_num_convs) and sam.path as it "
                "was trained"
            )
        if missing := sorted(set(names.values()) - set(tensors)):
            raise UserError(f"{source}: {len(missing)} of {len(names)} keys are missing: {some(missing, 8)}")
        for ours, theirs in names.items():
            if tensors[theirs].shape != parameters[ours].shape:
                raise UserError(
                    f"{source}: {theirs} is {tuple(tensors[theirs].shape)}, this model needs "
                    f"{tuple(parameters[ours].shape)}; the head belongs to another base model"
                )
            refuse_nan(theirs, tensors[theirs], source)
        with torch.no_grad():
            for ours, theirs in names.items():
                parameters[ours].copy_(tensors[theirs])
        if self.sam is not None:  # heads that carry the position buffer bring the one they were trained with
            [key] = BUFFERS
            if key in tensors:
                name = "sam." + to_transformers_key(key.removeprefix("sam.model."))
                parameters[name].data.copy_(tensors[key])
        return f"{source}: loaded {len(names)} tensors, ignored {len(others)} others"


def some(names, most) -> str:
    """The first `most` of a list of names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def confidence(logits):
    """Mean probability inside each mask (n,), 0 for an empty one: the score where no SAM predicts one."""
    probs = logits.detach().float().sigmoid().flatten(1)
    inside = probs > 0.5
    return (probs * inside).sum(1) / inside.sum(1).clamp(min=1)
