"""Improved precision and recall (arXiv 1904.06991, k = 3), density and coverage (arXiv 2002.09797, k = 5).

The support of a set of features is a union of balls, one around each row out to its k-th neighbour. Each metric is a
mean over the generated images (precision, density) or over the reference's (recall, coverage); intervals are over
those, the other side's balls fixed. Squared distances come from inner products; one that exceeds a ball's by less than
its rounding counts as equal. Shapes: n points, m centres, D features.
"""

import torch
from torch import Tensor

from sana_lab.evaluation.distances.pairs import ROUNDING, Block, Reduction, reduce_pairs


class Neighbours(Reduction):
    """Squared distances (n, k) from each row to its k nearest others, of a set with itself."""

    nearest: Tensor  # ascending

    def __init__(self, k: int) -> None:
        self.k = k

    def begin(self, n: int, m: int, device: torch.device) -> None:
        if n <= self.k:
            raise ValueError(f"k = {self.k} neighbours need at least {self.k + 1} images; given {n}")
        self.nearest = torch.full((n, self.k), float("inf"), dtype=torch.float64, device=device)

    def add(self, block: Block) -> None:
        distances = block.distances
        if block.diagonal:
            distances = distances.clone().fill_diagonal_(float("inf"))
        self._merge(block.rows, distances)
        if block.mirrored:
            self._merge(block.columns, distances.T)

    def _merge(self, rows: slice, distances: Tensor) -> None:
        """Merge distances (a, b), of rows that have one below their k-th alone: soon these are few."""
        nearest = self.nearest[rows]
        near = (distances.amin(1) < nearest[:, -1]).nonzero()[:, 0]
        if len(near):
            candidates = torch.cat([nearest[near], distances[near].double()], 1)
            nearest[near] = candidates.topk(self.k, largest=False, sorted=True).values

    def squared_radii(self, k: int) -> Tensor:
        """Squared distance (n,) from each row to its k-th neighbour."""
        return self.nearest[:, k - 1]


class Membership(Reduction):
    """Counts of points x in balls around y, boundaries included; `inside_out`: of points y in balls around x."""

    balls: Tensor  # number of balls that contain each point
    points: Tensor  # number of points in each ball

    def __init__(self, squared_radii: Tensor, *, inside_out: bool = False) -> None:
        self.squared_radii, self.inside_out = squared_radii, inside_out

    def begin(self, n: int, m: int, device: torch.device) -> None:
        points, balls = (m, n) if self.inside_out else (n, m)
        self.balls, self.points = (torch.zeros(size, dtype=torch.long, device=device) for size in (points, balls))

    def add(self, block: Block) -> None:
        if self.inside_out:
            radii, own = self.squared_radii[block.rows], block.row_squares
            within = block.distances <= self._reach(radii, own)[:, None]
            self.points[block.rows] += within.count_nonzero(1)
            self.balls[block.columns] += within.count_nonzero(0)
        else:
            radii, own = self.squared_radii[block.columns], block.column_squares
            within = block.distances <= self._reach(radii, own)
            self.balls[block.rows] += within.count_nonzero(1)
            self.points[block.columns] += within.count_nonzero(0)

    @staticmethod
    def _reach(squared_radii: Tensor, squares: Tensor) -> Tensor:
        """Squared radii with the rounding of a distance between rows of this length."""
        rounding = 2 * ROUNDING * torch.finfo(squares.dtype).eps * squares
        return (squared_radii + rounding).to(squares.dtype)


def radii(rows: Tensor, k: int) -> Tensor:
    """Distance (n,) from each row to its k-th neighbour, itself not counted. ValueError for k rows or fewer."""
    neighbours = Neighbours(k)
    reduce_pairs(rows, None, [neighbours])
    return neighbours.squared_radii(k).sqrt()


def membership(points: Tensor, centres: Tensor, k: int) -> Membership:
    """Membership of points (n, D) in the balls around centres (m, D) out to their k-th neighbours."""
    neighbours = Neighbours(k)
    reduce_pairs(centres, None, [neighbours])
    counts = Membership(neighbours.squared_radii(k))
    reduce_pairs(points, centres, [counts])
    return counts


def share_inside(counts: Membership) -> Tensor:
    """Whether each point is in a ball: (n,) of 0 and 1. Precision of generated points, recall of real ones."""
    return (counts.balls > 0).double().cpu()


def density_of(counts: Membership, k: int) -> Tensor:
    """Number of balls that contain each point, over k: (n,), of mean about 1 for equal distributions."""
    return counts.balls.double().cpu() / k


def share_reached(counts: Membership) -> Tensor:
    """Whether each ball contains a point: (m,) of 0 and 1. Coverage of the real images."""
    return (counts.points > 0).double().cpu()


def precision(fake: Tensor, real: Tensor, k: int = 3) -> Tensor:
    """Whether each fake row is in a real row's ball: (n,) of 0 and 1. Recall exchanges the roles."""
    return share_inside(membership(fake, real, k))


def density(fake: Tensor, real: Tensor, k: int = 5) -> Tensor:
    """Number of real balls that contain each fake row, over k: (n,), of mean about 1 for equal distributions."""
    return density_of(membership(fake, real, k), k)


def coverage(fake: Tensor, real: Tensor, k: int = 5) -> Tensor:
    """Whether each real row's ball contains a fake row: (m,) of 0 and 1."""
    return share_reached(membership(fake, real, k))
