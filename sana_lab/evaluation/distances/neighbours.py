"""How much of one set of features lies in another: balls around each row that reach to its k-th neighbour.

Improved precision and recall (arXiv 1904.06991, k = 3), density and coverage (arXiv 2002.09797, k = 5). Each is a mean
of outcomes, of the measured images (precision, density) or of the reference's (recall, coverage); intervals are over
those, the other side's balls held. Shapes: n points, m centres, D features.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Inside(NamedTuple):
    """Who lies where."""

    balls: Tensor  # (n,) how many balls hold each point
    points: Tensor  # (m,) how many points lie in each ball


def radii(rows: Tensor, k: int, chunk: int = 512) -> Tensor:
    """The distance (n,) from each row to its k-th neighbour, itself not counted. ValueError without k others."""
    if len(rows) <= k:
        raise ValueError(f"k = {k} neighbours need at least {k + 1} images; given {len(rows)}")
    return torch.cat([torch.cdist(part, rows).kthvalue(k + 1).values for part in rows.split(chunk)])


def inside(points: Tensor, centres: Tensor, reach: Tensor, chunk: int = 512) -> Inside:
    """Which points (n, D) lie in the balls of those radii around centres (m, D), borders included."""
    balls, held = [], torch.zeros(len(centres), dtype=torch.long)
    for part in points.split(chunk):
        within = torch.cdist(part, centres) <= reach
        balls.append(within.sum(1))
        held += within.sum(0)
    return Inside(torch.cat(balls), held)


def precision(fake: Tensor, real: Tensor, k: int = 3) -> Tensor:
    """Whether each fake row lies in the ball of a real one: (n,) zeros and ones. Recall is this the other way round."""
    return (inside(fake, real, radii(real, k)).balls > 0).double()


def density(fake: Tensor, real: Tensor, k: int = 5) -> Tensor:
    """In how many real balls each fake row lies, over k: (n,); its mean is about 1 where both distributions agree."""
    return inside(fake, real, radii(real, k)).balls.double() / k


def coverage(fake: Tensor, real: Tensor, k: int = 5) -> Tensor:
    """Whether the ball of each real row holds a fake one: (m,) zeros and ones."""
    return (inside(fake, real, radii(real, k)).points > 0).double()
