"""Curves of quality over a training, and the speed-up to the quality of the baseline's last point.

Shapes: S seeds, P points, C clusters of images (prompts), R resamples.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import scipy  # its parts are imported when they are first used: stats takes a second
from numpy.typing import NDArray

Axis = Literal["steps", "images", "seconds"]
"""What a curve is over: optimiser steps, training images, seconds of training steps."""

Better = Literal["higher", "lower"]

Float = NDArray[np.float64]

AXES: tuple[Axis, ...] = ("steps", "images", "seconds")

RESAMPLES = 2000

NOT_REACHED = 0.0
"""The speed-up of a row that never reaches the baseline's quality."""


class Value(NamedTuple):
    """A metric at one point of one training."""

    steps: int
    images: int
    seconds: float
    value: float
    interval: tuple[float, float] | None = None  # 95 %, over prompts or images
    per_image: Sequence[float] = ()  # numbers whose mean is the value; none if unknown
    clusters: Sequence[int] = ()  # of these images: the prompt of each
    prompt_set: str | None = None  # hash of all prompts and the seed of their noise


Curve = Sequence[Value]
"""A metric over one training, by step."""


class Speedup(NamedTuple):
    """What the baseline needs for the quality of its last point, over what a row needs to reach it."""

    value: float  # NOT_REACHED where the row never does
    low: float  # ends of the 95 % interval, likewise
    high: float
    at_first: bool  # whether the row is as good at its first point, so that the value is a lower bound


def speedup(row: Sequence[Curve], baseline: Sequence[Curve], axis: Axis, better: Better) -> Speedup | None:
    """The speed-up of a row, a curve for each seed, with an interval by a bootstrap over seeds and prompts.

    Both are means over seeds, interpolated linearly between points; a quality is reached where the curve first has it.
    Prompts are resampled alike for both where they are the same. None without points in common.
    """
    ours, theirs = _grid(row, axis), _grid(baseline, axis)
    if ours is None or theirs is None:
        return None
    sign = 1 if better == "higher" else -1
    ratio, at_first = _ratio(*ours.mean(), *theirs.mean(), sign)
    random = np.random.default_rng(0)
    same = ours.prompt_set == theirs.prompt_set and len(ours.sizes) == len(theirs.sizes)
    ratios = []
    for _ in range(RESAMPLES):
        prompts = ours.draw_prompts(random)
        others = prompts if same else theirs.draw_prompts(random)
        resample = (*ours.resampled(random, prompts), *theirs.resampled(random, others))
        ratios.append(_ratio(*resample, sign)[0])
    tail = _tail(min(len(ours.x), len(theirs.x)))
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return Speedup(ratio, float(low), float(high), at_first)


def reach(x: Float, y: Float, quality: float, sign: int) -> float | None:
    """Where a curve (P,) first has a quality, between points by linear interpolation; None if nowhere. A curve that has
    it at its first point reaches it there."""
    passed = np.flatnonzero(sign * (y - quality) >= 0)
    if not len(passed):
        return None
    i = int(passed[0])
    if i == 0:
        return float(x[0])
    share = (quality - y[i - 1]) / (y[i] - y[i - 1])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))


def common(curves: Sequence[Curve]) -> list[list[Value]]:
    """The points (S lists of P) at the steps that all curves have."""
    steps = [{value.steps for value in curve} for curve in curves]
    shared = set.intersection(*steps) if steps else set()
    return [[value for value in curve if value.steps in shared] for curve in curves]


def positions(points: Sequence[Sequence[Value]], axis: Axis) -> Float:
    """(S, P) positions on an axis, never falling along a curve."""
    return np.maximum.accumulate([[float(getattr(v, axis)) for v in curve] for curve in points], axis=1)


class _Grid(NamedTuple):
    """The curves of a row at their common points."""

    x: Float  # (S, P)
    y: Float  # (S, P)
    sums: Float | None  # (S, P, C) of the numbers per image of each cluster; None if unknown
    sizes: Float  # (C,) images of each cluster
    prompt_set: str | None

    def mean(self) -> tuple[Float, Float]:
        """Positions and values (P,), means over seeds."""
        return self.x.mean(0), self.y.mean(0)

    def draw_prompts(self, random: np.random.Generator) -> Float:
        """How often each cluster (C,) is in a resample."""
        return _counts(random, len(self.sizes))

    def resampled(self, random: np.random.Generator, prompts: Float) -> tuple[Float, Float]:
        """Positions and values (P,) of a resample of seeds, and of these prompts."""
        seeds = _counts(random, len(self.x)) / len(self.x)
        if self.sums is None:
            return seeds @ self.x, seeds @ self.y
        return seeds @ self.x, np.tensordot(seeds, self.sums, 1) @ prompts / (self.sizes @ prompts)


def _grid(curves: Sequence[Curve], axis: Axis) -> _Grid | None:
    points = common(curves)
    if not points or not points[0]:
        return None
    first = points[0][0]
    values = [v for curve in points for v in curve]
    alike = all((v.prompt_set, list(v.clusters)) == (first.prompt_set, list(first.clusters)) for v in values)
    x, y = positions(points, axis), np.array([[v.value for v in curve] for curve in points])
    if not alike or not first.per_image:
        return _Grid(x, y, None, np.zeros(0), None)
    names, index = np.unique(first.clusters, return_inverse=True)
    sums = np.array([[np.bincount(index, v.per_image, len(names)) for v in curve] for curve in points])
    return _Grid(x, y, sums, np.bincount(index).astype(float), first.prompt_set)


def _tail(seeds: int) -> float:
    """The quantile at the lower end of a 95 % interval: with few seeds further out than 0.025, as their resamples
    spread too little (expanded percentile interval, arXiv 1411.5279). One seed is held, and its prompts are many."""
    if seeds == 1:
        return 0.025
    return float(scipy.stats.norm.cdf(-((seeds / (seeds - 1)) ** 0.5) * scipy.stats.t.ppf(0.975, seeds - 1)))


def _counts(random: np.random.Generator, n: int) -> Float:
    """How often each of n things is among n draws with replacement."""
    return np.bincount(random.integers(n, size=n), minlength=n).astype(float) if n else np.zeros(0)


def _ratio(x: Float, y: Float, base_x: Float, base_y: Float, sign: int) -> tuple[float, bool]:
    """The speed-up, and whether the row has the quality at its first point."""
    quality = float(base_y[-1])
    needed, own = reach(base_x, base_y, quality, sign), reach(x, y, quality, sign)
    if own is None or needed is None:
        return NOT_REACHED, False
    return needed / own, bool(sign * (y[0] - quality) >= 0)
