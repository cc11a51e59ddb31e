"""Mean and covariance of features that come in batches. Shapes: B rows of a batch, D features."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a distribution, all that a Fréchet distance depends on."""

    mean: Tensor  # (D,) float64
    covariance: Tensor  # (D, D) float64

    @cached_property
    def root(self) -> Tensor:
        """Symmetric square root of the covariance (D, D), cached."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


@dataclass
class Moments:
    """Running sums for the mean and covariance of rows, in float64, of differences to the first row."""

    n: int = 0
    origin: Tensor | None = None  # (D,)
    total: Tensor | None = None  # (D,)
    products: Tensor | None = None  # (D, D)

    def add(self, rows: Tensor) -> None:
        """Add rows (B, D)."""
        if not len(rows):
            return
        rows = rows.double()
        if self.origin is None or self.total is None or self.products is None:
            self.origin, width = rows[0].clone(), rows.shape[1]
            self.total, self.products = rows.new_zeros(width), rows.new_zeros(width, width)
        rows = rows - self.origin
        self.n += len(rows)
        self.total += rows.sum(0)
        self.products.addmm_(rows.T, rows)

    def merge(self, other: "Moments") -> None:
        """Add the rows of other moments, such as another process's."""
        if not other.n:
            return
        assert other.origin is not None
        assert other.total is not None
        assert other.products is not None
        if self.origin is None or self.total is None or self.products is None:
            self.origin = other.origin
            self.total, self.products = torch.zeros_like(other.total), torch.zeros_like(other.products)
        shift = other.origin - self.origin
        cross = torch.outer(other.total, shift)
        self.n += other.n
        self.total += other.total + other.n * shift
        self.products += other.products + cross + cross.T + other.n * torch.outer(shift, shift)

    @property
    def mean(self) -> Tensor:
        """(D,)"""
        assert self.origin is not None
        assert self.total is not None
        return self.origin + self.total / self.n

    @property
    def covariance(self) -> Tensor:
        """(D, D), normalised by n - 1."""
        assert self.total is not None
        assert self.products is not None
        return (self.products - torch.outer(self.total, self.total) / self.n) / (self.n - 1)

    def gaussian(self) -> Gaussian:
        """Mean and covariance of the rows so far."""
        return Gaussian(self.mean, self.covariance)


def moments(rows: Tensor, chunk: int = 4096) -> Moments:
    """Moments of rows (n, D) of any float type, in float64, without a float64 copy of them all."""
    total = Moments()
    for part in rows.split(chunk):
        total.add(part)
    return total
