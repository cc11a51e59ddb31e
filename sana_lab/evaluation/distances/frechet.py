"""Fréchet distance of Gaussians (FID, arXiv 1706.08500), FID-infinity, and intervals of both.

Generated images give rows X (n, D); the reference is a Gaussian (mean, covariance) that counts as known. Intervals are
over the generated images, for the distance *at this n*. The estimate is biased: with a covariance of n images it
exceeds the distance of the distributions by an amount that falls as 1/n and depends on the model. `infinity` removes
the bias; an interval does not. Covariances are normalised by n - 1.

Choice of the interval: relative to the spread over independent samples, the jackknife (`leave_one_out`) was 1.05 to 1.2
times as wide for n < D, the infinitesimal jackknife (`influence`) 1.05 to 1.5 times, the bootstrap up to 3.4 times for
small distances, since resamples repeat images. For n well above D and a clear distance the last two agree within 10 %.
"""

import numpy as np
import torch
from torch import Tensor

from sana_lab.evaluation.distances.moments import Gaussian, moments
from sana_lab.intervals import Estimate

MIN_IMAGES_INFINITY = 20
"""For FID-infinity, so that its smallest subset has two images."""


def frechet(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)); the trace of the root from eigenvalues of B^(1/2) A B^(1/2)."""
    shared = _roots(b.root @ a.covariance @ b.root).sum()
    apart = (a.mean - b.mean).square().sum()
    return max(0.0, float(apart + a.covariance.trace() + b.covariance.trace() - 2 * shared))


def frechet_rows(rows: Tensor, reference: Gaussian) -> float:
    """Distance of rows (n, D) from a reference, by the cheaper of both forms."""
    return (low_rank if len(rows) <= rows.shape[1] else _by_moments)(rows, reference)


def low_rank(rows: Tensor, reference: Gaussian) -> float:
    """The same number for n <= D: X B X^T (n, n) has the non-zero eigenvalues of A B."""
    rows = rows.double()
    mean = rows.mean(0)
    away = rows - mean
    shared = _roots(away @ reference.covariance @ away.T / (len(rows) - 1)).sum()
    own = away.square().sum() / (len(rows) - 1)
    apart = (mean - reference.mean).square().sum()
    return max(0.0, float(apart + own + reference.covariance.trace() - 2 * shared))


def influence(rows: Tensor, reference: Gaussian, chunk: int = 2048) -> Tensor:
    """Influence of each row on the distance: (n,) float64 of mean 0, their deviation over sqrt(n) its standard error.

    Infinitesimal jackknife: the derivative of the distance as a row's weight grows. With d = x - mean and
    c = n / (n - 1) it is 2 d (mean - m) + c |d|^2 - c d^T G d, less its mean, where the derivative of tr (A B)^(1/2) in
    A is G / 2 with G = B^(1/2) (B^(1/2) A B^(1/2))^(-1/2) B^(1/2). It is of first order: for equal distributions it
    vanishes, and the standard error is then too small.
    """
    own = moments(rows).gaussian()
    mean, scale = own.mean, len(rows) / (len(rows) - 1)
    few = len(rows) <= rows.shape[1]
    shared = _shared_few(rows.double() - mean, reference) if few else _shared_many(rows, own, reference, chunk)
    parts = (part.double() - mean for part in rows.split(chunk))
    rest = torch.cat([2 * away @ (mean - reference.mean) + scale * away.square().sum(1) for away in parts])
    each = rest - shared
    return each - each.mean()


def leave_one_out(rows: Tensor, reference: Gaussian) -> Tensor:
    """Influences (n,) by the jackknife itself, for n <= D: each row left out in turn, n eigenproblems of (n, n)."""
    products, n = _Products(rows, reference), len(rows)
    without = (torch.ones(n).double() - one for one in torch.eye(n).double())
    distances = torch.tensor([products.distance(weights) for weights in without], dtype=torch.float64)
    return (n - 1) * (distances.mean() - distances)


def bootstrap(
    rows: Tensor, reference: Gaussian, *, level: float = 0.95, resamples: int = 200, seed: int = 0
) -> Estimate:
    """The distance with its bootstrap interval over rows (n, D), resampled with replacement; meant for n <= D.

    A resample has fewer distinct images and so a larger distance: the quantiles are of resamples about their mean, and
    the interval is put around the value. Every resample follows from (n, n) products that are computed once.
    """
    products = _Products(rows, reference)
    generator = torch.Generator().manual_seed(seed)
    n = len(rows)
    picks = (torch.randint(n, (n,), generator=generator) for _ in range(resamples))
    distances = np.array([products.distance(pick.bincount(minlength=n).double()) for pick in picks])
    value = products.distance(torch.ones(n).double())
    low, high = np.quantile(distances - distances.mean(), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, value + float(low), value + float(high), n)


def infinity(
    rows: Tensor, reference: Gaussian, influences: Tensor, *, points: int = 15, seed: int = 0
) -> tuple[float, Tensor]:
    """FID-infinity (arXiv 1911.07023) and its influences (n,) of mean 0.

    The distances of `points` random subsets, from a tenth of the rows to all, are fitted by a line in 1 / size, whose
    intercept is the value. The intercept is a weighted sum of distances, so a row's influence is its influence on the
    whole (`influences`) times the weights of the subsets that contain it. ValueError below 20 rows.
    """
    n = len(rows)
    if n < MIN_IMAGES_INFINITY:
        raise ValueError(f"FID-infinity needs at least {MIN_IMAGES_INFINITY} images; given {n}")
    generator = torch.Generator().manual_seed(seed)
    sizes = [round(float(s)) for s in np.linspace(n / 10, n, points)]
    subsets = [torch.randperm(n, generator=generator)[:size] for size in sizes]
    weights = intercept_weights(1 / np.array(sizes))
    values = [frechet_rows(rows[part], reference) for part in subsets]
    share = torch.zeros(n).double()
    for weight, part in zip(weights, subsets, strict=True):
        share[part] += float(weight) * n / len(part)
    scaled = share * influences
    return float(weights @ np.array(values)), scaled - scaled.mean()


def intercept_weights(x: np.ndarray) -> np.ndarray:
    """Weights (P,) of values at x whose weighted sum is the intercept of their least-squares line; they sum to 1."""
    away = x - x.mean()
    return 1 / len(x) - x.mean() * away / (away @ away)


class _Products:
    """(n, n) products of rows from which the Fréchet distance follows for any weights of the rows."""

    def __init__(self, rows: Tensor, reference: Gaussian) -> None:
        rows = rows.double()
        mean = rows.mean(0)
        away, offset = rows - mean, mean - reference.mean
        self.gram = away @ away.T
        self.gram_reference = away @ reference.covariance @ away.T
        self.to_reference = away @ offset
        self.constant = float(offset.square().sum() + reference.covariance.trace())

    def distance(self, weights: Tensor) -> float:
        """The distance with row i repeated weights[i] times."""
        n = float(weights.sum())
        shift = float(weights @ self.gram @ weights) / n**2
        apart = 2 * float(self.to_reference @ weights) / n + shift
        own = (float(self.gram.diagonal() @ weights) - n * shift) / (n - 1)
        return self.constant + apart + own - 2 * self._shared(weights, n)

    def _shared(self, weights: Tensor, n: float) -> float:
        """tr (A B)^(1/2) from the rows of weight above 0, centred at their weighted mean."""
        mask = weights > 0
        weights, gram = weights[mask], self.gram_reference[mask][:, mask]
        to_mean = gram @ weights / n
        centred = gram - to_mean - to_mean[:, None] + weights @ to_mean / n
        scale = weights.sqrt()
        return float(_roots(centred * scale * scale[:, None] / (n - 1)).sum())


def _by_moments(rows: Tensor, reference: Gaussian) -> float:
    return frechet(moments(rows).gaussian(), reference)


def _roots(matrix: Tensor) -> Tensor:
    """Square roots of a symmetric matrix's eigenvalues; those below zero by rounding count as zero."""
    return torch.linalg.eigvalsh(matrix).clamp(min=0).sqrt()


def _shared_few(away: Tensor, reference: Gaussian) -> Tensor:
    """c d^T G d for each row, in (n, n): n times the diagonal of (Z Z^T)^(1/2), with Z Z^T = X B X^T / (n - 1)."""
    n = len(away)
    values, vectors = torch.linalg.eigh(away @ reference.covariance @ away.T / (n - 1))
    return n * (vectors.square() @ values.clamp(min=0).sqrt())


def _shared_many(rows: Tensor, own: Gaussian, reference: Gaussian, chunk: int) -> Tensor:
    """The same in (D, D), without the null space."""
    values, vectors = torch.linalg.eigh(reference.root @ own.covariance @ reference.root)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    half = reference.root @ vectors[:, kept] * values[kept] ** -0.25
    parts = [((part.double() - own.mean) @ half).square().sum(1) for part in rows.split(chunk)]
    return torch.cat(parts) * len(rows) / (len(rows) - 1)
