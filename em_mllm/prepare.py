"""What is done to a signal between a file and the encoder: one function for training, test, embeddings and
single recordings.

A model folder carries its specification (multimodal.json, "signal"), an encoder in its config.json, a .h5
says in the attributes `view` and `view_factor` what was done to its rows already, and `prepare` does what is
left:

    recorded samples -> mean off -> other rate -> (augmentation in training) -> view -> scale
"""

import math
import sys
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction

import numpy as np

from common.errors import UserError
from em_mllm.em_foundation.utils.utils import scale_to_peak

VIEWS = ("iq", "polar")
AS_RECORDED = ("iq", 1)  # view and factor of samples to which nothing was done
FAR = 0.05  # relative distance from which on a sampling rate counts as another one


@dataclass(frozen=True)
class SignalSpec:
    """What a model was trained to read.

    points: of the longest training signal, None where the folder of an earlier edition does not say; a long
    recording is cut into windows of it, `stride` points apart (0: as many as a window has). remove_dc: the
    mean of the recorded samples is taken off. scale: "peak", the largest |I| or |Q| becomes 1. view, factor:
    see `view`. rates: sampling rates in Hz of the training signals, after the view. resample: a signal of
    another rate is brought to the nearest of them.
    """

    points: int | None = None
    stride: int = 0
    remove_dc: bool = False
    scale: str = "peak"
    view: str = "iq"
    factor: int = 1
    rates: tuple = ()
    resample: bool = False

    def __post_init__(self):
        if self.view not in VIEWS or self.scale != "peak" or self.factor < 1:
            raise UserError(
                f"the signal's view {self.view!r} x {self.factor} or scale {self.scale!r} is not known; "
                f"known are the views {', '.join(VIEWS)} and the scale peak"
            )

    def to_json(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_json(stored: dict | None) -> "SignalSpec":
        """The specification in a model folder; without one that of the first edition, said in one line."""
        if stored is None:
            print(
                "the model folder says nothing of its signals (an earlier edition wrote it): I and Q scaled "
                "to their peak, as it was trained"
            )
            return SignalSpec()
        known = {field.name for field in fields(SignalSpec)}
        if unknown := sorted(set(stored) - known):
            raise UserError(f"multimodal.json: signal.{unknown[0]} is not known to this edition; update it")
        return SignalSpec(**{**stored, "rates": tuple(stored.get("rates", ()))})


def view(z: np.ndarray, kind: str = "polar", factor: int = 8) -> np.ndarray:
    """(T,) complex to (T / factor, 2), each point from `factor` samples: magnitude and frequency, or the
    averaged I and Q.

    Magnitude: standardised over the capture, or noise would leave of it a large mean and little else.
    Frequency (-1..1 = +-fs/2): the angle of the mean of z[t] conj(z[t-1]), times the relative strength of
    that mean, so that it stays quiet where there is no signal.
    """
    blocks = z[: len(z) // factor * factor].reshape(-1, factor)
    if kind == "iq":
        mean = blocks.mean(1)
        return np.stack([mean.real, mean.imag], 1).astype(np.float32)
    step = np.concatenate([[0], z[1:] * z[:-1].conj()])[: len(blocks) * factor].reshape(-1, factor).mean(1)
    strength = np.abs(step) / (np.sqrt(np.mean(np.abs(step) ** 2)) + 1e-30)
    magnitude = np.abs(blocks).mean(1)
    magnitude = (magnitude - magnitude.mean()) / (magnitude.std() + 1e-6)
    return np.stack([magnitude, np.angle(step) / np.pi * strength], 1).astype(np.float32)


def nearest_rate(spec: SignalSpec, fs: float) -> float | None:
    """The rate of training nearest to `fs` (Hz, after the view) where that is far from all, else None."""
    if not spec.rates:
        return None
    near = min(spec.rates, key=lambda rate: abs(np.log(fs / rate)))
    return near if abs(fs / near - 1) > FAR else None


def as_learned(found: SignalSpec, learned: dict | None) -> SignalSpec:
    """The specification `found` in files, in the view that an encoder learned to read.

    learned: what its configuration says of its signals; None: nothing, as of published weights. UserError
    where the files went through another view.
    """
    wanted = SignalSpec.from_json(learned) if learned else found
    if (found.view, found.factor) == (wanted.view, wanted.factor):
        return found
    if (found.view, found.factor) != AS_RECORDED:
        raise UserError(
            f"the signals are of view {found.view} x {found.factor}, the encoder learned {wanted.view} x "
            f"{wanted.factor}; give the recorded samples, or another encoder"
        )
    points, rates = found.points // wanted.factor, tuple(rate / wanted.factor for rate in found.rates)
    return replace(found, view=wanted.view, factor=wanted.factor, points=points, rates=rates)


def check_rate(spec: SignalSpec, fs: float, name, done=AS_RECORDED):
    """Say in one line what happens to a signal whose rate `fs` was not among those of training."""
    factor = spec.factor if done == AS_RECORDED else 1
    near = nearest_rate(spec, fs / factor)
    if near is None:
        return
    if spec.resample and done == AS_RECORDED:
        said = f"resampled to {near * factor:g} Hz"
    else:
        said = (
            "not resampled: do not trust answers or their confidence; first train on signals of this rate "
            f"(make_data.py --fs {fs:g}), or with train.py --resample if those of training are as wide in Hz"
        )
    seen = ", ".join(f"{rate * factor:g}" for rate in spec.rates)
    print(f"{name}: {fs:g} Hz is far from the rates of training ({seen} Hz); {said}", file=sys.stderr)


def ratio(fs: float, target: float) -> Fraction:
    """target / fs, exact to a thousandth of it."""
    return Fraction(target / fs).limit_denominator(max(1000, round(fs / target)))


def resample(z: np.ndarray, fs: float, target: float) -> np.ndarray:
    """(T,) complex at `fs` to `target` Hz by a polyphase filter."""
    from scipy.signal import resample_poly

    share = ratio(fs, target)
    return resample_poly(z, share.numerator, share.denominator)


def points_read(spec: SignalSpec, length: int, fs: float, done=AS_RECORDED) -> int:
    """Points that `prepare` makes of `length` samples at `fs` Hz."""
    if tuple(done) != AS_RECORDED:
        return length
    near = nearest_rate(spec, fs / spec.factor) if spec.resample else None
    if near is None:
        return length // spec.factor
    points = math.ceil(length * ratio(fs, near * spec.factor)) // spec.factor
    return min(points, spec.points or points)


def check_done(spec: SignalSpec, done, name="the signal"):
    """Raise UserError where rows went through another view than the model reads, or kept a mean that it does
    not know."""
    if tuple(done) not in (AS_RECORDED, (spec.view, spec.factor)):
        raise UserError(
            f"{name}: the rows are of view {done[0]} x {done[1]}, the model reads {spec.view} x "
            f"{spec.factor}; give the recorded samples"
        )
    if spec.remove_dc and tuple(done) != AS_RECORDED:
        raise UserError(
            f"{name}: --remove-dc has no effect on rows of view {done[0]} x {done[1]}; give the recorded "
            "samples, or train without it"
        )


def prepare(iq, fs: float, spec: SignalSpec, done=AS_RECORDED, augment=None) -> tuple[np.ndarray, float]:
    """iq (T, 2) at `fs` Hz as the file holds it -> (what the encoder reads (T', 2) float32, its rate in Hz).

    done: (view, factor) that the file's rows already went through. augment: function of (iq, fs) in training,
    applied to the recorded samples before view and scale. Raises UserError where the rows went through
    another view than the model reads.
    """
    check_done(spec, done)
    wanted = (spec.view, spec.factor)
    iq = np.asarray(iq, np.float32)
    recorded = tuple(done) == AS_RECORDED
    if recorded and spec.remove_dc:
        iq = iq - iq.mean(0)
    if recorded and spec.resample and (near := nearest_rate(spec, fs / spec.factor)):
        z = resample(iq[:, 0] + 1j * iq[:, 1], fs, near * spec.factor)
        z = z[: spec.points * spec.factor] if spec.points else z  # a lower rate became more points
        iq, fs = np.stack([z.real, z.imag], 1).astype(np.float32), near * spec.factor
    if augment is not None:
        iq = augment(iq, fs)
    if recorded and wanted != AS_RECORDED:
        iq, fs = view(iq[:, 0] + 1j * iq[:, 1], *wanted), fs / spec.factor
    return scale_to_peak(iq), fs
