"""The size at which one of two costs, measured at several sizes, becomes the cheaper one."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

Point = tuple[float, float, float, float]
"""(size, ratio, low, high): of the first cost over the second, with the ends of its 95 % interval."""


class Crossing(NamedTuple):
    """The size at which the ratio passes 1 upwards; None where it does not within the sizes that were measured.

    `low` and `high` are where the interval's upper and lower ends pass; None where they do so outside. `first` and
    `last` are the sizes measured, and `above` says on which side of 1 the ratios lie where none passes.
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
    """The crossover of ratios at sizes, each once; None for fewer than two. ValueError for what is not positive.

    Between two sizes the ratio is a straight line in logarithms, a power law: the crossover of two costs of which each
    is a power of the size is exact.
    """
    if len(points) < 2:
        return None
    if min(min(p) for p in points) <= 0:
        raise ValueError(f"sizes and ratios are {points}, expected all to be positive")
    ordered = sorted(points)
    at, early, late = (_passes([(p[0], p[i]) for p in ordered]) for i in (1, 3, 2))
    return Crossing(at, early, late, ordered[0][0], ordered[-1][0], ordered[0][1] >= 1)


def _passes(line: Sequence[tuple[float, float]]) -> float | None:
    """The first size at which a line passes 1 upwards."""
    for (a, below), (b, above) in pairwise(line):
        if below < 1 <= above:
            share = -math.log(below) / (math.log(above) - math.log(below))
            return math.exp(math.log(a) + share * (math.log(b) - math.log(a)))
    return None
