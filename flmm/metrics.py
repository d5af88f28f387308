"""Scores of referring segmentation and panoptic narrative grounding.

Upstream: mmdet 3.3.0 RefSegMetric, scripts/multiprocess_eval_{refcoco,png}.py. Masks are bool arrays, IoUs
lie in [0, 1].
"""

import numpy as np


def mask_iou(pred, gt):
    """pred, gt: (n, h, w) bool -> intersection, union (n,) in pixels and IoU (n,), 0/0 counted as 0."""
    pred, gt = np.asarray(pred, bool), np.asarray(gt, bool)
    if pred.shape != gt.shape:
        raise ValueError(f"predicted masks are {pred.shape}, ground truth is {gt.shape}")
    pred, gt = pred.reshape(len(pred), -1), gt.reshape(len(gt), -1)
    inter, union = (pred & gt).sum(1), (pred | gt).sum(1)
    return inter, union, inter / np.maximum(union, 1)


def average_recall(ious):
    """Area under the recall-threshold curve of panoptic narrative grounding: thresholds k * 1e-5, k =
    0..99998.

    An IoU counts for a threshold if IoU >= threshold. Empty input gives nan.
    """
    ious = np.sort(np.asarray(ious, np.float64))
    if not len(ious):
        return float("nan")
    thresholds = np.arange(0, 1, 1e-5)[:99999]
    recall = (len(ious) - np.searchsorted(ious, thresholds, side="left")) / len(ious)
    return float(recall.sum() * 1e-5)


def average_recalls(ious, plural, isthing):
    """Average recall of all, singular, plural, thing and stuff phrases (upstream's order; plurals count as
    things)."""
    ious, plural, isthing = np.asarray(ious), np.asarray(plural, bool), np.asarray(isthing, bool)
    groups = {"all": slice(None), "singular": ~plural, "plural": plural, "thing": isthing, "stuff": ~isthing}
    return {name: average_recall(ious[rows]) for name, rows in groups.items()}


def referring_scores(inter, union):
    """Scores over all masks of a subset. inter, union: (n,) pixels.

    cIoU = sum(inter) / sum(union); mIoU = mean IoU, 0/0 as 0 (mmdet); gIoU = the same, but an empty mask for
    an empty target counts 1, as LISA (ReasonSeg) and gRefCOCO count it; precision@t = share of masks with
    IoU > t.
    """
    inter, union = np.asarray(inter, np.float64), np.asarray(union, np.float64)
    iou = inter / np.maximum(union, 1)
    scores = {
        "cIoU": float(inter.sum() / max(union.sum(), 1)),
        "mIoU": float(iou.mean()) if len(iou) else float("nan"),
        "gIoU": float(np.where(union == 0, 1.0, iou).mean()) if len(iou) else float("nan"),
    }
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9):
        scores[f"precision@{threshold}"] = float((iou > threshold).mean()) if len(iou) else float("nan")
    return scores


def target_accuracies(found, target):
    """N-acc and T-acc of gRefCOCO: the share of expressions without any object whose mask is empty, and of
    those with objects whose mask is not; None where there is no such expression.

    found, target: (n,) bool, whether the predicted and the true mask hold a pixel.
    """
    found, target = np.asarray(found, bool), np.asarray(target, bool)
    return {
        "N_acc": float((~found[~target]).mean()) if (~target).any() else None,
        "T_acc": float(found[target].mean()) if target.any() else None,
    }
