"""What every reader of signals returns: recordings whose channels each know their rate, their start and their
gaps.

    Recording    name, source, subject, part, {name: Channel}, events in seconds, labels
    Channel      samples of one channel: an array with fs, start, unit and the places where its clock jumps
    Event        seconds on the recording's clock, symbol, text, duration

Nothing here is counted in samples but the samples themselves: channels of one recording may have different
rates, and annotations a clock of their own.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.errors import UserError

# Values that devices and converters write where they have measured nothing, or where a converter is at its
# end. Integers: the least value of the type, too.
SENTINELS = (-32768, 32767, 65535, -999, 999, -9999, 9999, -99999, 99999, -999999, 999999)
SENTINELS += (-8388608, 8388607, -2147483648, 2147483647, 4294967295)
HUGE = 1e15  # no signal reaches it: the fill values of some file formats
RATE_RANGE = (0.001, 1e6)


class Event(NamedTuple):
    """One annotation. seconds: on the recording's clock; symbol: a beat code; text: a rhythm or a remark;
    duration: seconds, 0 where none is stated."""

    seconds: float
    symbol: str = ""
    text: str = ""
    duration: float = 0.0


class Channel(np.ndarray):
    """Samples (L,) of one channel in physical units; nan stands for what was not measured.

    fs: rate in Hz. start: of its first sample, seconds on the recording's clock. unit: "" where unknown.
    jumps: [(sample, its second)] where the clock goes on at another time than the one before says.
    """

    fs, start, unit, jumps = 1.0, 0.0, "", ()

    def __array_finalize__(self, other):
        for name in ("fs", "start", "unit", "jumps"):
            setattr(self, name, getattr(other, name, getattr(Channel, name)))

    def __array_wrap__(self, out, context=None, return_scalar=False):
        """Sums and deviations are plain numbers."""
        return np.asarray(out)[()] if return_scalar or out.ndim == 0 else np.asarray(out)

    def runs(self) -> list[tuple[np.ndarray, float]]:
        """The stretches without a gap: [(samples, second of the first one)], in the order of time."""
        x, found = np.asarray(self), []
        pieces = [(0, self.start), *self.jumps]
        for (first, second), (end, _) in zip(pieces, [*pieces[1:], (len(x), 0.0)]):
            for a, b in valid_runs(x[first:end]):
                found.append((x[first + a : first + b], second + a / self.fs))
        return sorted(found, key=lambda run: run[1])

    def seconds(self) -> float:
        """Where the last sample ends on the recording's clock."""
        first, second = max([(0, self.start), *self.jumps], key=lambda jump: jump[1])
        end = min((at for at, _ in self.jumps if at > first), default=len(self))
        return second + (end - first) / self.fs


def valid_runs(x: np.ndarray) -> list[tuple[int, int]]:
    """(first, end) of each stretch of finite values of x (L,)."""
    finite = np.ones(len(x), bool) if x.dtype.kind in "iu" else np.isfinite(x)
    if finite.all():
        return [(0, len(x))] if len(x) else []
    edges = np.flatnonzero(np.diff(np.r_[False, finite, False].astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def as_channel(x, fs: float, gain: float = 1.0, unit="", start: float = 0.0, jumps=(), raw=None) -> Channel:
    """Raw samples (L,) as a channel: sentinels become nan, the rest is divided by `gain`. raw: the device's
    own numbers, in which sentinels are to be seen, where x is in physical units."""
    x = np.asarray(x)
    gone = sentinels(x if raw is None else raw)
    if gone is not None:
        x = np.where(gone, np.nan, x.astype(np.float64 if x.dtype.itemsize > 2 else np.float32))
    channel = (x if gain == 1 else x / np.float32(gain)).view(Channel)
    channel.fs, channel.unit, channel.start, channel.jumps = float(fs), unit, float(start), list(jumps)
    return channel


def sentinels(x: np.ndarray):
    """Mask (L,) of the samples that stand for "not measured", None if there are none.

    A value of SENTINELS, or one beyond HUGE, counts only if it lies far beyond all the others: four times
    their range from them. The least value of an integer type counts anyhow.
    """
    if x.dtype.kind not in "iuf" or not len(x):
        return None
    low, high = np.fmin.reduce(x), np.fmax.reduce(x)
    if not any(float(value) in SENTINELS or abs(float(value)) >= HUGE for value in (low, high)):
        least = x.dtype.kind == "i" and x.dtype.itemsize > 1 and low == np.iinfo(x.dtype).min
        return x == low if least else None
    values = x[np.isfinite(x)].astype(np.float64)
    candidate = np.isin(values, SENTINELS) | (np.abs(values) >= HUGE)
    rest = values[~candidate]
    if not len(rest):
        return None
    # In the units of the rest: a clipped signal also touches the end of its range, but it lies near it.
    first, last = rest.min(), rest.max()
    room = 4 * max(last - first, 1e-9)
    far = {v for v in np.unique(values[candidate]) if min(abs(v - first), abs(v - last)) > room}
    if x.dtype.kind == "i":
        far |= {float(np.iinfo(x.dtype).min)}
    mask = np.isin(x, list(far))
    return mask if mask.any() else None


@dataclass
class Recording:
    """One recording of one subject.

    name: relative path without suffix, unique below a data root. channels: {name: Channel}. labels: of the
    whole recording, {level: [names]}; the level of a plain label is "". part: "train", "val", "test" or "".
    series: without a time unit (a UCR set), so that rate and seconds count samples.
    """

    name: str
    source: Path
    channels: dict
    subject: str = ""
    events: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)
    part: str = ""
    series: bool = False

    @property
    def rates(self) -> dict:
        """{channel: rate in Hz}."""
        return {name: channel.fs for name, channel in self.channels.items()}

    @property
    def fs(self):
        """The rate of all channels in Hz, or {channel: rate} where they differ."""
        rates = self.rates
        return rates if len(set(rates.values())) > 1 else next(iter(rates.values()))

    def seconds(self) -> float:
        """Length on the recording's clock: the end of the channel that ends last."""
        return max(channel.seconds() for channel in self.channels.values())


def unique(names) -> list[str]:
    """Channel names without doubles: the second "ECG" becomes "ECG#2"."""
    found = []
    for name in map(str, names):
        name, count, plain = name.strip() or "channel", 1, name.strip() or "channel"
        while name in found:
            count += 1
            name = f"{plain}#{count}"
        found.append(name)
    return found


def check_rate(fs, source, given=None) -> float:
    """The sampling rate in Hz: from the file, else `given` (--input-fs); UserError when absent, impossible or
    contradicted."""
    if fs is None and given is None:
        raise UserError(
            f"{source}: has no field fs; pass the sampling rate in Hz with --input-fs; for files of "
            "different rates the column fs of a --manifest"
        )
    try:
        if np.asarray(fs).dtype == bool:
            raise TypeError
        own = None if fs is None else float(np.asarray(fs).reshape(()))
    except (ValueError, TypeError):
        raise UserError(f"{source}: field fs is {fs!r}, expected one number in Hz") from None
    for rate, place, way in ((given, "the given rate", "give another"), (own, "field fs", "mend the file")):
        if rate is not None and not RATE_RANGE[0] <= rate <= RATE_RANGE[1]:
            low, high = RATE_RANGE
            raise UserError(f"{source}: {place} is {rate:g} Hz, expected {low:g} to {high:,.0f}; {way}")
    if own is not None and given is not None and not abs(own / given - 1) <= 0.01:
        raise UserError(
            f"{source}: field fs is {own:g} Hz but --input-fs says {given:g}; leave it out and give files "
            "that state no rate theirs in the column fs of a --manifest, or mend the file"
        )
    return given if own is None else own
