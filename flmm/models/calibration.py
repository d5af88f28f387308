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
from common.files import check, read_json
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
MODEL = {"mean": [float], "std": [float], "weights": [float]}


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


class Logistic:
    """Logistic model of numbers and their squares. mean, std (F,): of its fit's rows; weights (2 F + 1,)."""

    def __init__(self, mean, std, weights):
        self.mean, self.std, self.weights = (torch.as_tensor(values) for values in (mean, std, weights))

    def expand(self, x):
        """Standardised numbers, clipped to what the fit has seen plenty of, and their squares."""
        x = ((x.float() - self.mean) / self.std).clamp(-4, 4)
        return torch.cat([x, x.square()], -1)

    def __call__(self, x):
        """(n, F) -> (n,) in [0, 1]."""
        return (self.expand(x) @ self.weights[:-1] + self.weights[-1]).sigmoid()

    @classmethod
    def fit(cls, x, target, share, strength):
        """target (n,) in [0, 1] counts as that much of a hit. share (n,): weights of the rows. strength:
        inverse of the weight decay."""
        model = cls(x.mean(0), x.std(0).clamp(min=1e-6), ())
        rows, hits = model.expand(x).double().numpy().repeat(2, 0), np.tile([1, 0], len(x))
        weights = (torch.stack([target, 1 - target], 1) * share[:, None]).flatten().double().numpy()
        fitted = LogisticRegression(C=strength, max_iter=2000).fit(rows, hits, weights)
        model.weights = torch.tensor([*fitted.coef_[0], *fitted.intercept_], dtype=torch.float32)
        return model

    def content(self):
        return {name: getattr(self, name).tolist() for name in MODEL}


class Calibration:
    """Two logistic models of `phrase_features`: is the thing there, and what IoU to expect if it is.

    about: what the fit was, for the reader. of_present: whether `score` was fitted on what is there alone;
    those of earlier files were not, and give less for what is not there by themselves.
    """

    def __init__(self, presence, score, about=None, of_present=True):
        self.presence, self.score, self.about, self.of_present = presence, score, about or {}, of_present

    def __call__(self, features):
        """(n, F) -> presence (n,) and score (n,), both in [0, 1].

        The score is the IoU to expect of what is there, and falls to 0 with the presence where that is below
        one half.
        """
        presence, score = self.presence(features), self.score(features)
        return presence, score * (2 * presence).clamp(max=1) if self.of_present else score

    @classmethod
    def fit(cls, features, present, ious, about=None):
        """features (n, F), present (n,) 0 or 1, ious (n,). For presence, phrases that are there and that are
        not weigh alike together; the score is fitted on those that are there, of which there are few."""
        x, there, present = features.float(), present > 0, present.float()
        share = torch.where(there, 0.5 / present.mean(), 0.5 / (1 - present.mean()))
        presence = Logistic.fit(x, present, share, 1.0)
        ious = ious.float()[there]
        return cls(presence, Logistic.fit(x[there], ious, torch.ones(len(ious)), 0.1), about)

    def save(self, path):
        models = {"presence": self.presence.content(), "score": self.score.content()}
        atomic_json(path, {"features": list(FEATURES), **models, "fitted": self.about})

    @classmethod
    def load(cls, path):
        content = read_json(path, {"features": [str], "fitted": dict})
        if old := "mean" in content:  # one mean and deviation for both
            same = {name: content.get(name) for name in ("mean", "std")}
            content |= {name: {**same, "weights": content.get(name)} for name in ("presence", "score")}
        check(content, {"presence": MODEL, "score": MODEL}, path)
        models, count = (content["presence"], content["score"]), len(FEATURES)
        lengths = {name: count for name in MODEL} | {"weights": 2 * count + 1}
        fits = all({name: len(model[name]) for name in MODEL} == lengths for model in models)
        if tuple(content["features"]) != FEATURES or not fits:
            raise UserError(f"{path}: made for other numbers than these; run flmm/scripts/calibrate.py again")
        models = (Logistic(**{name: model[name] for name in MODEL}) for model in models)
        return cls(*models, content["fitted"], of_present=not old)

    @classmethod
    def beside(cls, head_path):
        """The calibration in the folder of a head, or None."""
        path = Path(head_path).parent / "calibration.json"
        return cls.load(path) if path.is_file() else None


def auc(positive, negative) -> float:
    """Probability that a positive exceeds a negative, ties counted half."""
    positive, negative = torch.as_tensor(positive)[:, None], torch.as_tensor(negative)[None]
    return float((positive > negative).float().mean() + 0.5 * (positive == negative).float().mean())
