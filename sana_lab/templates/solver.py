"""A solver: the flow from noise to data, in steps."""

from itertools import pairwise

import torch
from torch import Tensor

from sana_lab.types import Velocity


def midpoint(
    velocity: Velocity,  # (x, t) -> dx/dt, with t (B,) on the CPU
    x: Tensor,  # noise (B, C, h, w)
    times: Tensor,  # (M + 1,) from 1, noise, to 0, data
    /,
    at: float = 0.5,  # position of the second evaluation within a step
) -> Tensor:
    """Second order; two evaluations per step."""
    for t, s in pairwise(times.tolist()):
        middle = t + at * (s - t)
        half = x + (middle - t) * velocity(x, torch.full((len(x),), t))
        x = x + (s - t) * velocity(half, torch.full((len(x),), middle))
    return x
