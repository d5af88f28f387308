"""Losses and training metrics of F-LMM, without mmdet. Upstream: mmdet 3.3.0 DiceLoss (naive) and
CrossEntropyLoss, flmm/utils.py."""

import torch
import torch.nn.functional as F

EPS32 = torch.finfo(torch.float32).eps


def dice_loss(logits, target):
    """(n, h, w) logits and {0, 1} targets -> scalar: mean over masks of 1 - (2 sum(pt) + 1) / (sum p + sum t
    + 1)."""
    p, t = logits.float().sigmoid().flatten(1), target.float().flatten(1)
    per_mask = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
    return per_mask.sum() / (len(logits) + EPS32)


def bce_loss(logits, target):
    """(n, h, w) logits and {0, 1} targets -> scalar: binary cross-entropy, mean over all pixels."""
    return F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="sum") / (
        logits.numel() + EPS32
    )


def accuracy(logits, target):
    """Share of pixels where sigmoid(logits) > .5 agrees with the target."""
    return ((logits.sigmoid() > 0.5) == target.bool()).float().mean()


def average_iou(logits, target):
    """Mean over masks of intersection / (union + 1e-12)."""
    p, t = (logits.sigmoid() > 0.5).flatten(1), target.bool().flatten(1)
    return ((p & t).sum(1) / ((p | t).sum(1) + 1e-12)).mean()


def resize_masks(masks, size):
    """(n, h, w) masks -> (n, *size) float, nearest neighbour (the targets of both heads)."""
    return F.interpolate(masks[None].float(), size=tuple(size), mode="nearest")[0]


def mask_losses(pred_masks, sam_pred_masks, masks):
    """The four losses of one image and its logged metrics, each a mean over the image's n phrases.

    pred_masks (n, h, w) coarse logits, sam_pred_masks (n, H, W) refined logits or None, masks (n, h0, w0)
    targets.
    """
    out, heads = {}, {"": pred_masks, "sam_": sam_pred_masks}
    for prefix, logits in heads.items():
        if logits is None:
            continue
        target = resize_masks(masks, logits.shape[-2:])
        out[f"{prefix}loss_dice"] = dice_loss(logits, target)
        out[f"{prefix}loss_mask"] = bce_loss(logits, target)
        with torch.no_grad():
            out[f"{prefix}accuracy"] = accuracy(logits, target)
            out[f"{prefix}aiou"] = average_iou(logits, target)
    return out
