"""95 % intervals by bootstrap."""

import numpy as np


def bootstrap(function, *arrays, groups=None, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Percentile interval (2.5 %, 97.5 %) of `function(*arrays)` over resampled rows of the arrays.

    arrays: numpy arrays of equal length; row i of each belongs together. groups: a label for each row; the
    rows of one label (a patient, a picture) are drawn together, so that the interval covers other groups and
    not other rows of these. Equal seeds draw equal rows, so that differences of two methods are paired.
    Percentile method of Efron 1979.
    """
    rng, count = np.random.default_rng(seed), len(arrays[0])
    members = range(count)
    if groups is not None:
        _, which = np.unique(np.asarray(groups), return_inverse=True)
        order = np.argsort(which, kind="stable")
        members = np.split(order, np.cumsum(np.bincount(which))[:-1])
    values = []
    for _ in range(draws):
        drawn = rng.integers(0, len(members), len(members))
        rows = drawn if groups is None else np.concatenate([members[i] for i in drawn])
        values.append(function(*(array[rows] for array in arrays)))
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)
