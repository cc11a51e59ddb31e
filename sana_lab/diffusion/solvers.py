"""Solvers of dx/dt = velocity(x, t): pure functions that keep x's dtype.

`times` (M + 1,) decrease from noise towards 0. Coefficients are float64 on the CPU.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from sana_lab.types import Time, Velocity


def euler(velocity: Velocity, x: Tensor, times: Tensor, /) -> Tensor:
    """First order; one evaluation per step. With noise prediction (`Ddpm`) it is DDIM."""
    for t, s in pairwise(times.tolist()):
        x = x + (s - t) * velocity(x, at(t, x))
    return x


def heun(velocity: Velocity, x: Tensor, times: Tensor, /) -> Tensor:
    """Second order (explicit trapezoid); two evaluations per step, one in the step that ends at 0 (EDM, alg. 1)."""
    for t, s in pairwise(times.tolist()):
        v = velocity(x, at(t, x))
        guess = x + (s - t) * v
        x = guess if s == 0 else x + (s - t) / 2 * (v + velocity(guess, at(s, x)))
    return x


def rf_solver(velocity: Velocity, x: Tensor, times: Tensor, /) -> Tensor:
    """Second-order Taylor expansion in time (RF-Solver, arXiv 2411.04746); two evaluations per step.

    The velocity's derivative is estimated over half an Euler step, which gives the midpoint rule. It is defined for
    rising times too, from data to noise (`diffusion.inversion`).
    """
    for t, s in pairwise(times.tolist()):
        h, v = s - t, velocity(x, at(t, x))
        derivative = (velocity(x + h / 2 * v, at(t + h / 2, x)) - v) / (h / 2)
        x = x + h * v + h**2 / 2 * derivative
    return x


def dpmpp(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    /,
    order: Literal[1, 2, 3] = 2,  # order of the multistep method; 3 converges at order 2
) -> Tensor:
    """Flow-DPM-Solver: DPM-Solver++ multistep (arXiv 2211.01095) with alpha = 1 - t, sigma = t (SANA, algorithm 1).

    One evaluation per step. The first step and the step that ends at t = 0 are first order, as in the released code;
    the paper's algorithm uses order 2 in the last step, where its ratio of step lengths diverges. Order 3 follows the
    released code, which halves the second derivative and so converges at order 2. `unipc` reaches order 3.
    """
    grid, before = times.tolist(), list[Prediction]()  # newest first
    for i, (t, s) in enumerate(pairwise(grid)):
        data = x - t * velocity(x, at(t, x))
        slope = _slope(data, before[: min(order, _ceiling(grid, i)) - 1], log_snr(t), log_snr(s))
        x = s / t * x + ((1 - s) - (1 - t) * s / t) * slope  # the last factor is alpha_s (1 - exp(-h))
        before = [(log_snr(t), data), *before][:2] if t < 1 else []
    return x


Prediction = tuple[float, Tensor]
"""Log-SNR of a time, and the predicted data at that time."""


def log_snr(t: float) -> float:
    """log alpha - log sigma: minus infinity at t = 1, infinity at t = 0."""
    return -math.inf if t >= 1 else math.inf if t <= 0 else math.log1p(-t) - math.log(t)


def at(t: Time, x: Tensor) -> Tensor:
    """Times (B,), or intervals (B, 2), in float32 or wider, because half precision would round them by a step of the
    schedule.

    They are on the CPU, so that reading them does not synchronise with the device.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(t, tuple):
        return torch.tensor([t], dtype=dtype, device="cpu").repeat(x.shape[0], 1)
    return torch.full((x.shape[0],), t, dtype=dtype, device="cpu")


def _ceiling(grid: list[float], i: int) -> int:
    """Highest order of step i: 1 if it ends at 0; 2 for the step before if there are fewer than 15 (released code)."""
    if grid[i + 1] == 0:
        return 1
    return 2 if len(grid) <= 15 and grid[i + 2 :] == [0] else 3


def _slope(data: Tensor, before: list[Prediction], start: float, end: float) -> Tensor:
    """Predicted data over a step between two log-SNRs: constant, or with one or two finite-difference derivatives."""
    if not before:
        return data
    h, (first, m1) = end - start, before[0]
    r = (start - first) / h
    if len(before) == 1:
        return data + (data - m1) / (2 * r)
    second, m2 = before[1]
    q, r2 = -1 / math.expm1(-h), (first - second) / h
    bend = ((data - m1) / r - (m1 - m2) / r2) / (r + r2)
    return data + (q - 1 / h) * ((data - m1) / r + r * bend) + (1 / h**2 - q / h + q / 2) * bend
