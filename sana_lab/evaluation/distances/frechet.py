"""Fréchet's distance of Gaussians (FID, arXiv 1706.08500), its value at endless images, and how sure both are.

The images measured are rows X (n, D), the reference a Gaussian (mean, covariance) that counts as known: every interval
here is over the images measured, for the distance *at this n*. The estimate is biased: with a covariance from n images
it lies above the distance of the distributions by an amount that falls as 1/n and depends on the model. `infinity`
takes that away; an interval does not. Covariances have n - 1 below.

Which interval: against the spread of fresh draws, leaving each image out (`left_out`) was 1.05 to 1.2 times as wide for
n < D, the infinitesimal jackknife (`influence`) 1.05 to 1.5 times, the bootstrap up to 3.4 times where the distance is
small, since a draw repeats images; with n well above D and a distance that shows, the last two agree within a tenth.
"""

import numpy as np
import torch
from torch import Tensor

from sana_lab.evaluation.distances.moments import Gaussian, moments
from sana_lab.intervals import Estimate

LEAST_FOR_INFINITY = 20
"""Images, so that the smallest part has two."""


def frechet(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)); the root's trace by the eigenvalues of B^(1/2) A B^(1/2)."""
    shared = _roots(b.root @ a.covariance @ b.root).sum()
    apart = (a.mean - b.mean).square().sum()
    return float(apart + a.covariance.trace() + b.covariance.trace() - 2 * shared)


def frechet_rows(rows: Tensor, reference: Gaussian) -> float:
    """The distance of rows (n, D) from a reference, by whichever of both forms is cheaper."""
    return (low_rank if len(rows) <= rows.shape[1] else _by_moments)(rows, reference)


def low_rank(rows: Tensor, reference: Gaussian) -> float:
    """The same number for n <= D: X B X^T (n, n) has the eigenvalues of A B that are not zero."""
    rows = rows.double()
    mean = rows.mean(0)
    away = rows - mean
    shared = _roots(away @ reference.covariance @ away.T / (len(rows) - 1)).sum()
    own = away.square().sum() / (len(rows) - 1)
    return float((mean - reference.mean).square().sum() + own + reference.covariance.trace() - 2 * shared)


def influence(rows: Tensor, reference: Gaussian, chunk: int = 2048) -> Tensor:
    """How much each row moves the distance: (n,) float64 with mean 0, their deviation over sqrt(n) its standard error.

    The infinitesimal jackknife: the derivative of the distance as a row's weight grows. With d = x - mean and
    c = n / (n - 1) it is 2 d (mean - m) + c |d|^2 - c d^T G d, less its mean, where the derivative of tr (A B)^(1/2) in
    A is G / 2 with G = B^(1/2) (B^(1/2) A B^(1/2))^(-1/2) B^(1/2). It is of first order: where both distributions are
    the same it vanishes, and the error that it leaves is too small.
    """
    own = moments(rows).gaussian()
    mean, scale = own.mean, len(rows) / (len(rows) - 1)
    few = len(rows) <= rows.shape[1]
    shared = _shared_few(rows.double() - mean, reference) if few else _shared_many(rows, own, reference, chunk)
    parts = (part.double() - mean for part in rows.split(chunk))
    rest = torch.cat([2 * away @ (mean - reference.mean) + scale * away.square().sum(1) for away in parts])
    each = rest - shared
    return each - each.mean()


def left_out(rows: Tensor, reference: Gaussian) -> Tensor:
    """The same by the jackknife itself, for n <= D: each row left out in turn. n eigenvalue problems of (n, n)."""
    parts, n = _Products(rows, reference), len(rows)
    without = (torch.ones(n).double() - one for one in torch.eye(n).double())
    distances = torch.tensor([parts.distance(weights) for weights in without], dtype=torch.float64)
    return (n - 1) * (distances.mean() - distances)


def bootstrap(
    rows: Tensor, reference: Gaussian, *, level: float = 0.95, resamples: int = 200, seed: int = 0
) -> Estimate:
    """The distance and its interval over rows (n, D) drawn again with replacement; meant for n <= D.

    A draw has fewer different images, and so a larger distance: quantiles are those of draws about their mean, put
    around the value. No draw touches features: all follows from (n, n) products that are made once.
    """
    parts = _Products(rows, reference)
    generator = torch.Generator().manual_seed(seed)
    n = len(rows)
    picks = (torch.randint(n, (n,), generator=generator) for _ in range(resamples))
    draws = np.array([parts.distance(pick.bincount(minlength=n).double()) for pick in picks])
    value = parts.distance(torch.ones(n).double())
    low, high = np.quantile(draws - draws.mean(), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, value + float(low), value + float(high), n)


def infinity(
    rows: Tensor, reference: Gaussian, influences: Tensor, *, points: int = 15, seed: int = 0
) -> tuple[float, Tensor]:
    """FID-infinity (arXiv 1911.07023) and its influences (n,) about 0.

    The distance of `points` random parts, from a tenth of the rows to all, against one over their size, is followed
    along the least-squares line to zero. The intercept is a weighted sum of distances, so a row's influence is
    that on the whole (`influences`) times the weights of the parts that hold it. ValueError below 20 rows.
    """
    n = len(rows)
    if n < LEAST_FOR_INFINITY:
        raise ValueError(f"FID-infinity needs at least {LEAST_FOR_INFINITY} images; given {n}")
    generator = torch.Generator().manual_seed(seed)
    sizes = [round(float(s)) for s in np.linspace(n / 10, n, points)]
    chosen = [torch.randperm(n, generator=generator)[:size] for size in sizes]
    weights = intercept_weights(1 / np.array(sizes))
    values = [frechet_rows(rows[part], reference) for part in chosen]
    share = torch.zeros(n).double()
    for weight, part in zip(weights, chosen, strict=True):
        share[part] += float(weight) * n / len(part)
    moved = share * influences
    return float(weights @ np.array(values)), moved - moved.mean()


def intercept_weights(x: np.ndarray) -> np.ndarray:
    """What the values at x (P,) are multiplied by to give the intercept of their least-squares line; they sum to 1."""
    away = x - x.mean()
    return 1 / len(x) - x.mean() * away / (away @ away)


class _Products:
    """What a Fréchet distance needs of rows, so that it is known for any weights of them: all in (n, n)."""

    def __init__(self, rows: Tensor, reference: Gaussian) -> None:
        rows = rows.double()
        mean = rows.mean(0)
        away, offset = rows - mean, mean - reference.mean
        self.plain = away @ away.T
        self.bent = away @ reference.covariance @ away.T
        self.to_reference = away @ offset
        self.fixed = float(offset.square().sum() + reference.covariance.trace())

    def distance(self, weights: Tensor) -> float:
        """With row i there weights[i] times."""
        n = float(weights.sum())
        shift = float(weights @ self.plain @ weights) / n**2
        apart = 2 * float(self.to_reference @ weights) / n + shift
        own = (float(self.plain.diagonal() @ weights) - n * shift) / (n - 1)
        return self.fixed + apart + own - 2 * self._shared(weights, n)

    def _shared(self, weights: Tensor, n: float) -> float:
        """tr (A B)^(1/2) from the rows that are there, centred at their weighted mean."""
        there = weights > 0
        weights, bent = weights[there], self.bent[there][:, there]
        to_mean = bent @ weights / n
        centred = bent - to_mean - to_mean[:, None] + weights @ to_mean / n
        scale = weights.sqrt()
        return float(_roots(centred * scale * scale[:, None] / (n - 1)).sum())


def _by_moments(rows: Tensor, reference: Gaussian) -> float:
    return frechet(moments(rows).gaussian(), reference)


def _roots(matrix: Tensor) -> Tensor:
    """The roots of a symmetric matrix's eigenvalues; rounding may leave those at zero below it."""
    return torch.linalg.eigvalsh(matrix).clamp(min=0).sqrt()


def _shared_few(away: Tensor, reference: Gaussian) -> Tensor:
    """c d^T G d for each row, in (n, n): n times the diagonal of (Z Z^T)^(1/2), with Z Z^T = X B X^T / (n - 1)."""
    n = len(away)
    values, vectors = torch.linalg.eigh(away @ reference.covariance @ away.T / (n - 1))
    return n * (vectors.square() @ values.clamp(min=0).sqrt())


def _shared_many(rows: Tensor, own: Gaussian, reference: Gaussian, chunk: int) -> Tensor:
    """The same in (D, D); directions in which there is nothing stay out."""
    values, vectors = torch.linalg.eigh(reference.root @ own.covariance @ reference.root)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    half = reference.root @ vectors[:, kept] * values[kept] ** -0.25
    parts = [((part.double() - own.mean) @ half).square().sum(1) for part in rows.split(chunk)]
    return torch.cat(parts) * len(rows) / (len(rows) - 1)
