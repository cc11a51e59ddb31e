"""Crossover size of two costs measured at several sizes."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from sana_lab.report.table import Row

SCOPES = {
    "core": "mixing of q, k, v",
    "core_train": "mixing, with gradients",
    "layer": "layer, with projections",
    "step": "forward of the DiT",
}
"""What is timed of two attentions, by the prefix of its columns."""

Point = tuple[float, float, float, float]
"""(size, ratio, low, high): ratio of the first cost to the second, with its 95 % interval."""


class Crossing(NamedTuple):
    """The size at which the ratio crosses 1 upwards; None if it does not within the measured sizes.

    `low` and `high` are the crossings of the interval's upper and lower ends; None if outside the measured sizes.
    `first` and `last` are the smallest and largest sizes; `above`: whether ratios without a crossing are above 1.
    """

    at: float | None
    low: float | None
    high: float | None
    first: float
    last: float
    above: bool

    def __str__(self) -> str:
        if self.at is None:
            side = "above" if self.above else "below"
            return f"not in range: the ratio is {side} 1 at every size from {self.first:g} to {self.last:g}"
        low = f"< {self.first:g}" if self.low is None else f"{self.low:.0f}"
        high = f"> {self.last:g}" if self.high is None else f"{self.high:.0f}"
        return f"at {self.at:.0f} (95 %: {low} to {high})"


def crossing(points: Sequence[Point]) -> Crossing | None:
    """Crossover of ratios at distinct sizes; None for fewer than two. ValueError for values that are not positive.

    The ratio is interpolated linearly in logarithms, which is exact if both costs are powers of the size.
    """
    if len(points) < 2:
        return None
    if min(min(p) for p in points) <= 0:
        raise ValueError(f"sizes and ratios are {points}, expected all to be positive")
    ordered = sorted(points)
    at, early, late = (_passes([(p[0], p[i]) for p in ordered]) for i in (1, 3, 2))
    return Crossing(at, early, late, ordered[0][0], ordered[-1][0], ordered[0][1] >= 1)


def tokens_of_label(label: str) -> float | None:
    """The digits of a label as a number; None if it has none."""
    digits = re.sub(r"[^0-9]", "", label)
    return float(digits) if digits else None


def _passes(line: Sequence[tuple[float, float]]) -> float | None:
    """The first size at which a line crosses 1 upwards."""
    for (a, below), (b, above) in pairwise(line):
        if below < 1 <= above:
            share = -math.log(below) / (math.log(above) - math.log(below))
            return math.exp(math.log(a) + share * (math.log(b) - math.log(a)))
    return None


def crossing_of(rows: Sequence[Row], scope: str) -> Crossing | None:
    """Crossover of a scope's ratio over the rows that have one."""
    points = []
    for row in rows:
        if cell := row.cells.get(f"{scope}_ratio"):
            low, high = cell.interval or (cell.mean, cell.mean)
            points.append((tokens_of(row), cell.mean, low, high))
    return crossing(points)


def tokens_of(row: Row) -> float:
    """The number in a row's label. ValueError if it has none."""
    tokens = tokens_of_label(row.label)
    if tokens is None:
        raise ValueError(f"the row {row.label!r} has no number of tokens")
    return tokens
