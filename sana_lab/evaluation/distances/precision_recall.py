"""Improved precision and recall (arXiv 1904.06991, k = 3), density and coverage (arXiv 2002.09797, k = 5).

The support of a set of features is a union of balls, one around each row out to its k-th neighbour. Each metric is a
mean over the generated images (precision, density) or over the reference's (recall, coverage); intervals are over
those, the other side's balls fixed. Shapes: n points, m centres, D features.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Membership(NamedTuple):
    """Counts of points in balls."""

    balls: Tensor  # (n,) number of balls that contain each point
    points: Tensor  # (m,) number of points in each ball


def radii(rows: Tensor, k: int, chunk: int = 512) -> Tensor:
    """Distance (n,) from each row to its k-th neighbour, itself not counted. ValueError for k rows or fewer."""
    if len(rows) <= k:
        raise ValueError(f"k = {k} neighbours need at least {k + 1} images; given {len(rows)}")
    return torch.cat([torch.cdist(part, rows).kthvalue(k + 1).values for part in rows.split(chunk)])


def membership(points: Tensor, centres: Tensor, radius: Tensor, chunk: int = 512) -> Membership:
    """Membership of points (n, D) in balls of radius (m,) around centres (m, D), boundaries included."""
    balls, counts = [], torch.zeros(len(centres), dtype=torch.long)
    for part in points.split(chunk):
        within = torch.cdist(part, centres) <= radius
        balls.append(within.sum(1))
        counts += within.sum(0)
    return Membership(torch.cat(balls), counts)


def precision(fake: Tensor, real: Tensor, k: int = 3) -> Tensor:
    """Whether each fake row is in a real row's ball: (n,) of 0 and 1. Recall exchanges the roles."""
    return (membership(fake, real, radii(real, k)).balls > 0).double()


def density(fake: Tensor, real: Tensor, k: int = 5) -> Tensor:
    """Number of real balls that contain each fake row, over k: (n,), of mean about 1 for equal distributions."""
    return membership(fake, real, radii(real, k)).balls.double() / k


def coverage(fake: Tensor, real: Tensor, k: int = 5) -> Tensor:
    """Whether each real row's ball contains a fake row: (m,) of 0 and 1."""
    return (membership(fake, real, radii(real, k)).points > 0).double()
