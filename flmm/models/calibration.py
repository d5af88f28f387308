"""How far a mask can be trusted: is the thing there at all (`presence`), and what IoU to expect (`score`).

Both are read from numbers that are there anyway, without another pass: the frozen base's own probability of
the phrase's words after the picture, and how sure the two masks are and how well they agree. A calibration is
fitted on phrases of validation pictures and on phrases that these do not hold (flmm/scripts/calibrate.py),
and lies as calibration.json beside its head.
"""

from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from common.checkpoint import atomic_json
from common.errors import UserError
from common.files import read_json
from flmm.models.flmm import confidence
from flmm.models.mask_head.mask_refiner import sureness

FEATURES = (
    "mean log p of the words",
    "least log p of a word",
    "mean probability inside the coarse mask",
    "largest coarse probability",
    "log of the coarse mask's share of the picture",
    "mean probability inside the final mask",
    "steadiness of the final mask",
    "IoU of coarse and final mask",
    "IoU that SAM predicts",
)
SHAPE = {
    "features": [str],
    "mean": [float],
    "std": [float],
    "presence": [float],
    "score": [float],
    "fitted": dict,
}


def phrase_features(feature, output):
    """(n, len(FEATURES)) numbers of one picture's phrases, from the output of the base (with "log_probs") and
    of the head."""
    coarse, words = output["pred_masks"].detach().float(), feature["mask_ids"]
    numbers, inside = output.get("sureness") or sureness(coarse, coarse.shape[-2:])
    both = (inside & (coarse > 0)).sum((1, 2)), (inside | (coarse > 0)).sum((1, 2))
    log_probs = [feature["log_probs"][words == k].float() for k in range(len(coarse))]
    columns = [
        torch.stack([p.mean() for p in log_probs]),
        torch.stack([p.min() for p in log_probs]),
        confidence(coarse),
        coarse.sigmoid().amax((1, 2)),
        (coarse > 0).float().mean((1, 2)).clamp(min=1e-4).log(),
        *numbers.unbind(1),
        both[0] / both[1].clamp(min=1),
        output["scores"].detach().float(),
    ]
    return torch.stack([c.to(coarse.device) for c in columns], 1).cpu()


def expand(x, mean, std):
    """Standardised numbers, clipped to what the fit has seen plenty of, and their squares."""
    x = ((x - mean) / std).clamp(-4, 4)
    return torch.cat([x, x.square()], -1)


class Calibration:
    """Two logistic models of `phrase_features`. about: what the fit was, for the reader."""

    def __init__(self, mean, std, presence, score, about=None):
        self.mean, self.std = torch.as_tensor(mean), torch.as_tensor(std)
        self.presence, self.score, self.about = torch.as_tensor(presence), torch.as_tensor(score), about or {}

    def __call__(self, features):
        """(n, F) -> presence (n,) and score (n,), both in [0, 1]."""
        x = expand(features.float(), self.mean, self.std)
        return tuple((x @ w[:-1] + w[-1]).sigmoid() for w in (self.presence, self.score))

    @classmethod
    def fit(cls, features, present, ious, about=None, strength=1.0):
        """features (n, F), present (n,) 0 or 1, ious (n,) with 0 for what is not there.

        Presence is a logistic regression of `present`, score one of the IoU, which counts as that much of a
        hit. strength: inverse of the weight decay; phrases that are there and that are not weigh alike
        together.
        """
        x, present = features.float(), present.float()
        mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
        rows = expand(x, mean, std).double().numpy().repeat(2, 0)
        share = torch.where(present > 0, 0.5 / present.mean(), 0.5 / (1 - present.mean()))
        hits, fitted = np.tile([1, 0], len(x)), []
        for target in (present, ious.float()):
            weights = (torch.stack([target, 1 - target], 1) * share[:, None]).flatten().double().numpy()
            model = LogisticRegression(C=strength, max_iter=2000).fit(rows, hits, weights)
            fitted.append(torch.tensor([*model.coef_[0], *model.intercept_], dtype=torch.float32))
        return cls(mean, std, *fitted, about)

    def save(self, path):
        names = ("mean", "std", "presence", "score")
        numbers = {name: getattr(self, name).tolist() for name in names}
        atomic_json(path, {"features": list(FEATURES), **numbers, "fitted": self.about})

    @classmethod
    def load(cls, path):
        content = read_json(path, SHAPE)
        lengths = [len(content[name]) for name in ("mean", "std", "presence", "score")]
        count = len(FEATURES)
        if tuple(content["features"]) != FEATURES or lengths != [count, count, 2 * count + 1, 2 * count + 1]:
            raise UserError(f"{path}: made for other numbers than these; run flmm/scripts/calibrate.py again")
        return cls(*(content[name] for name in ("mean", "std", "presence", "score")), content["fitted"])

    @classmethod
    def beside(cls, head_path):
        """The calibration in the folder of a head, or None."""
        path = Path(head_path).parent / "calibration.json"
        return cls.load(path) if path.is_file() else None


def auc(positive, negative) -> float:
    """Probability that a positive exceeds a negative, ties counted half."""
    positive, negative = torch.as_tensor(positive)[:, None], torch.as_tensor(negative)[None]
    return float((positive > negative).float().mean() + 0.5 * (positive == negative).float().mean())
