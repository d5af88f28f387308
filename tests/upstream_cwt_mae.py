"""How upstream prepared signals, to the digit: for whoever runs its published weights on data that were
prepared that way.

Upstream files: dataset.py (`pretrain_window`) and dataset_cls.py (`finetune_window`). Our own pipeline is
`Preprocess` in dataset.py; it pads after normalising and knows the sampling rate.
"""

import numpy as np
from scipy.signal import butter, filtfilt


def fit_length(x: np.ndarray, length: int) -> np.ndarray:
    """The middle `length` samples of x (L,), or x with zeros behind it."""
    start = max(0, (len(x) - length) // 2)
    x = x[start : start + length]
    return np.pad(x, (0, length - len(x)))


def pretrain_window(x: np.ndarray, length: int) -> np.ndarray:
    """x (L,) -> (1, length) float32, z-scored after padding: an offset of a short record becomes a step at
    its end."""
    x = fit_length(np.asarray(x, np.float32), length)
    return ((x - x.mean()) / (x.std() + 1e-6))[None]


def band_pass(x: np.ndarray, fs: float = 100.0) -> np.ndarray:
    """4th-order Butterworth band-pass 0.5 to 8 Hz, forth and back, of x (L,) at `fs` Hz: a filter for pulse
    waves."""
    return filtfilt(*butter(4, [0.5, 8.0], "bandpass", fs=fs), x)


def finetune_window(x: np.ndarray, length: int, fs: float = 100.0) -> np.ndarray:
    """x (L,) at `fs` Hz -> (1, length) float64: band-pass, crop or pad, (x - median) / interquartile
    range."""
    x = fit_length(band_pass(x, fs), length)
    low, high = np.percentile(x, [25, 75])
    x = x - np.median(x)
    return (x / (high - low) if high - low >= 1e-6 else x)[None]
