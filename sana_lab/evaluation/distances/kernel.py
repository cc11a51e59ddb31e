"""Squared maximum mean discrepancy of two sets of features: KID (arXiv 1801.01401) and CMMD (arXiv 2401.09603).

The full two-sample U-statistic, unbiased at every n: about 0 where both distributions are the same, and below as well.
Nothing is drawn at random. Its standard error counts both samples and both orders of its variance, so that it holds
there too; but there it goes with the value itself, so ask `z` whether two distributions differ. Kernels leave out a
constant, which takes no part in a discrepancy but would round it.
Shapes: n rows measured and m of the reference, D features.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]
"""rows (a, D) and (b, D) -> (a, b), less a constant"""

LEAST = 4
"""Rows on a side, for the variance."""


class Discrepancy(NamedTuple):
    """A squared discrepancy."""

    value: float
    error: float  # standard error, over both samples
    null_error: float  # what it would be if both distributions were the same
    influences: Tensor  # (n,) about 0, of the measured rows with the reference held

    @property
    def z(self) -> float:
        """Of mean 0 and deviation 1 where both distributions are the same."""
        return self.value / self.null_error

    def scaled(self, by: float) -> "Discrepancy":
        """In another unit."""
        return Discrepancy(self.value * by, self.error * by, self.null_error * by, self.influences * by)


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """KID's (x y / D + 1)^3, less 1."""
    product = (x @ y.T / x.shape[1]).double()
    return product * (3 + product * (3 + product))


def gaussian(x: Tensor, y: Tensor, sigma: float = 10.0) -> Tensor:
    """CMMD's exp(-|x - y|^2 / (2 sigma^2)), less 1."""
    lengths = x.double().square().sum(1)[:, None] + y.double().square().sum(1)
    apart = (lengths - 2 * (x @ y.T).double()).clamp(min=0)
    return torch.expm1(-apart / (2 * sigma**2))


def discrepancy(x: Tensor, y: Tensor, kernel: Kernel, *, biased: bool = False) -> Discrepancy:
    """Between rows x (n, D) and the reference's y (m, D). ValueError below four rows on a side.

    `biased` is the V-statistic, in which each row also meets itself; its error and influences are the other's.
    """
    if min(len(x), len(y)) < LEAST:
        raise ValueError(f"a discrepancy needs at least {LEAST} images on a side; given {len(x)} and {len(y)}")
    own, other, across = _own(x, kernel), _own(y, kernel), _across(x, y, kernel)
    here, there = own.means - across.means, other.means - across.column_means
    v_statistic = own.with_itself + other.with_itself - 2 * across.means.mean()
    value = v_statistic if biased else here.mean() + there.mean()
    return Discrepancy(float(value), *_errors(own, other, across, here, there), 2 * (here - here.mean()))


class _Own(NamedTuple):
    """A sample against itself, its diagonal left out but in the last."""

    means: Tensor  # (n,) of each row
    interaction: float  # mean square of the kernel, centred in rows and columns
    with_itself: Tensor  # () the mean, diagonal included


class _Across(NamedTuple):
    """A sample against another."""

    means: Tensor  # (n,)
    column_means: Tensor  # (m,)
    interaction: float


def _own(x: Tensor, kernel: Kernel) -> _Own:
    n = len(x)
    rows, _, squares, diagonal = _sums(x, x, kernel)
    means = (rows - diagonal) / (n - 1)
    square = (squares - float(diagonal.square().sum())) / (n * (n - 1))
    interaction = (square - 2 * means.square().mean() + means.mean() ** 2) / (1 - 2 / (n - 1))
    return _Own(means, max(0.0, float(interaction)), rows.sum() / n**2)


def _across(x: Tensor, y: Tensor, kernel: Kernel) -> _Across:
    n, m = len(x), len(y)
    rows, columns, squares, _ = _sums(x, y, kernel)
    means, column_means = rows / m, columns / n
    spread = squares / (n * m) - means.square().mean() - column_means.square().mean() + means.mean() ** 2
    return _Across(means, column_means, max(0.0, float(spread / (1 - 1 / n - 1 / m))))


def _errors(own: _Own, other: _Own, across: _Across, here: Tensor, there: Tensor) -> tuple[float, float]:
    """From the variance's first order, freed of what the second adds to its estimate, and the second (Hoeffding).

    Both, and the second alone. The first may come out below zero, as it must to be right in the mean; half of the
    second is always left.
    """
    n, m = len(here), len(there)
    first = float(here.var()) - own.interaction / (n - 1) - across.interaction / m
    first_other = float(there.var()) - other.interaction / (m - 1) - across.interaction / n
    alone = 2 * own.interaction / (n * (n - 1)) + 2 * other.interaction / (m * (m - 1))
    second = alone + 4 * across.interaction / (n * m)
    return max(4 * first / n + 4 * first_other / m + second, second / 2) ** 0.5, second**0.5


def _sums(x: Tensor, y: Tensor, kernel: Kernel, chunk: int = 256) -> tuple[Tensor, Tensor, float, Tensor]:
    """Of the kernel's matrix (n, m), never all at once: sums of rows and columns, of squares, and the diagonal."""
    rows, diagonal, columns, squares = [], [], torch.zeros(len(y)).double(), 0.0
    for start in range(0, len(x), chunk):
        block = kernel(x[start : start + chunk], y)
        rows.append(block.sum(1))
        diagonal.append(block[:, start:].diagonal())
        columns += block.sum(0)
        squares += float(block.square().sum())
    return torch.cat(rows), columns, squares, torch.cat(diagonal)
