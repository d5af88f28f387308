"""Compare runs whose floats were summed in another order, as other processors, threads and processes do.

Only the first optimizer step is compared, for there rounding alone can differ. Adam divides each gradient by
its own size, so the rounding error of a gradient near zero becomes a whole step: later losses part by more.
"""

import csv
import json
import math

import torch


def first_step(out):
    """Return a run's first logged loss and, flattened, the first moments of Adam after step 1.

    After one step a first moment is a constant times the gradient, averaged over the processes and clipped.
    """
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    loss = next(line["loss"] for line in lines if "loss" in line)  # a validation may be logged before
    moments = []
    for file in sorted((out / "checkpoints/step-00000001").glob("optimizer*.bin")):
        state = torch.load(file, weights_only=True)["state"]
        moments += [state[i]["exp_avg"].flatten().double() for i in sorted(state)]
    return loss, torch.cat(moments)


def assert_same_first_step(one, two, rtol=1e-4):
    """Equal loss and gradients in the first step of the runs in two folders, to float32 reduction error."""
    (loss, moments), (other_loss, other_moments) = first_step(one), first_step(two)
    assert math.isclose(loss, other_loss, rel_tol=rtol), f"first loss {loss} in {one}, {other_loss} in {two}"
    assert moments.norm() > 0 and len(moments) == len(other_moments)
    error = ((moments - other_moments).norm() / moments.norm()).item()
    assert error < rtol, f"the first gradients in {one} and {two} differ by {error:.1e} of their norm"


def assert_same_scores(one, two, tolerance=1e-4):
    """Equal CSV or JSON files: texts letter by letter, numbers to `tolerance`, absolute and relative."""
    compare(read(one), read(two), tolerance, one.name)


def read(path):
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def compare(a, b, tolerance, where):
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            compare(a[key], b[key], tolerance, f"{where}: {key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            compare(x, y, tolerance, f"{where}: {i}")
    elif (number := as_number(a)) is None:
        assert a == b, where
    else:
        assert math.isclose(number, as_number(b), rel_tol=tolerance, abs_tol=tolerance), f"{where}: {a}, {b}"


def as_number(value):
    """A finite float, or None for what is no number; booleans count as texts."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
