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

from sana_lab.evaluation.distances.pairs import Block, Reduction, reduce_pairs

Kernel = Callable[[Block], Tensor]
"""a block of pairs (a, b) -> the kernel of each in float64, less a constant; a new tensor"""

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


def polynomial(block: Block) -> Tensor:
    """KID's (x y / D + 1)^3, less 1."""
    product = block.products.double() / block.width
    return (product + 3).mul_(product).add_(3).mul_(product)


def gaussian(block: Block, sigma: float = 10.0) -> Tensor:
    """CMMD's exp(-|x - y|^2 / (2 sigma^2)), less 1."""
    return (block.distances.double() / (-2 * sigma**2)).expm1_()


class KernelSums(Reduction):
    """Sums of a kernel over rows and columns, of its squares, and its diagonal where x is y."""

    rows: Tensor  # (n,) float64
    columns: Tensor  # (m,); where x is y, those of the diagonal blocks alone
    squares: Tensor  # ()
    diagonal: Tensor  # (n,)

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def begin(self, n: int, m: int, device: torch.device) -> None:
        self.rows, self.diagonal = (torch.zeros(n, dtype=torch.float64, device=device) for _ in range(2))
        self.columns = torch.zeros(m, dtype=torch.float64, device=device)
        self.squares = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, block: Block) -> None:
        values = self.kernel(block)
        flat, twice = values.flatten(), 2 if block.mirrored else 1
        self.rows[block.rows] += values.sum(1)
        (self.rows if block.mirrored else self.columns)[block.columns] += values.sum(0)
        self.squares += twice * flat.dot(flat)
        if block.diagonal:
            self.diagonal[block.rows] = values.diagonal()


def discrepancy(x: Tensor, y: Tensor, kernel: Kernel, *, biased: bool = False, same: bool = False) -> Discrepancy:
    """Discrepancy of rows x (n, D) and the reference's y (m, D). ValueError below four rows on either side.

    `biased` gives the V-statistic, which includes the kernel's diagonal, with the U-statistic's error and influences.
    `same`: y holds the rows of x in any order. A row is then not paired with itself across the sides either, as it is
    not within one, so that the discrepancy is 0.
    """
    return from_sums(*kernel_sums(x, y, kernel, same=same), biased=biased)


def kernel_sums(
    x: Tensor, y: Tensor, kernel: Kernel, *, same: bool = False, device: torch.device | str = "cpu"
) -> tuple[KernelSums, tuple[KernelSums, KernelSums] | None]:
    """Sums of x with itself, and those of y with itself and of x with y; None where y is x."""
    own, other, across = KernelSums(kernel), KernelSums(kernel), KernelSums(kernel)
    reduce_pairs(x, None, [own], device=device)
    if same:
        return own, None
    reduce_pairs(y, None, [other], device=device)
    reduce_pairs(x, y, [across], device=device)
    return own, (other, across)


def from_sums(own: KernelSums, reference: tuple[KernelSums, KernelSums] | None, *, biased: bool = False) -> Discrepancy:
    """`discrepancy` from the sums of x with itself, and those of y with itself and of x with y; None: y is x."""
    n, m = len(own.rows), len(own.rows if reference is None else reference[0].rows)
    if min(n, m) < MIN_IMAGES:
        raise ValueError(f"a discrepancy needs at least {MIN_IMAGES} images on a side; given {n} and {m}")
    ours = _own(own)
    theirs, across = (ours, _with_itself(ours)) if reference is None else (_own(reference[0]), _across(reference[1]))
    terms, other_terms = ours.means - across.means, theirs.means - across.column_means
    v_statistic = ours.with_itself + theirs.with_itself - 2 * across.mean
    value = v_statistic if biased else terms.mean() + other_terms.mean()
    errors = _errors(ours, theirs, across, terms, other_terms)
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


def _own(sums: KernelSums) -> _Own:
    n, rows, diagonal = len(sums.rows), sums.rows.cpu(), sums.diagonal.cpu()
    means = (rows - diagonal) / (n - 1)
    square = (float(sums.squares) - float(diagonal.square().sum())) / (n * (n - 1))
    interaction = (square - 2 * means.square().mean() + means.mean() ** 2) / (1 - 2 / (n - 1))
    return _Own(means, max(0.0, float(interaction)), rows.sum() / n**2)


def _across(sums: KernelSums) -> _Across:
    n, m = len(sums.rows), len(sums.columns)
    means, column_means = sums.rows.cpu() / m, sums.columns.cpu() / n
    spread = float(sums.squares) / (n * m) - means.square().mean() - column_means.square().mean() + means.mean() ** 2
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
