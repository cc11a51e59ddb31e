"""Sampling by mean velocities (MeanFlow, arXiv 2505.13447): each step jumps over its interval of time at once."""

from itertools import pairwise

from torch import Tensor

from sana_lab.diffusion.solvers import at
from sana_lab.types import Velocity


def meanflow(velocity: Velocity, x: Tensor, times: Tensor, /) -> Tensor:
    """Steps of a network of mean velocities u (`dit.mean_velocity`): x_s = x_t - (t - s) u(x_t, s, t).

    One evaluation per step, exact for an exact u in any number of steps. A network that was trained with guidance in
    its target (method `meanflow`) is sampled with guidance 1.
    """
    for t, s in pairwise(times.tolist()):
        x = x - (t - s) * velocity(x, at((t, s), x))
    return x
