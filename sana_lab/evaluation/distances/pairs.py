"""One pass over all pairs of rows of two sets of features, in blocks, for any number of reductions.

The inner products of a block are computed once and given to each reduction; the pairs of a set with itself are computed
once for both orders. Memory beside the features is that of a block, whatever the number of rows.
Shapes: n rows x, m rows y, D features; a block has a rows of x and b of y.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

BLOCK = 512
"""Rows of either side in a block: its products and a float64 copy of them fit into a core's cache."""

ROUNDING = 8
"""Tolerance of a comparison of squared distances, in units of the last place of the rows' squared lengths."""

RESIDENT = 4 * 2**30
"""Largest size in bytes of features that a device holds whole; larger ones go there block by block."""


@dataclass(frozen=True)
class Block:
    """The pairs of some rows of x and some rows of y."""

    rows: slice
    columns: slice
    products: Tensor  # (a, b) inner products
    row_squares: Tensor  # (a,) squared lengths
    column_squares: Tensor  # (b,)
    width: int  # D
    diagonal: bool  # whether rows and columns are the same rows of one set
    mirrored: bool  # whether each pair counts in the other order too

    @cached_property
    def distances(self) -> Tensor:
        """Squared distances (a, b), not below 0."""
        sums = self.row_squares[:, None] + self.column_squares
        return torch.sub(sums, self.products, alpha=2, out=sums).clamp_(min=0)


class Reduction(ABC):
    """What is computed from the blocks of one pass."""

    @abstractmethod
    def begin(self, n: int, m: int, device: torch.device) -> None:
        """Prepare for n rows and m columns."""

    @abstractmethod
    def add(self, block: Block) -> None:
        """Add a block. Its tensors belong to all reductions: they must not be changed."""


def reduce_pairs(
    x: Tensor, y: Tensor | None, reductions: Sequence[Reduction], *, device: torch.device | str = "cpu"
) -> None:
    """Give all blocks of rows x (n, D) and y (m, D) to each reduction. Without y: the pairs of x with itself, of which
    the blocks above the diagonal are mirrored."""
    device, other = torch.device(device), x if y is None else y
    for reduction in reductions:
        reduction.begin(len(x), len(other), device)
    if not reductions:
        return
    columns = [(part, _on(other[part], device)) for part in _parts(other, device)]
    squares = [_squares(part, device) for _, part in columns]
    for i, rows in enumerate(_parts(x, device)):
        own = _on(x[rows], device)
        own_squares = _squares(own, device)
        for j, (part, theirs) in enumerate(columns):
            if y is None and j < i:
                continue
            products = own @ theirs.to(device).T
            diagonal = y is None and i == j
            block = Block(
                rows, part, products, own_squares, squares[j], x.shape[1], diagonal, y is None and not diagonal
            )
            for reduction in reductions:
                reduction.add(block)


def _parts(rows: Tensor, device: torch.device) -> list[slice]:
    """Slices of a block's rows. A GPU has larger blocks, for each costs launches."""
    size = BLOCK if device.type == "cpu" else 8 * BLOCK
    return [slice(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]


def _on(rows: Tensor, device: torch.device) -> Tensor:
    """The rows on the device, if the whole of their features may lie there."""
    whole = rows.untyped_storage().nbytes() <= RESIDENT
    return rows.to(device) if whole else rows


def _squares(rows: Tensor, device: torch.device) -> Tensor:
    return rows.double().square().sum(1).to(device, rows.dtype)
