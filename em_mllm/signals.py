"""Synthetic radio signals with known labels: communications, radar pulses and jamming, as complex baseband.

Nothing here is learned or downloaded. Each function states the theory that the tests check it against: symbol
constellation, occupied bandwidth, modulation index, measured SNR. Frequencies are in cycles per sample (1.0 =
the sampling rate), times in samples.

    iq, info = make_signal("QPSK", n=1024, snr_db=10, rng=np.random.default_rng(0))
"""

import numpy as np

LINEAR = ("BPSK", "QPSK", "8PSK", "16APSK", "16QAM", "64QAM", "OOK", "4ASK")
FSK = ("2FSK", "4FSK", "GFSK", "MSK")
MODULATIONS = (*LINEAR, *FSK, "AM", "FM", "OFDM")
RADAR = ("PULSE", "LFM", "BARKER", "FRANK")
JAMMING = ("TONE", "COMB", "BARRAGE", "SWEEP")
TASKS = {"modulation": MODULATIONS, "radar_jamming": RADAR + JAMMING}

# asked about where signals have several sampling rates: what the rate alone decides
BANDWIDTHS_HZ = {"0.5 MHz": 0.5e6, "1 MHz": 1e6, "2 MHz": 2e6, "4 MHz": 4e6}
RATE_TASKS = {"bandwidth": tuple(BANDWIDTHS_HZ)}

BARKER13 = np.array([1, 1, 1, 1, 1, -1, -1, 1, 1, -1, 1, -1, 1])


def constellation(name: str) -> np.ndarray:
    """Complex points of unit mean power of a linear modulation."""
    if name in ("BPSK", "QPSK", "8PSK"):
        order = {"BPSK": 2, "QPSK": 4, "8PSK": 8}[name]
        points = np.exp(2j * np.pi * (np.arange(order) + 0.5) / order)
    elif name == "16APSK":  # DVB-S2 geometry: 4 inner points, 12 outer, radius ratio 2.85
        inner, outer = (np.exp(2j * np.pi * (np.arange(n) + 0.5) / n) for n in (4, 12))
        points = np.concatenate([inner, 2.85 * outer])
    elif name in ("16QAM", "64QAM"):
        side = {"16QAM": 4, "64QAM": 8}[name]
        axis = 2 * np.arange(side) - (side - 1)
        points = (axis[:, None] + 1j * axis[None, :]).ravel()
    elif name == "OOK":
        points = np.array([0, 1])
    elif name == "4ASK":
        points = np.array([0.25, 0.5, 0.75, 1.0])
    else:
        raise ValueError(f"{name} is not a linear modulation")
    return points / np.sqrt(np.mean(np.abs(points) ** 2))


def root_raised_cosine(t: np.ndarray, rolloff: float) -> np.ndarray:
    """Impulse response at times t in symbols; its spectrum ends at (1 + rolloff) / 2 symbol rates."""
    t = np.where(np.abs(t) < 1e-8, 1e-8, t)
    # step off the removable singularities
    t = np.where(np.abs(np.abs(4 * rolloff * t) - 1) < 1e-6, t * (1 + 1e-5), t)
    up = np.sin(np.pi * t * (1 - rolloff)) + 4 * rolloff * t * np.cos(np.pi * t * (1 + rolloff))
    return up / (np.pi * t * (1 - (4 * rolloff * t) ** 2))


def shaped(symbols, n: int, sps: float, rolloff: float, delay: float, span: int = 8) -> np.ndarray:
    """n samples of sum_k symbols[k] h(t / sps - k - delay), h the root raised cosine; sps may be fractional.

    Symbol k is centred on sample (k - span + delay) * sps, so `symbols` needs n / sps + 2 * span + 2 entries.
    """
    t = np.arange(n) / sps - delay
    first = np.floor(t).astype(int)
    offsets = np.arange(-span, span + 1)
    taps = root_raised_cosine((t - first)[:, None] - offsets[None, :], rolloff)  # (n, 2 span + 1)
    return (symbols[first[:, None] + offsets[None, :] + span] * taps).sum(1)


def linear(name, n, rng):
    sps, rolloff, delay = rng.uniform(4, 10), rng.uniform(0.2, 0.5), rng.uniform(0, 1)
    symbols = rng.choice(constellation(name), int(n / sps) + 20)
    info = {"bandwidth": (1 + rolloff) / sps, "sps": sps, "rolloff": rolloff, "delay": delay}
    return shaped(symbols, n, sps, rolloff, delay), info


def frequency_shift(name, n, rng):
    """Continuous-phase FSK: phase = pi * index * integral of the symbol levels; GFSK smooths the levels with
    a Gaussian filter."""
    sps = rng.uniform(4, 10)
    index = {"2FSK": rng.uniform(0.8, 2), "4FSK": rng.uniform(0.6, 1), "GFSK": rng.uniform(0.3, 0.5)}
    index = index.get(name, 0.5)  # MSK
    levels = np.array([-3, -1, 1, 3]) if name == "4FSK" else np.array([-1, 1])
    pad = int(4 * sps)
    position = np.floor((np.arange(n + 2 * pad) / sps) + rng.uniform(0, 1)).astype(int)
    frequency = rng.choice(levels, position[-1] + 1)[position] * index / (2 * sps)  # cycles per sample
    if name == "GFSK":
        bt = rng.uniform(0.3, 0.5)
        sigma = np.sqrt(np.log(2)) / (2 * np.pi * bt) * sps
        kernel = np.exp(-0.5 * (np.arange(-pad, pad + 1) / sigma) ** 2)
        frequency = np.convolve(frequency, kernel / kernel.sum(), "same")
    phase = 2 * np.pi * np.cumsum(frequency[pad : pad + n])
    peak = np.abs(levels).max() * index / (2 * sps)
    info = {"bandwidth": 2 * (peak + 1 / (2 * sps)), "sps": sps, "index": index}  # Carson's rule
    return np.exp(1j * phase), info


def band_limited(n, width, rng, real=False):
    """Gaussian noise with a flat spectrum over `width` cycles per sample around zero, unit mean power."""
    spectrum = rng.standard_normal(n) + 1j * rng.standard_normal(n)
    spectrum[np.abs(np.fft.fftfreq(n)) > width / 2] = 0
    x = np.fft.ifft(spectrum)
    x = x.real if real else x
    return x / np.sqrt(np.mean(np.abs(x) ** 2))


def amplitude_modulation(name, n, rng):
    width, depth = rng.uniform(0.01, 0.05), rng.uniform(0.5, 1)
    message = band_limited(n, 2 * width, rng, real=True)
    return 1 + depth * message / np.abs(message).max() + 0j, {"bandwidth": 2 * width, "depth": depth}


def frequency_modulation(name, n, rng):
    width, deviation = rng.uniform(0.01, 0.05), rng.uniform(0.03, 0.1)  # rms of the frequency
    message = band_limited(n, 2 * width, rng, real=True)
    info = {"bandwidth": 2 * (2 * deviation + width), "deviation": deviation}
    return np.exp(2j * np.pi * deviation * np.cumsum(message)), info


def ofdm(name, n, rng, bins=128):
    used, prefix = 2 * int(rng.integers(24, 57)), int(rng.choice([8, 16, 32]))
    count = n // (bins + prefix) + 2
    # the carrier at zero is left empty
    carriers = np.concatenate([np.arange(1, used // 2 + 1), np.arange(bins - used // 2, bins)])
    symbols = np.zeros((count, bins), complex)
    symbols[:, carriers] = rng.choice(constellation("QPSK"), (count, used))
    time = np.fft.ifft(symbols, axis=1)
    stream = np.concatenate([time[:, -prefix:], time], 1).ravel()
    start = int(rng.integers(bins + prefix))
    info = {"bandwidth": used / bins, "prefix": prefix, "bins": bins, "start": start}
    return stream[start : start + n], info


def pulse_train(name, n, rng):
    """Radar pulses; the modulation inside the pulse is none, a linear sweep, a Barker-13 or a 16-chip Frank
    phase code."""
    pri = float(rng.uniform(100, 400))
    width = pri * rng.uniform(0.1, 0.3)
    first = float(rng.uniform(0, min(pri - width, n / 2)))  # at least one pulse begins in a short record
    inside = (np.arange(n) - first) % pri  # time since the last leading edge
    on = (inside < width) & (np.arange(n) >= first)
    bandwidth = 1 / width
    phase = np.zeros(n)
    if name == "LFM":
        bandwidth = rng.uniform(0.1, 0.5)
        phase = np.pi * bandwidth / width * (inside - width / 2) ** 2
    elif name == "BARKER":
        bandwidth = 13 / width
        phase = np.pi * (BARKER13[np.minimum((inside / width * 13).astype(int), 12)] < 0)
    elif name == "FRANK":
        bandwidth = 16 / width
        chip = np.minimum((inside / width * 16).astype(int), 15)
        phase = 2 * np.pi / 4 * (chip // 4) * (chip % 4)
    info = {
        "bandwidth": bandwidth,
        "pulse_width": width,
        "pri": pri,
        "pulse_time_delay": first,
        "num_pulses": float(np.sum(np.diff(on.astype(int), prepend=0) == 1)),
    }
    return on * np.exp(1j * phase), info


def jammed(name, n, rng):
    """A plain pulse train under jamming of `isr` dB (interference to signal, mean power over the record)."""
    echo, info = pulse_train("PULSE", n, rng)
    t, isr = np.arange(n), float(rng.uniform(5, 20))
    if name == "TONE":
        jam, width = np.exp(2j * np.pi * rng.uniform(-0.3, 0.3) * t), 0.0
    elif name == "COMB":
        teeth, step = int(rng.integers(3, 8)), rng.uniform(0.02, 0.08)
        offsets = (np.arange(teeth) - (teeth - 1) / 2) * step
        jam = np.exp(1j * (2 * np.pi * offsets[:, None] * t + rng.uniform(0, 2 * np.pi, (teeth, 1)))).sum(0)
        width = (teeth - 1) * step
    elif name == "BARRAGE":
        width = rng.uniform(0.2, 0.7)
        jam = band_limited(n, width, rng)
    else:  # SWEEP: a continuous saw-tooth of frequency, no gaps
        width, period = rng.uniform(0.1, 0.7), rng.uniform(128, 1024)
        jam = np.exp(1j * np.pi * width / period * ((t + rng.uniform(0, period)) % period - period / 2) ** 2)
    gain = np.sqrt(10 ** (isr / 10) * np.mean(np.abs(echo) ** 2) / np.mean(np.abs(jam) ** 2))
    return echo + gain * jam, {**info, "bandwidth": width, "isr": isr}


MAKERS = {
    **dict.fromkeys(LINEAR, linear),
    **dict.fromkeys(FSK, frequency_shift),
    "AM": amplitude_modulation,
    "FM": frequency_modulation,
    "OFDM": ofdm,
    **dict.fromkeys(RADAR, pulse_train),
    **dict.fromkeys(JAMMING, jammed),
}


def channel(x, rng, carrier_offset=0.01, phase_noise=0.003, fading="none"):
    """Random phase, carrier offset up to +-carrier_offset, Wiener phase noise (rad per sample) and multipath.

    fading: "none", "rician" (one echo, 10 dB below, up to 4 samples later) or "rayleigh" (three taps of equal
    mean power).
    """
    n = len(x)
    if fading == "rician":
        echo = np.roll(x, int(rng.integers(1, 5))) * 10 ** (-10 / 20)
        x = x + echo * (rng.standard_normal() + 1j * rng.standard_normal()) / np.sqrt(2)
    elif fading == "rayleigh":
        taps = (rng.standard_normal(3) + 1j * rng.standard_normal(3)) / np.sqrt(6)
        x = np.convolve(x, taps)[:n]
    elif fading != "none":
        raise ValueError(f"fading {fading!r} is not none, rician or rayleigh")
    offset = rng.uniform(-carrier_offset, carrier_offset)
    start = rng.uniform(0, 2 * np.pi)
    phase = start + 2 * np.pi * offset * np.arange(n) + phase_noise * np.cumsum(rng.standard_normal(n))
    return x * np.exp(1j * phase), offset


def add_noise(x: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """White complex noise over the full band, snr_db below the mean power of x; the sum has unit rms."""
    level = np.sqrt(np.mean(np.abs(x) ** 2) / 2 * 10 ** (-snr_db / 10))
    y = x + level * (rng.standard_normal(len(x)) + 1j * rng.standard_normal(len(x)))
    return y / np.sqrt(np.mean(np.abs(y) ** 2))


def make_band(name: str, n: int, snr_db: float, rng, fs: float, **impairments) -> tuple[np.ndarray, dict]:
    """A QPSK signal of an occupied bandwidth `name` of BANDWIDTHS_HZ, sampled at `fs` Hz; see `make_signal`.

    The samples tell the bandwidth as a share of the rate: which of the four it is, the rate decides.
    """
    width, rolloff = BANDWIDTHS_HZ[name] / fs, 0.35
    sps, delay = (1 + rolloff) / width, rng.uniform(0, 1)
    x = shaped(rng.choice(constellation("QPSK"), int(n / sps) + 20), n, sps, rolloff, delay)
    x, offset = channel(x, rng, **impairments)
    y = add_noise(x, snr_db, rng)
    info = {"bandwidth": width, "sps": sps, "rolloff": rolloff, "delay": delay, "carrier_offset": offset}
    return np.stack([y.real, y.imag], 1).astype(np.float32), info


def make_signal(name: str, n: int, snr_db: float, rng, **impairments) -> tuple[np.ndarray, dict]:
    """One labelled signal.

    Returns iq (n, 2) float32 of unit rms and its parameters: bandwidth (cycles per sample), carrier_offset,
    and what the kind has (sps, rolloff, index, pulse_width, pri, pulse_time_delay in samples, num_pulses, isr
    in dB). SNR is taken over the full band.
    """
    x, info = MAKERS[name](name, n, rng)
    x, info["carrier_offset"] = channel(x, rng, **impairments)
    y = add_noise(x, snr_db, rng)
    return np.stack([y.real, y.imag], 1).astype(np.float32), info
