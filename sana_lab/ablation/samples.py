"""Samples of ranges as an axis of an ablation: `samples:` with a number of points, uniform or of a Sobol sequence.

More points keep the first ones, so that a larger number runs only what is new.
"""

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import scipy

from sana_lab.config.schema import Config, Range, Samples
from sana_lab.config.specs import SpecError

AXIS = "sample"
"""Name of the axis."""


def axis_of(samples: Samples, title: str) -> dict[str, Config | None]:
    """Label -> overrides of each point. SpecError for an empty range, or for points that are equal."""
    if not samples.ranges:
        raise SpecError(
            f"{title} samples no ranges, expected such as ranges: {{system.optimizer.lr: {{low: ..., high: ...}}}}"
        )
    for path, limits in samples.ranges.items():
        check(limits, f"{title}: samples.ranges.{path}")
    points = unit_points(samples)
    values = [
        {path: scaled(limits, u) for (path, limits), u in zip(samples.ranges.items(), point, strict=True)}
        for point in points
    ]
    axis: dict[str, Config | None] = {label_of(each): dict(each) for each in values}
    if len(axis) < len(values):
        raise SpecError(
            f"{title} samples {len(values)} points, of which {len(axis)} differ, expected wider ranges or fewer points"
        )
    return axis


def check(limits: Range, title: str) -> None:
    """SpecError for a range that is empty or has no logarithm."""
    if not limits.low < limits.high:
        raise SpecError(f"{title} is from {limits.low:g} to {limits.high:g}, expected low below high")
    if limits.log and limits.low <= 0:
        raise SpecError(f"{title} is logarithmic from {limits.low:g}, expected low above 0")
    if limits.integer and (limits.low != int(limits.low) or limits.high != int(limits.high)):
        raise SpecError(f"{title} is of whole numbers from {limits.low:g} to {limits.high:g}, expected whole ends")
    if limits.step > 1 and not limits.integer:
        raise SpecError(f"{title} has step {limits.step}, which is for whole numbers; expected integer: true")


def unit_points(samples: Samples) -> "np.ndarray":
    """Points (number, ranges) in [0, 1)."""
    dimensions = len(samples.ranges)
    if samples.method == "random":
        return np.random.default_rng(samples.seed).random((samples.number, dimensions))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a number that is no power of two
        return scipy.stats.qmc.Sobol(dimensions, scramble=True, rng=samples.seed).random(samples.number)


def scaled(limits: Range, u: float) -> float | int:
    """The value of a range at u in [0, 1), as `rounded`."""
    low, high = float(limits.low), float(limits.high)
    if limits.integer:
        half = limits.step / 2
        return rounded(limits, _between(max(low - half, 0.5) if limits.log else low - half, high + half, u, limits.log))
    return rounded(limits, _between(low, high, u, limits.log))


def rounded(limits: Range, value: float) -> float | int:
    """A value in a range to four digits; for integers the nearest whole number of steps from the low end."""
    low, high = float(limits.low), float(limits.high)
    if limits.integer:
        most = int((high - low) // limits.step)
        return int(low) + limits.step * min(max(round((value - low) / limits.step), 0), most)
    return min(max(float(f"{value:.4g}"), low), high)


def size(limits: Range) -> float:
    """Number of a range's values; infinite for real numbers."""
    return (limits.high - limits.low) // limits.step + 1 if limits.integer else math.inf


def values(limits: Range) -> range:
    """The values of a range of whole numbers."""
    return range(int(limits.low), int(limits.high) + 1, limits.step)


def label_of(values: Mapping[str, float | int]) -> str:
    """Such as `lr 0.001, depth 4`: the last words of the paths."""
    return ", ".join(f"{word} {value:g}" for word, value in zip(_words(list(values)), values.values(), strict=True))


def _words(paths: Sequence[str]) -> list[str]:
    """The last word of each path; the whole path where two have the same."""
    last = [path.rpartition(".")[2] for path in paths]
    return [word if last.count(word) == 1 else path for word, path in zip(last, paths, strict=True)]


def _between(low: float, high: float, u: float, log: bool) -> float:
    return math.exp(math.log(low) + u * (math.log(high) - math.log(low))) if log else low + u * (high - low)
