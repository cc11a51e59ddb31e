"""SANA-Sprint's sampler: few steps of a consistency model (sCM, arXiv 2410.11081; SANA-Sprint, arXiv 2503.09641).

The papers' TrigFlow mixes data and noise by the cosine and sine of an angle. Divided by cosine + sine that is the
straight path (1 - t) data + t noise at t = sin / (sin + cos), so that the network's prediction stays a velocity, and
the data's standard deviation cancels.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from sana_lab.config.ranges import Angle
from sana_lab.diffusion import FreshNoise
from sana_lab.diffusion.solvers import at
from sana_lab.types import Velocity

TWO_STEPS = 1.3
"""Angle between the two steps of the released models."""


def scm(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    /,
    middle: Angle | None = TWO_STEPS,  # angle between the steps where there are 2; null halves the quarter circle
    *,
    noise: FreshNoise,
) -> Tensor:
    """SANA-Sprint's sampler, for models distilled to few steps: predict the data, mix them with fresh noise, repeat.

    One evaluation per step. Its times are even angles (`schedule`), whatever the shift of the flow.
    """
    for t, s in pairwise(times.tolist()):
        data = x - t * velocity(x, at(t, x))
        x = data if s == 0 else (1 - s) * data + s * noise().to(x)
    return x


def schedule(steps: int, middle: float | None = TWO_STEPS) -> Tensor:
    """(steps + 1,) float64 times of even angles from pi / 2 (noise) to 0 (data); of 2 steps, by way of `middle`."""
    angles = torch.linspace(math.pi / 2, 0, steps + 1, dtype=torch.float64)
    if steps == 2 and middle is not None:
        angles[1] = middle
    return angles.sin() / (angles.sin() + angles.cos())
