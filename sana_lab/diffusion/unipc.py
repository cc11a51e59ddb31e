"""UniPC (arXiv 2302.04867): a multistep predictor, corrected with the next step's own evaluation."""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from sana_lab.diffusion.solvers import Prediction, at, log_snr
from sana_lab.types import Velocity


def unipc(velocity: Velocity, x: Tensor, times: Tensor, /, order: Literal[1, 2, 3] = 2) -> Tensor:
    """UniPC-`order` in its B2(h) form, predicting the data, with alpha = 1 - t and sigma = t; one evaluation a step.

    Order counts the predictor's; the corrector adds one. Towards t = 0 it falls to 1, as in the authors' code; what was
    predicted at t = 1, where the log-SNR is infinite, is not used again.
    """
    grid, known, used, start = times.tolist(), list[Prediction](), list[Prediction](), x
    for i, (t, s) in enumerate(pairwise(grid)):
        data = x - t * velocity(x, at(t, x))
        if i:
            x = _advance(start, grid[i - 1], t, used, data)
        known = [(log_snr(t), data), *(k for k in known if math.isfinite(k[0]))][:order]
        used = known[: len(grid) - 1 - i] if grid[-1] == 0 else known
        start, x = x, _advance(x, t, s, used)
    return x


def _advance(x: Tensor, t: float, s: float, known: list[Prediction], end: Tensor | None = None) -> Tensor:
    """A step from t to s on predictions of the data, newest first (made at t); with the one at its `end`, corrected."""
    (here, data), *before = known
    h = log_snr(s) - here
    ratios = [(there - here) / h for there, _ in before]
    slopes = [(m - data) / r for (_, m), r in zip(before, ratios, strict=True)]
    if end is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, end - data]
    mean = sum((w * d for w, d in zip(_weights(ratios, h), slopes, strict=True)), data)
    return s / t * x + ((1 - s) - (1 - t) * s / t) * mean


def _weights(ratios: list[float], h: float) -> list[float]:
    """Of the differences: half for a single one, as the authors simplify it; else what makes the order, in float64."""
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    phi, factorial, b = math.expm1(-h) / -h - 1, 1, list[float]()
    for i in range(1, len(ratios) + 1):
        b.append(phi * factorial / math.expm1(-h))
        factorial *= i + 1
        phi = phi / -h - 1 / factorial
    powers = torch.tensor(ratios, dtype=torch.float64) ** torch.arange(len(ratios))[:, None]
    return torch.linalg.solve(powers, torch.tensor(b, dtype=torch.float64)).tolist()
