"""Squared maximum mean discrepancy (MMD) of two sets of features: KID (arXiv 1801.01401) and CMMD (arXiv 2401.09603).

The full two-sample U-statistic, without random subsets and unbiased at every n: about 0, of either sign, for equal
distributions. Its standard error covers both samples and both orders of the variance, so it holds there too; but there
it is correlated with the value, so test with `z` whether two distributions differ. Kernels omit their constant term,
which cancels in a discrepancy but would cost precision.
Shapes: n generated rows and m of the reference, D features.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Kernel = Callable[[Tensor, Tensor], Tensor]
"""rows (a, D) and (b, D) -> (a, b), less a constant"""

MIN_IMAGES = 4
"""On either side, for the variance."""


class Discrepancy(NamedTuple):
    """A squared discrepancy with its standard errors."""

    value: float
    error: float  # standard error, over both samples
    null_error: float  # standard error under the hypothesis that both distributions are the same
    influences: Tensor  # (n,) of mean 0, of the generated rows with the reference fixed

    @property
    def z(self) -> float:
        """Test statistic, of mean 0 and deviation 1 for equal distributions."""
        return self.value / self.null_error

    def scaled(self, factor: float) -> "Discrepancy":
        """The discrepancy times a constant."""
        return Discrepancy(self.value * factor, self.error * factor, self.null_error * factor, self.influences * factor)


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """KID's (x y / D + 1)^3, less 1."""
    product = (x @ y.T / x.shape[1]).double()
    return product * (3 + product * (3 + product))


def gaussian(x: Tensor, y: Tensor, sigma: float = 10.0) -> Tensor:
    """CMMD's exp(-|x - y|^2 / (2 sigma^2)), less 1."""
    lengths = x.double().square().sum(1)[:, None] + y.double().square().sum(1)
    apart = (lengths - 2 * (x @ y.T).double()).clamp(min=0)
    return torch.expm1(-apart / (2 * sigma**2))


def discrepancy(x: Tensor, y: Tensor, kernel: Kernel, *, biased: bool = False, same: bool = False) -> Discrepancy:
    """Discrepancy of rows x (n, D) and the reference's y (m, D). ValueError below four rows on either side.

    `biased` gives the V-statistic, which includes the kernel's diagonal, with the U-statistic's error and influences.
    `same`: y holds the rows of x in any order. A row is then not paired with itself across the sides either, as it is
    not within one, so that the discrepancy is 0.
    """
    if min(len(x), len(y)) < MIN_IMAGES:
        raise ValueError(f"a discrepancy needs at least {MIN_IMAGES} images on a side; given {len(x)} and {len(y)}")
    own = _own(x, kernel)
    other, across = (own, _with_itself(own)) if same else (_own(y, kernel), _across(x, y, kernel))
    terms, other_terms = own.means - across.means, other.means - across.column_means
    v_statistic = own.with_itself + other.with_itself - 2 * across.mean
    value = v_statistic if biased else terms.mean() + other_terms.mean()
    errors = _errors(own, other, across, terms, other_terms)
    return Discrepancy(float(value), *errors, 2 * (terms - terms.mean()))


class _Own(NamedTuple):
    """Kernel statistics of a sample with itself, without the diagonal."""

    means: Tensor  # (n,) row means
    interaction: float  # mean square of the kernel matrix, centred in rows and columns
    with_itself: Tensor  # () mean including the diagonal


class _Across(NamedTuple):
    """Kernel statistics of two samples."""

    means: Tensor  # (n,) row means
    column_means: Tensor  # (m,)
    interaction: float
    mean: Tensor  # () over all pairs


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
    return _Across(means, column_means, max(0.0, float(spread / (1 - 1 / n - 1 / m))), means.mean())


def _with_itself(own: _Own) -> _Across:
    """Of a sample and its own rows, each paired with the others."""
    return _Across(own.means, own.means, own.interaction, own.with_itself)


def _errors(own: _Own, other: _Own, across: _Across, terms: Tensor, other_terms: Tensor) -> tuple[float, float]:
    """From the variance's first order, freed of what the second adds to its estimate, and the second (Hoeffding).

    Both, and the second alone. The first may come out below zero, as it must to be right in the mean; half of the
    second is always left.
    """
    n, m = len(terms), len(other_terms)
    first = float(terms.var()) - own.interaction / (n - 1) - across.interaction / m
    first_other = float(other_terms.var()) - other.interaction / (m - 1) - across.interaction / n
    within = 2 * own.interaction / (n * (n - 1)) + 2 * other.interaction / (m * (m - 1))
    second = within + 4 * across.interaction / (n * m)
    return max(4 * first / n + 4 * first_other / m + second, second / 2) ** 0.5, second**0.5


def _sums(x: Tensor, y: Tensor, kernel: Kernel, chunk: int = 256) -> tuple[Tensor, Tensor, float, Tensor]:
    """Row sums, column sums, sum of squares and diagonal of the kernel matrix (n, m), block by block."""
    rows, diagonal, columns, squares = [], [], torch.zeros(len(y)).double(), 0.0
    for start in range(0, len(x), chunk):
        block = kernel(x[start : start + chunk], y)
        rows.append(block.sum(1))
        diagonal.append(block[:, start:].diagonal())
        columns += block.sum(0)
        squares += float(block.square().sum())
    return torch.cat(rows), columns, squares, torch.cat(diagonal)
