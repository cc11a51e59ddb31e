"""Solvers of dx/dt = velocity(x, t): pure functions that keep x's dtype.

`times` (M + 1,) fall from noise towards 0. Coefficients are computed in float64 on the host.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from sana_lab.types import Velocity


def euler(velocity: Velocity, x: Tensor, times: Tensor, /) -> Tensor:
    """First order; one evaluation a step."""
    for t, s in pairwise(times.tolist()):
        x = x + (s - t) * velocity(x, _at(t, x))
    return x


def heun(velocity: Velocity, x: Tensor, times: Tensor, /) -> Tensor:
    """Second order (explicit trapezoid); two evaluations a step, one in the step that ends at 0 (EDM, algorithm 1)."""
    for t, s in pairwise(times.tolist()):
        v = velocity(x, _at(t, x))
        guess = x + (s - t) * v
        x = guess if s == 0 else x + (s - t) / 2 * (v + velocity(guess, _at(s, x)))
    return x


def dpmpp(velocity: Velocity, x: Tensor, times: Tensor, /, order: Literal[1, 2] = 2) -> Tensor:
    """Flow-DPM-Solver: DPM-Solver++ multistep (arXiv 2211.01095) with alpha = 1 - t, sigma = t (SANA, algorithm 1).

    One evaluation a step. The first step and the one that ends at t = 0 are first order, as in the released code: the
    paper's printed algorithm keeps order 2 there, where its ratio of step lengths diverges.
    """
    before: tuple[Tensor, float] | None = None  # the last prediction of the data, and its log-SNR
    for t, s in pairwise(times.tolist()):
        data = x - t * velocity(x, _at(t, x))
        slope = data
        if order == 2 and before is not None and s > 0 and math.isfinite(before[1]):
            r = (_log_snr(t) - before[1]) / (_log_snr(s) - _log_snr(t))
            slope = data + (data - before[0]) / (2 * r)
        x = s / t * x + ((1 - s) - (1 - t) * s / t) * slope  # the last factor is alpha_s (1 - exp(-h))
        before = data, _log_snr(t)
    return x


def _log_snr(t: float) -> float:
    return -math.inf if t >= 1 else math.log1p(-t) - math.log(t)


def _at(t: float, x: Tensor) -> Tensor:
    """Times (B,) in float32 or wider: half precision would move them by a step of the schedule."""
    return x.new_full((x.shape[0],), t, dtype=torch.promote_types(x.dtype, torch.float32))
