"""Means with 95 % intervals: bootstrap over clusters, Student's t over clusters, jackknife, Wilson.

A *cluster* is the images of one prompt, a *stratum* is a task. The bootstrap resamples clusters with replacement within
their stratum; its statistic is the mean over images per stratum, then the unweighted mean over strata, as in GenEval.
If all outcomes are equal the bootstrap interval has zero width, so report it together with n.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy  # its parts are imported when they are first used: stats takes a second
from numpy.typing import ArrayLike, NDArray

Strata = Mapping[str, Sequence[Sequence[float]]]
"""stratum -> clusters -> outcomes"""


class Estimate(NamedTuple):
    """A number with its 95 % interval, if known."""

    value: float
    low: float | None
    high: float | None
    n: int  # sample size of the interval: images, prompts or clusters


def bootstrap_mean(values: Sequence[float], *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The mean of independent values and its percentile interval."""
    return cluster_bootstrap({"": [[value] for value in values]}, level=level, resamples=resamples, seed=seed)


def cluster_bootstrap(strata: Strata, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The unweighted mean of the strata's means, with the percentile interval of resampled clusters. ValueError for an
    empty stratum or cluster."""
    _check(strata)
    rng, names = np.random.default_rng(seed), sorted(strata)
    samples = [rng.integers(len(strata[name]), size=(resamples, len(strata[name]))) for name in names]
    means = np.mean([_stratum_mean(strata[name], rows) for name, rows in zip(names, samples, strict=True)], axis=0)
    value = np.mean([_stratum_mean(strata[name], np.arange(len(strata[name]))[None]) for name in names])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(value), float(low), float(high), sum(map(len, strata.values())))


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """The mean of values that are dependent within a cluster (the images of one prompt).

    Student's t with the cluster-robust standard error, which equals the ordinary one if every cluster has one value;
    `n` is the number of clusters. A single cluster has no interval. ValueError without values.
    """
    mean, error, n = _clustered(values, clusters)
    if n == 1:
        return Estimate(mean, None, None, 1)
    half = float(scipy.stats.t.ppf(0.975, n - 1)) * error
    return Estimate(mean, mean - half, mean + half, n)


def clustered_share(values: Sequence[float], clusters: Sequence[Hashable], whole: float = 1.0) -> Estimate:
    """The same of a share in [0, whole], with an interval inside it: Wilson's with Student's quantile.

    The sample size in it is the one whose binomial standard error is the cluster-robust one; of shares without any
    spread, the number of clusters.
    """
    mean, error, n = _clustered(values, clusters)
    if n == 1:
        return Estimate(mean, None, None, 1)
    p, t = min(max(mean / whole, 0.0), 1.0), float(scipy.stats.t.ppf(0.975, n - 1))
    size = p * (1 - p) / (error / whole) ** 2 if error > 0 and 0 < p < 1 else n
    centre, half = p + t**2 / (2 * size), t * np.sqrt(p * (1 - p) / size + (t / (2 * size)) ** 2)
    low, high = ((centre + sign * half) / (1 + t**2 / size) for sign in (-1, 1))
    return Estimate(mean, whole * float(max(0.0, low)), whole * float(min(1.0, high)), n)


def _clustered(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float, int]:
    """Mean, its cluster-robust standard error (0 for one cluster), number of clusters. ValueError without values."""
    if not values:
        raise ValueError("no images came, so there is no mean")
    x, index = np.asarray(values, np.float64), {c: i for i, c in enumerate(dict.fromkeys(clusters))}
    mean, n = x.mean(), len(index)
    sums = np.bincount([index[c] for c in clusters], x - mean)
    error = np.sqrt((sums**2).sum() * n / (n - 1)) / len(x) if n > 1 else 0.0
    return float(mean), float(error), n


def normal(value: float, error: float, n: int, *, level: float = 0.95) -> Estimate:
    """A value with the normal interval of its standard error."""
    half = float(scipy.stats.norm.ppf((1 + level) / 2)) * error
    return Estimate(value, value - half, value + half, n)


def jackknife(value: float, influences: ArrayLike, *, level: float = 0.95) -> Estimate:
    """A statistic with the normal interval from the influences (n,) of its values: +- z deviation / sqrt(n)."""
    x = np.asarray(influences, np.float64)
    return normal(value, float(x.std(ddof=1)) / len(x) ** 0.5, len(x), level=level)


def wilson(outcomes: ArrayLike, *, level: float = 0.95) -> Estimate:
    """The share of ones among outcomes (n,) of 0 and 1, with Wilson's interval, which has nonzero width at 0 and 1."""
    x = np.asarray(outcomes, np.float64)
    interval = scipy.stats.binomtest(round(x.sum()), len(x)).proportion_ci(level, method="wilson")
    return Estimate(float(x.mean()), float(interval.low), float(interval.high), len(x))


def quantile_interval(values: Sequence[float], q: float, level: float = 0.95) -> tuple[float | None, float | None]:
    """Distribution-free bounds of quantile q by order statistics; None if there are too few values."""
    bounds = scipy.stats.quantile_test(values, q=0.0, p=q).confidence_interval(level)
    low, high = (None if np.isnan(bound) else float(bound) for bound in bounds)
    return low, high


def _check(strata: Strata) -> None:
    empty = [name for name, clusters in strata.items() if not clusters or not all(clusters)]
    if empty or not strata:
        raise ValueError(f"nothing to average in {', '.join(map(repr, empty)) or 'an empty set of strata'}")


def _stratum_mean(clusters: Sequence[Sequence[float]], samples: NDArray[np.int64]) -> NDArray[np.float64]:
    """Means (R,) over the images of R samples of clusters (R, k)."""
    sums, sizes = np.array([sum(c) for c in clusters], np.float64), np.array([len(c) for c in clusters])
    return sums[samples].sum(1) / sizes[samples].sum(1)
