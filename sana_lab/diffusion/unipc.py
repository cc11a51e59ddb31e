"""UniPC (arXiv 2302.04867): a multistep predictor, corrected with the evaluation of the next step."""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from sana_lab.diffusion.solvers import Prediction, at, log_snr
from sana_lab.types import Velocity


def unipc(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    /,
    order: Literal[1, 2, 3] = 2,  # order of the predictor; the corrector adds one
) -> Tensor:
    """UniPC-`order` in its B2(h) form with data prediction, alpha = 1 - t and sigma = t; one evaluation per step.

    Towards t = 0 the order decreases to 1, as in the authors' code. The prediction at t = 1, where the log-SNR is
    infinite, is used only in its own step.
    """
    grid, history, used, start = times.tolist(), list[Prediction](), list[Prediction](), x
    for i, (t, s) in enumerate(pairwise(grid)):
        data = x - t * velocity(x, at(t, x))
        if i:
            x = _advance(start, grid[i - 1], t, used, data)
        history = [(log_snr(t), data), *(p for p in history if math.isfinite(p[0]))][:order]
        used = history[: len(grid) - 1 - i] if grid[-1] == 0 else history
        start, x = x, _advance(x, t, s, used)
    return x


def _advance(x: Tensor, t: float, s: float, predictions: list[Prediction], end: Tensor | None = None) -> Tensor:
    """A step from t to s with predictions, newest (at t) first; with the prediction at s (`end`), a corrector step."""
    (start, data), *before = predictions
    h = log_snr(s) - start
    ratios = [(earlier - start) / h for earlier, _ in before]
    slopes = [(m - data) / r for (_, m), r in zip(before, ratios, strict=True)]
    if end is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, end - data]
    mean = sum((w * d for w, d in zip(_weights(ratios, h), slopes, strict=True)), data)
    return s / t * x + ((1 - s) - (1 - t) * s / t) * mean


def _weights(ratios: list[float], h: float) -> list[float]:
    """Weights of the differences in float64: 1/2 for one difference (authors' code), else from the order conditions."""
    if len(ratios) < 2:
        return [0.5] * len(ratios)
    phi, factorial, b = math.expm1(-h) / -h - 1, 1, list[float]()
    for i in range(1, len(ratios) + 1):
        b.append(phi * factorial / math.expm1(-h))
        factorial *= i + 1
        phi = phi / -h - 1 / factorial
    powers = torch.tensor(ratios, dtype=torch.float64) ** torch.arange(len(ratios))[:, None]
    return torch.linalg.solve(powers, torch.tensor(b, dtype=torch.float64)).tolist()
