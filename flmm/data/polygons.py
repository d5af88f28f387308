"""Filled and outlined polygons, pixel for pixel as OpenCV's fillPoly and polylines (8-connected, one wide)
draw them.

ReasonSeg's published scores rest on masks that these two functions draw; the drawing is forty lines, the
library 60 MB.
"""

import numpy as np

ONE = 1 << 16  # OpenCV counts x in 16-bit fractions of a pixel


def polygon(points, height, width):
    """points [[x, y], ...] in pixels, truncated to whole ones -> (height, width) bool mask.

    One point is a dot and two are a line. Rows are filled by the even-odd rule, and the outline is drawn over
    them.
    """
    points = np.asarray(points, np.float64).astype(np.int32).tolist()
    mask = np.zeros((height, width), bool)
    crossings = {}  # {row: x of every edge there, in ONE-ths}
    for (x0, y0), (x1, y1) in zip([points[-1], *points[:-1]], points):
        start, end, visible = _clip((x0, y0), (x1, y1), width, height)
        if visible:
            _line(mask, *start, *end)
        if y0 == y1:
            continue

        # the slope is that of the part in the picture, as OpenCV has it; the lower end of an edge is not its
        (xa, ya), (xb, yb) = (start, end) if start[1] != end[1] else ((x0, y0), (x1, y1))
        span, rows = (xb - xa) * ONE, yb - ya
        slope = abs(span) // abs(rows) * (1 if (span >= 0) == (rows >= 0) else -1)  # C's division truncates
        for y in range(max(0, min(y0, y1)), min(height, max(y0, y1))):
            near = (xa, ya) if y0 < y1 else (xb, yb)
            crossings.setdefault(y, []).append(near[0] * ONE + slope * (y - near[1]))
    for y, xs in crossings.items():
        xs.sort()
        for left, right in zip(xs[::2], xs[1::2]):
            first, last = -(-left // ONE), right // ONE
            mask[y, max(0, first) : max(0, last + 1)] = True
    return mask


def _clip(start, end, width, height):
    """The part of a line that lies in the picture, and whether there is one; OpenCV's clipLine, in its order
    and rounding."""
    one, two, last = list(start), list(end), (width - 1, height - 1)

    def side(point, axis):
        """1 before the picture, -1 behind it, 0 within."""
        return (point[axis] < 0) - (point[axis] > last[axis])

    def beside(axis):
        return side(one, axis) * side(two, axis) == 1

    if beside(0) or beside(1):
        return start, end, False
    for axis in (1, 0):
        if beside(axis):  # only after it was cut along the other axis
            return tuple(one), tuple(two), False
        other = 1 - axis
        for point in (one, two):
            if out := side(point, axis):
                edge, rise = 0 if out == 1 else last[axis], two[axis] - one[axis]
                point[other] += int((edge - point[axis]) * (two[other] - one[other]) / rise)
                point[axis] = edge
    return tuple(one), tuple(two), True


def _line(mask, x0, y0, x1, y1):
    """Bresenham's line, drawn from left to right as OpenCV does."""
    if x1 < x0:
        x0, y0, x1, y1 = x1, y1, x0, y0
    dx, dy = x1 - x0, abs(y1 - y0)
    step = 1 if y1 >= y0 else -1
    steep = dy > dx
    major, minor = (dy, dx) if steep else (dx, dy)
    error, x, y = major - 2 * minor, x0, y0
    for _ in range(major + 1):
        mask[y, x] = True
        aside = error < 0
        error += -2 * minor + (2 * major if aside else 0)
        x += aside if steep else 1
        y += step if steep or aside else 0
