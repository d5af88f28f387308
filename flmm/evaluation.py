"""From mask logits to rows of results; what test.py and the validation of train.py share."""

import torch
import torch.nn.functional as F

from flmm.metrics import average_recalls, mask_iou, referring_scores, target_accuracies
from flmm.models.flmm import unpad_crop


def binary_masks(logits, size):
    """(n, h, w) logits -> (n, *size) bool: sigmoid, bilinear to the size of the ground truth, > .5
    (upstream's order), one mask after another; masks stay as they are."""
    if logits.dtype == torch.bool:
        return logits
    parts = (part.float().sigmoid()[None] for part in logits.split(1))
    return torch.cat([F.interpolate(p, size=tuple(size), mode="bilinear")[0] > 0.5 for p in parts])


def final_logits(output):
    """SAM's masks, or the coarse ones where there is no SAM."""
    return output["pred_masks"] if output["sam_pred_masks"] is None else output["sam_pred_masks"]


def counted(masks, ignore):
    """Bool masks (..., H, W) without the pixels that count for nothing, (H, W) bool or None (ReasonSeg)."""
    return masks if ignore is None else masks & ~torch.as_tensor(ignore, dtype=torch.bool)


def phrase_rows(output, gt_masks, ignore=None):
    """One row per phrase: IoU, intersection and union of the final mask (SAM's where there is one) and of the
    coarse one. ignore: see `counted`.
    """
    gt = gt_masks.bool().cpu()
    rows = [{"score": float(s)} for s in output["scores"]]
    pixels = max(1, int(counted(torch.ones_like(gt[0]), ignore).sum()))
    for suffix, logits in (("_coarse", output["pred_masks"]), ("", final_logits(output))):
        pred = counted(binary_masks(logits, gt.shape[1:]).cpu(), ignore)
        if not suffix:
            for row, mask, true in zip(rows, pred, gt):
                row.update(found=bool(mask.any()), target=bool(true.any()))
        inter, union, iou = mask_iou(pred, gt)
        accuracy = counted(pred == gt, ignore).sum((1, 2)) / pixels
        for row, i, u, v, a in zip(rows, inter, union, iou, accuracy):
            row.update(
                {
                    f"inter{suffix}": int(i),
                    f"union{suffix}": int(u),
                    f"iou{suffix}": float(v),
                    f"accuracy{suffix}": float(a),
                }
            )
    return rows


def trivial_controls(gt_masks, rows, ignore=None):
    """IoU (per phrase) of predictions that read no word: the whole picture, a centred half-size box, all
    objects at once.

    Adds iou_whole, iou_centre and iou_union to `rows`. The union is perfect about the objects and blind to
    the phrase. ignore: see `counted`.
    """
    gt = gt_masks.bool()
    n, h, w = gt.shape
    centre = torch.zeros(h, w, dtype=torch.bool)
    centre[h // 4 : h - h // 4, w // 4 : w - w // 4] = True
    for name, pred in (
        ("whole", torch.ones(h, w, dtype=torch.bool)),
        ("centre", centre),
        ("union", gt.any(0)),
    ):
        for row, iou in zip(rows, mask_iou(counted(pred, ignore).expand(n, h, w), gt)[2]):
            row[f"iou_{name}"] = float(iou)


def other_phrase(output, gt_masks, rows, ignore=None):
    """What the words decide, for pictures of several phrases. ignore: see `counted`.

    Adds iou_other and iou_other_coarse: the mask of the picture's next phrase scored against this phrase's
    object; alike: IoU of this phrase's mask and the next one's; all_objects: IoU of this phrase's mask and
    all objects together.
    """
    if len(gt_masks) > 1:
        gt = gt_masks.bool()
        masks, coarse = (
            counted(binary_masks(logits, gt.shape[1:]).cpu(), ignore)
            for logits in (final_logits(output), output["pred_masks"])
        )
        for name, pred, target in (
            ("iou_other", masks.roll(-1, 0), gt),
            ("iou_other_coarse", coarse.roll(-1, 0), gt),
            ("alike", masks.roll(-1, 0), masks),
            ("all_objects", masks, gt.any(0).expand_as(gt)),
        ):
            for row, iou in zip(rows, mask_iou(pred, target)[2]):
                row[name] = float(iou)


class RawMaps:
    """Masks from attention alone, without a learned head: what rivals publish, under one interface.

    "raw": the best single map, chosen with training masks; "mean": the mean of all maps; "heads": the mean of
    the three localisation heads (CVPR 2025), chosen without any mask by how much attention a head gives to
    the picture and how small the spatial entropy of what it gives is; "fusion": that mean less what the
    picture's other phrases, or for a lone phrase all places alike, get of it (the contrast of object and
    background of DecAF, 2510.19592, with no prompt of its own and no further frames). All have a threshold
    that is chosen on training phrases.
    """

    thresholds = torch.arange(0.1, 0.95, 0.05)
    kinds = ("raw", "mean", "heads", "fusion")

    def __init__(self):
        self.sums, self.count, self.attention, self.entropy = 0, 0, 0, 0
        self.kept = []  # features and masks, to choose the thresholds on

    @staticmethod
    def _ious(feature, gt, maps, ignore=None):
        """(n, C, thresholds) IoU of every map of (n, C, h, w), relative to its own maximum, enlarged to the
        ground truth. ignore: see `counted`."""
        maps = maps.float().cpu().flatten(0, 1)
        if feature["unpad"]:
            maps = unpad_crop(maps, feature["meta_data"])
        maps = F.interpolate(maps[None], size=tuple(gt.shape[1:]), mode="bilinear")[0]
        maps = maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-30)
        target = gt.bool().repeat_interleave(len(maps) // len(gt), 0)
        out = []
        for t in RawMaps.thresholds:
            pred = counted(maps > t, ignore)
            out.append((pred & target).sum((1, 2)) / (pred | target).sum((1, 2)).clamp(min=1))
        return torch.stack(out, -1).unflatten(0, (len(gt), -1))

    def fit(self, feature, gt):
        # Hundreds of maps at every threshold: masks of 64 pixels tell as much as those of a photograph.
        scale = min(1.0, 64 / max(gt.shape[1:]))
        size = [max(1, round(side * scale)) for side in gt.shape[1:]]
        gt = F.interpolate(gt[None].float(), size=size)[0].bool()
        maps = feature["mask_attentions"].float().cpu()
        self.sums = self.sums + self._ious(feature, gt, maps).sum(0)
        shares = normalised(maps).flatten(2)
        self.attention = self.attention + maps.sum((0, 2, 3))
        self.entropy = self.entropy - (shares * shares.clamp(min=1e-12).log()).sum((0, 2))
        self.count += len(gt)
        self.kept.append(({name: feature[name] for name in ("unpad", "meta_data")}, gt, maps.half()))

    def choose(self):
        best = int((self.sums / self.count).argmax())
        self.channel, threshold = divmod(best, len(self.thresholds))
        # of the heads that look at the picture more than most, the three with the most compact maps
        looks = self.attention >= self.attention.quantile(0.75)
        compact = self.entropy.masked_fill(~looks, float("inf"))
        self.heads = compact.topk(min(3, int(looks.sum())), largest=False).indices.sort().values
        self.threshold = {"raw": threshold}
        for kind in self.kinds[1:]:
            sums = sum(self._ious(f, gt, self.merged(kind, maps)).sum(0)[0] for f, gt, maps in self.kept)
            self.threshold[kind] = int(sums.argmax())
        self.kept = []
        return self

    def merged(self, kind, maps):
        """The one map (n, 1, h, w) that a kind makes of all maps (n, C, h, w) of a picture's phrases."""
        maps = maps.float().cpu()
        if kind == "raw":
            return maps[:, [self.channel]]
        if kind == "heads":
            maps = maps[:, self.heads]
        mean = normalised(maps).mean(1, keepdim=True)
        if kind != "fusion":
            return mean
        if len(mean) == 1:
            return (mean - mean.mean()).clamp(min=0)
        others = (mean.sum(0, keepdim=True) - mean) / (len(mean) - 1)
        return (mean - others).clamp(min=0)

    def score(self, feature, gt, rows, ignore=None):
        """Adds iou_raw, iou_mean, iou_heads and iou_fusion to `rows`. ignore: see `counted`."""
        for kind in self.kinds:
            ious = self._ious(feature, gt, self.merged(kind, feature["mask_attentions"]), ignore)
            for row, iou in zip(rows, ious[:, 0, self.threshold[kind]]):
                row[f"iou_{kind}"] = float(iou)


def normalised(maps):
    """Every map (n, C, h, w) divided by its sum."""
    return maps / maps.sum((-2, -1), keepdim=True).clamp(min=1e-12)


def summarise(rows):
    """All scores of a list of phrase rows: refined and coarse, referring protocol and panoptic narrative
    grounding, controls."""

    def mean(key):
        values = [r[key] for r in rows if key in r]
        return sum(values) / len(values) if values else None

    out = {
        "phrases": len(rows),
        "mIoU": mean("iou"),
        "mIoU_coarse": mean("iou_coarse"),
        "pixel_accuracy": mean("accuracy"),
        "score": mean("score"),
        "presence": mean("presence"),
        "alike": mean("alike"),
        "all_objects": mean("all_objects"),
    }
    for suffix in ("", "_coarse"):
        scores = referring_scores([r[f"inter{suffix}"] for r in rows], [r[f"union{suffix}"] for r in rows])
        out |= {f"{k}{suffix}": v for k, v in scores.items()}
    out |= target_accuracies([r["found"] for r in rows], [r["target"] for r in rows])
    if rows and "plural" in rows[0]:
        recalls = average_recalls(
            [r["iou"] for r in rows], [r["plural"] for r in rows], [r["isthing"] for r in rows]
        )
        out["average_recall"] = {k: (None if v != v else v) for k, v in recalls.items()}
    controls = {
        name: mean(f"iou_{name}")
        for name in ("whole", "centre", "union", "other", "other_coarse", *RawMaps.kinds)
    }
    out["controls"] = {k: v for k, v in controls.items() if v is not None}
    return out
