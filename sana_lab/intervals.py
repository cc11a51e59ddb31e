"""How sure a mean is: bootstrap intervals over prompts, and differences between two systems on the same prompts.

A *cluster* is the images of one prompt; a *stratum* is a task. Clusters are drawn with replacement within their
stratum; the statistic is the mean over images in each stratum, then the plain mean over strata, as GenEval sums up.
Where all outcomes agree the bootstrap has no width: read it beside n.
"""

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Strata = Mapping[str, Sequence[Sequence[float]]]
"""stratum -> clusters -> outcomes"""


class Estimate(NamedTuple):
    """A mean with its interval."""

    value: float
    low: float
    high: float
    n: int  # what was resampled: values or clusters


def bootstrap_mean(values: Sequence[float], *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The mean of independent values and its percentile interval."""
    return cluster_bootstrap({"": [[value] for value in values]}, level=level, resamples=resamples, seed=seed)


def cluster_bootstrap(strata: Strata, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Estimate:
    """The unweighted mean of the strata's means, resampling clusters within each stratum."""
    _check(strata)
    picks = _picks(strata, resamples, seed)
    draws = _overall(strata, picks)
    return _estimate(_overall(strata, _all(strata))[0], draws, level, sum(map(len, strata.values())))


def paired_difference(a: Strata, b: Strata, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Overall of a less overall of b, both on the same clusters, which are resampled together."""
    _check(a)
    _check(b)
    if {k: len(v) for k, v in a.items()} != {k: len(v) for k, v in b.items()}:
        raise ValueError("a paired difference needs the same prompts in both; the strata or their sizes differ")
    picks = _picks(a, resamples, seed)
    value = _overall(a, _all(a))[0] - _overall(b, _all(b))[0]
    return _estimate(value, _overall(a, picks) - _overall(b, picks), level, sum(map(len, a.values())))


def jackknife(value: float, influences: ArrayLike, *, level: float = 0.95) -> Estimate:
    """A statistic and its normal interval from how much each of n values moves it: +- z deviation / sqrt(n)."""
    moves = np.asarray(influences, np.float64)
    half = _z(level) * float(moves.std(ddof=1)) / len(moves) ** 0.5
    return Estimate(value, value - half, value + half, len(moves))


def wilson(outcomes: ArrayLike, *, level: float = 0.95) -> Estimate:
    """The share of outcomes (zeros and ones) that are one, with Wilson's interval, which has a width at 0 and 1 too."""
    found = np.asarray(outcomes, np.float64)
    n, share, z2 = len(found), float(found.mean()), _z(level) ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = (z2 * (share * (1 - share) / n + z2 / (4 * n * n))) ** 0.5 / (1 + z2 / n)
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half), n)


def _z(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)


def _check(strata: Strata) -> None:
    empty = [name for name, clusters in strata.items() if not clusters or not all(clusters)]
    if empty or not strata:
        raise ValueError(f"nothing to average in {', '.join(map(repr, empty)) or 'an empty set of strata'}")


def _picks(strata: Strata, resamples: int, seed: int) -> dict[str, NDArray[np.int64]]:
    """(resamples, clusters) positions per stratum."""
    rng = np.random.default_rng(seed)
    return {name: rng.integers(len(strata[name]), size=(resamples, len(strata[name]))) for name in sorted(strata)}


def _all(strata: Strata) -> dict[str, NDArray[np.int64]]:
    return {name: np.arange(len(clusters))[None] for name, clusters in strata.items()}


def _overall(strata: Strata, picks: Mapping[str, NDArray[np.int64]]) -> NDArray[np.float64]:
    """(resamples,) the statistic on each draw of clusters."""
    return np.mean([_stratum(strata[name], picks[name]) for name in sorted(strata)], axis=0)


def _stratum(clusters: Sequence[Sequence[float]], picks: NDArray[np.int64]) -> NDArray[np.float64]:
    sums, sizes = np.array([sum(c) for c in clusters], np.float64), np.array([len(c) for c in clusters])
    return sums[picks].sum(1) / sizes[picks].sum(1)


def _estimate(value: float, draws: NDArray[np.float64], level: float, n: int) -> Estimate:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(value), float(low), float(high), n)
