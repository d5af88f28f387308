"""SAM, SAM-HQ, SAM 2 or SAM 3's tracker as mask refiner: the frozen image encoder and the trained prompt
encoder + mask decoder, on transformers' classes.

Upstream: flmm/models/mask_head/mask_refiner.py (SAMWrapper). On disk the key names are those of the original
segment_anything; `to_transformers_key` and `original_keys` translate.
"""

import hashlib
import math
import re
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

from common.errors import UserError
from common.files import read_json, reading

GROUP = 8  # phrases that are decoded together where no gradient is wanted
KEPT = 8  # pictures whose embedding is kept for the next phrases and turns
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB, 0..255
# transformers' class by the model type of a folder; those of videos hold the model of pictures
REFINERS = {
    "sam": "SamModel",
    "sam_hq": "SamHQModel",
    "sam2": "Sam2Model",
    "sam2_video": "Sam2Model",
    "sam3_tracker": "Sam3TrackerModel",
    "sam3_tracker_video": "Sam3TrackerModel",
    "sam3_video": "Sam3TrackerModel",
}

# parameter names of segment_anything and of transformers, the first pair that fits; {} is a number
NAMES = [
    ("image_encoder.patch_embed.proj.", "vision_encoder.patch_embed.projection."),
    ("image_encoder.blocks.{}.norm{}.", "vision_encoder.layers.{}.layer_norm{}."),
    ("image_encoder.blocks.", "vision_encoder.layers."),
    ("image_encoder.neck.0.", "vision_encoder.neck.conv1."),
    ("image_encoder.neck.1.", "vision_encoder.neck.layer_norm1."),
    ("image_encoder.neck.2.", "vision_encoder.neck.conv2."),
    ("image_encoder.neck.3.", "vision_encoder.neck.layer_norm2."),
    ("image_encoder.", "vision_encoder."),
    (
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "prompt_encoder.shared_embedding.positional_embedding",
    ),
    ("prompt_encoder.point_embeddings.", "prompt_encoder.point_embed."),
    ("prompt_encoder.mask_downscaling.0.", "prompt_encoder.mask_embed.conv1."),
    ("prompt_encoder.mask_downscaling.1.", "prompt_encoder.mask_embed.layer_norm1."),
    ("prompt_encoder.mask_downscaling.3.", "prompt_encoder.mask_embed.conv2."),
    ("prompt_encoder.mask_downscaling.4.", "prompt_encoder.mask_embed.layer_norm2."),
    ("prompt_encoder.mask_downscaling.6.", "prompt_encoder.mask_embed.conv3."),
    ("mask_decoder.transformer.norm_final_attn.", "mask_decoder.transformer.layer_norm_final_attn."),
    ("mask_decoder.transformer.layers.{}.norm{}.", "mask_decoder.transformer.layers.{}.layer_norm{}."),
    ("mask_decoder.output_upscaling.0.", "mask_decoder.upscale_conv1."),
    ("mask_decoder.output_upscaling.1.", "mask_decoder.upscale_layer_norm."),
    ("mask_decoder.output_upscaling.3.", "mask_decoder.upscale_conv2."),
]


def names_of_mlps(iou_depth):
    """NAMES of the decoder's MLPs, whose first and last layers have names of their own in transformers."""
    pairs = []
    for mlp, depth in (("output_hypernetworks_mlps.{}.", 3), ("iou_prediction_head.", iou_depth)):
        layers = ["proj_in.", *(f"layers.{k}." for k in range(depth - 2)), "proj_out."]
        pairs += [
            (f"mask_decoder.{mlp}layers.{k}.", f"mask_decoder.{mlp}{name}") for k, name in enumerate(layers)
        ]
    return pairs


def renamed(key, pairs):
    """`key` with the first of `pairs` (old, new) applied that it begins with; as it is where none fits."""
    for old, new in pairs:
        if found := re.match(re.escape(old).replace(r"\{\}", r"(\d+)"), key):
            return new.format(*found.groups()) + key[found.end() :]
    return key


def to_transformers_key(key, iou_depth=3):
    """segment_anything parameter name -> transformers SamModel name. iou_depth: layers of the IoU MLP
    (published: 3)."""
    return renamed(key, [*names_of_mlps(iou_depth), *NAMES])


def original_keys(names, iou_depth=3):
    """{transformers name: segment_anything name} for the given transformers names (the inverse of
    to_transformers_key)."""
    pairs = [(new, old) for old, new in [*names_of_mlps(iou_depth), *NAMES]]
    return {name: renamed(name, pairs) for name in names}


def sam_config_from_tensors(tensors, decoder_heads=8):
    """SamConfig read from the shapes of an original SAM state dict: ViT-B, -L, -H or any smaller one.

    decoder_heads is not in the weights; every published SAM has 8.
    """

    def shape(name):
        if name not in tensors:
            raise ValueError(f"{name} is missing")
        return tensors[name].shape

    def layers(prefix):
        """Number of layers, which stand as numbers behind `prefix`."""
        return 1 + max(int(key[len(prefix) :].split(".")[0]) for key in tensors if key.startswith(prefix))

    _, grid, _, hidden = shape("image_encoder.pos_embed")
    patch = shape("image_encoder.patch_embed.proj.weight")[-1]
    mask_tokens, dim = shape("mask_decoder.mask_tokens.weight")
    blocks = layers("image_encoder.blocks.")
    # relative positions of a layer: of the whole grid where it attends globally, else of its window
    positions = [shape(f"image_encoder.blocks.{k}.attn.rel_pos_h") for k in range(blocks)]
    spans = [(length + 1) // 2 for length, _ in positions]
    picture = dict(image_size=grid * patch, patch_size=patch)
    return SamConfig(
        vision_config=SamVisionConfig(
            **picture,
            hidden_size=hidden,
            output_channels=dim,
            num_hidden_layers=blocks,
            num_attention_heads=hidden // positions[0][1],
            num_pos_feats=dim // 2,
            mlp_dim=len(tensors["image_encoder.blocks.0.mlp.lin1.weight"]),
            window_size=next((span for span in spans if span != grid), 0),
            global_attn_indexes=[k for k, span in enumerate(spans) if span == grid],
        ).to_dict(),
        prompt_encoder_config=SamPromptEncoderConfig(
            **picture,
            hidden_size=dim,
            mask_input_channels=len(tensors["prompt_encoder.mask_downscaling.3.weight"]),
        ).to_dict(),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=dim,
            num_attention_heads=decoder_heads,
            mlp_dim=len(tensors["mask_decoder.transformer.layers.0.mlp.lin1.weight"]),
            num_hidden_layers=layers("mask_decoder.transformer.layers."),
            num_multimask_outputs=mask_tokens - 1,
            iou_head_hidden_dim=len(tensors["mask_decoder.iou_prediction_head.layers.0.weight"]),
            iou_head_depth=layers("mask_decoder.iou_prediction_head.layers."),
        ).to_dict(),
    )


def sam_from_original(tensors, decoder_heads=8):
    """SamModel with the weights of an original SAM state dict (`sam_vit_{b,l,h}_*.pth`, read by the
    caller)."""
    model = SamModel(sam_config_from_tensors(tensors, decoder_heads))
    depth = model.config.mask_decoder_config.iou_head_depth
    state = {to_transformers_key(k, depth): v for k, v in tensors.items()}
    state["shared_image_embedding.positional_embedding"] = state[
        "prompt_encoder.shared_embedding.positional_embedding"
    ]
    model.load_state_dict(state)
    return model


def load_sam(path, read_weights):
    """A model of REFINERS from a transformers folder, or SamModel from an original checkpoint file.
    read_weights: path -> dict of tensors."""
    path = Path(path)
    if not path.is_dir():
        with reading(path, "original SAM checkpoint"):
            return sam_from_original(read_weights(path))
    kind = read_json(path / "config.json", {"model_type": str})["model_type"]
    if kind not in REFINERS:
        raise UserError(f"{path}: holds a {kind}; a mask refiner is one of {', '.join(REFINERS)}")
    with reading(path, "SAM folder"):
        return getattr(transformers, REFINERS[kind]).from_pretrained(path)


def resized_size(image_size, long_side, squash=False):
    """(height, width) -> the same with the longer side at long_side pixels, rounded half up as SAM does; with
    `squash` both sides, as SAM 2 and 3 do."""
    if squash:
        return long_side, long_side
    scale = long_side / max(image_size)
    return tuple(max(1, int(side * scale + 0.5)) for side in image_size)


def resized_pixels(image, long_side, squash):
    """RGB PIL image -> (3, h, w) uint8 at SAM's size: the part of its preparation for a loader's workers."""
    h, w = resized_size((image.height, image.width), long_side, squash)
    return torch.from_numpy(np.array(image.resize((w, h), Image.BILINEAR))).permute(2, 0, 1)


class SAMImageEncoder:
    """SAM's frozen image encoder: a picture is encoded once for every phrase, record, data set and turn.

    sam: one of REFINERS. The embeddings of the last KEPT pictures are kept, and found again by their pixels.
    Not an nn.Module on purpose: it is never trained, saved or wrapped by DDP.
    """

    def __init__(self, sam):
        self.sam, self.encoder = sam, sam.vision_encoder.eval().requires_grad_(False)
        self.parts = [self.encoder]
        self.squash = hasattr(sam, "no_memory_embedding")  # SAM 2 and 3
        if self.squash:  # layers between encoder and decoder, which transformers keeps in the decoder
            self.parts += [sam.mask_decoder.conv_s0, sam.mask_decoder.conv_s1]
        self.image_size = sam.config.prompt_encoder_config.image_size
        self.prepare = partial(resized_pixels, long_side=self.image_size, squash=self.squash)
        self.mean, self.std = PIXEL_MEAN, PIXEL_STD
        self.high_quality = hasattr(sam.config.mask_decoder_config, "vit_dim")
        if type(sam).__name__ == REFINERS["sam3_tracker"]:
            self.mean = self.std = (127.5,) * 3
        self.kept = OrderedDict()

    def to(self, *args, **kwargs):
        for part in self.parts:
            part.to(*args, **kwargs)
        if self.squash:
            self.sam.no_memory_embedding.data = self.sam.no_memory_embedding.data.to(*args, **kwargs)
        self.kept.clear()
        return self

    def preprocess(self, image):
        """RGB PIL image, or what `prepare` made of it -> (3, image_size, image_size) float, zero-padded
        bottom and right."""
        pixels = image if torch.is_tensor(image) else self.prepare(image)
        h, w = pixels.shape[1:]
        mean, std = (pixels.new_tensor(v, dtype=torch.float)[:, None, None] for v in (self.mean, self.std))
        pixels = (pixels.float() - mean) / std
        return F.pad(pixels, (0, self.image_size - w, 0, self.image_size - h))

    @torch.no_grad()
    def __call__(self, images):
        """List of RGB PIL images, or of what `prepare` made of them -> embeddings (B, ...): (B, D, e, e), e =
        image_size / patch size; of several maps one after another where a decoder wants several."""
        embeddings = []
        for image in images:
            pixels = image if torch.is_tensor(image) else self.prepare(image)
            key = digest(pixels)
            if key not in self.kept:
                self.kept[key] = self.encode(pixels)
            self.kept.move_to_end(key)
            embeddings.append(self.kept[key])
            if len(self.kept) > KEPT:
                self.kept.popitem(last=False)
        return torch.stack(embeddings)

    def encode(self, pixels):
        """Embedding of what `prepare` made of one picture. Each is encoded alone, so that its last digits do
        not depend on which others were in the batch or kept."""
        weight = next(self.encoder.parameters())
        maps = self.sam.get_image_embeddings(self.preprocess(pixels)[None].to(weight))
        if torch.is_tensor(maps):
            return maps[0]
        if self.high_quality:  # the embedding, and the outputs of the layers that see the whole picture
            maps = [maps[0], maps[1][0]]
        return torch.cat([part[0].flatten().to(weight) for part in maps])


def digest(pixels) -> bytes:
    """What tells pictures apart that `prepare` has made, whatever files and data sets they are from."""
    content = hashlib.blake2b(np.ascontiguousarray(pixels.cpu()), digest_size=16)
    return content.digest() + bytes(str(tuple(pixels.shape)), "ascii")


def mask_to_box(mask):
    """(H, W) bool -> (x0, y0, x1 + 1, y1 + 1) in pixels; the whole picture if the mask is empty."""
    ys, xs = torch.where(mask)
    if not len(ys):
        return [0, 0, mask.shape[1], mask.shape[0]]
    return [xs.min().item(), ys.min().item(), xs.max().item() + 1, ys.max().item() + 1]


@torch.no_grad()
def sureness(logits, size):
    """How sure masks are, from their logits (n, H, W): (n, 2), the mean probability inside and the share of
    the mask that stays when the threshold rises from -1 to 1; and (n, *size), what is inside on a grid."""
    logits = logits.detach().float()
    probs, inside = logits.sigmoid(), logits > 0
    mean = (probs * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
    steady = (logits > 1).sum((1, 2)) / (logits > -1).sum((1, 2)).clamp(min=1)
    small = F.interpolate(logits[None], size=tuple(size), mode="bilinear")[0] > 0
    return torch.stack([mean, steady], 1), small


class SAMWrapper(nn.Module):
    """The trained half of SAM: prompt encoder and mask decoder, prompted by the coarse mask, its box and the
    words.

    sam: one of REFINERS. multimask_output: choose, among the candidates, the one nearest to the coarse mask.
    per_phrase_pad: upstream pads the mask prompt with the minimum over *all* phrases of the image, so one
    phrase's result depends on the others; True uses the phrase's own minimum (changes the numbers of
    published heads).
    """

    def __init__(
        self, sam, use_text=True, use_mask=True, use_box=True, multimask_output=False, per_phrase_pad=False
    ):
        super().__init__()
        self.use_text, self.use_mask, self.use_box = use_text, use_mask, use_box
        self.multimask_output, self.per_phrase_pad = multimask_output, per_phrase_pad
        self.prompt_encoder, self.mask_decoder = sam.prompt_encoder, sam.mask_decoder
        self.prompt_encoder.shared_embedding.requires_grad_(False)  # a buffer in the original
        # transformers' default of 1e-6 is the image encoder's; the original decoder uses plain LayerNorm,
        # 1e-5
        for module in self.mask_decoder.transformer.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5
        decoder = sam.config.mask_decoder_config
        self.image_size = sam.config.prompt_encoder_config.image_size
        self.dim, self.iou_depth = decoder.hidden_size, decoder.iou_head_depth

        # The maps that SAMImageEncoder puts one after another; SAM has one, and nothing is to be cut.
        side, self.shapes = self.prompt_encoder.image_embedding_size[0], None
        self.squash, self.high_quality = hasattr(sam, "no_memory_embedding"), hasattr(decoder, "vit_dim")
        if self.squash:
            self.mask_decoder.conv_s0.requires_grad_(False)  # they belong to the frozen encoder
            self.mask_decoder.conv_s1.requires_grad_(False)
            sizes = sam.config.vision_config.backbone_feature_sizes
            self.shapes = [(self.dim // n, *size) for n, size in zip((8, 4, 1), sizes)]
        if self.high_quality:
            self.shapes = [(self.dim, side, side), (side, side, decoder.vit_dim)]

    def dense_pe(self):
        """Position encoding of the image embedding, (1, D, e, e)."""
        side = self.prompt_encoder.image_embedding_size[0]
        embedding = self.prompt_encoder.shared_embedding
        at = (torch.arange(side, device=embedding.positional_embedding.device) + 0.5) / side
        grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), dim=-1)  # (e, e, 2): x, y
        return embedding(grid[None])[0].permute(2, 0, 1)[None]

    def prompt_masks(self, pred_masks, image_size, lowest=None):
        """Coarse logits (n, h, w) -> mask prompts (n, 1, 4e, 4e) in SAM's padded frame (logits, not
        probabilities). lowest: least logit over all phrases of the image, default over these."""
        h, w = resized_size(image_size, self.image_size, self.squash)
        side = 4 * self.prompt_encoder.image_embedding_size[0]
        masks = F.interpolate(pred_masks[:, None].float(), size=(h, w), mode="bilinear")
        own = pred_masks.detach().float().amin((1, 2))
        lowest = own if self.per_phrase_pad else own.min() if lowest is None else lowest
        fill = lowest.clamp(max=-1.0).view(-1, 1, 1, 1)
        padded = fill.expand(len(masks), 1, self.image_size, self.image_size).clone()
        padded[..., :h, :w] = masks
        return F.interpolate(padded, size=(side, side), mode="bilinear")

    def boxes(self, pred_masks, image_size):
        """Coarse logits -> boxes (n, 4) x0 y0 x1 y1 in SAM's frame, without gradient."""
        probs = F.interpolate(
            pred_masks.detach()[:, None].float().sigmoid(), size=tuple(image_size), mode="bilinear"
        )
        boxes = torch.tensor([mask_to_box(mask) for mask in probs[:, 0] > 0.5], dtype=torch.float64)
        new_h, new_w = resized_size(image_size, self.image_size, self.squash)
        scale = torch.tensor([new_w / image_size[1], new_h / image_size[0]] * 2, dtype=torch.float64)
        return (boxes * scale).float().to(pred_masks.device)

    def forward(self, image_embeddings, image_sizes, pred_masks, text_embeds):
        """Per image refined logits (n, H, W) and SAM's predicted IoU (n,); see `refine`."""
        return [part[:2] for part in self.refine(image_embeddings, image_sizes, pred_masks, text_embeds)]

    def refine(self, image_embeddings, image_sizes, pred_masks, text_embeds, finish=None):
        """Refine the phrases of a list of images; phrases with equally many words are decoded together.

        Per image: image_embeddings of SAMImageEncoder, image_sizes (H, W) original pixels,
        pred_masks (n, h, w) coarse logits, text_embeds n tensors (T_k, D). Returns per image logits
        (n, H, W), SAM's predicted IoU (n,) and the two parts of `sureness`. finish is applied to the logits
        (1, H, W) of each phrase, so that large pictures need not keep them. No mask exists for padded sparse
        tokens, so unequal lengths are not padded but decoded in groups.
        """
        # Every phrase is (its image, its number there).
        phrases = [(i, row) for i, masks in enumerate(pred_masks) for row in range(len(masks))]
        lowest = [masks.detach().float().amin() for masks in pred_masks]  # over all phrases of an image
        groups = {}
        for i, row in phrases:
            words = len(text_embeds[i][row]) if self.use_text else 0
            groups.setdefault(words, []).append((i, row))

        refined, joined = {}, [None] * len(pred_masks)
        size = len(phrases) if torch.is_grad_enabled() else GROUP
        for group in [whole[k : k + size] for whole in groups.values() for k in range(0, len(whole), size)]:
            coarse = [pred_masks[i][row : row + 1] for i, row in group]
            sizes = [image_sizes[i] for i, _ in group]
            prompts = [self.prompt_masks(c, s, lowest[i]) for c, s, (i, _) in zip(coarse, sizes, group)]
            low_res, scores = self._decode(
                torch.stack([image_embeddings[i] for i, _ in group]),
                torch.cat(prompts),
                torch.cat([self.boxes(c, s) for c, s in zip(coarse, sizes)]),
                [text_embeds[i][row] for i, row in group],
            )
            for k, (i, row) in enumerate(group):
                logits, score = self._enlarge(low_res[k : k + 1], scores[k : k + 1], coarse[k], sizes[k])
                kept = logits if finish is None else finish(logits)
                sure = sureness(logits, coarse[k].shape[1:])
                if not torch.is_grad_enabled():  # to its place at once: masks need not lie in memory twice
                    if joined[i] is None:
                        joined[i] = kept.new_empty(len(pred_masks[i]), *kept.shape[1:])
                    joined[i][row], kept = kept[0], None
                refined[i, row] = kept, score, *sure

        results = []
        for i, masks in enumerate(pred_masks):
            logits, *others = zip(*(refined[i, row] for row in range(len(masks))))
            logits = torch.cat(logits) if joined[i] is None else joined[i]
            results.append((logits, *(torch.cat(part) for part in others)))
        return results

    def _decode(self, embeddings, prompts, boxes, words):
        """Candidates (m, 1 or 3, 4e, 4e) and their predicted IoU of m phrases with equally many words."""
        pe = self.dense_pe()
        sparse, dense = self.prompt_encoder(
            None, None, boxes[:, None] if self.use_box else None, prompts if self.use_mask else None
        )
        if sparse is None:
            sparse = pe.new_zeros(len(words), 1, 0, self.dim)
        if self.use_text:
            text = torch.stack(words)[:, None]  # (m, 1, T, D), after the box tokens
            sparse = torch.cat([sparse, text.to(sparse)], dim=2)
        embedding, others = self.split(embeddings.to(pe.dtype))
        masks, ious = self.mask_decoder(
            embedding,
            pe.expand(len(words), -1, -1, -1),
            sparse,
            dense.expand(len(words), -1, -1, -1),
            self.multimask_output,
            **others,
        )[:2]
        return masks[:, 0], ious[:, 0]

    def split(self, embeddings):
        """(m, ...) of SAMImageEncoder -> the map (m, D, e, e) that is decoded, and what else the decoder
        takes."""
        if self.shapes is None:
            return embeddings, {}
        parts = embeddings.split([math.prod(shape) for shape in self.shapes], 1)
        maps = [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes)]
        if self.high_quality:
            return maps[0], {"hq_token_only": False, "intermediate_embeddings": maps[1:]}
        return maps[-1], {"high_resolution_features": maps[:-1]}

    def _enlarge(self, masks, scores, coarse, image_size):
        """Low-resolution candidates (n, 1 or 3, 4e, 4e) -> chosen logits (n, H, W), scores (n,)."""
        h, w = resized_size(image_size, self.image_size, self.squash)
        masks = F.interpolate(masks.float(), size=(self.image_size, self.image_size), mode="bilinear")
        masks = F.interpolate(masks[..., :h, :w], size=tuple(image_size), mode="bilinear")
        if not self.multimask_output:
            return masks[:, 0], scores[:, 0]
        coarse = coarse.detach()[:, None].float().sigmoid()
        coarse = F.interpolate(coarse, size=tuple(image_size), mode="bilinear") > 0.5
        candidates = masks.detach() > 0
        inter, union = (candidates & coarse).sum((2, 3)), (candidates | coarse).sum((2, 3))
        best = (inter / (union + 1e-12)).argmax(1)
        at = torch.arange(len(best), device=best.device)
        return masks[at, best], scores[at, best]
