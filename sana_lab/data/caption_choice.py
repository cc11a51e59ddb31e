"""Choice of one caption of an item that has several, by turn or by score.

Scores are CLIP scores in 0 to 100. The paper (arXiv 2410.10629, section 3.2) weights caption i by a softmax,
exp(c_i / T); the released code by a power, c_i ** (1 / max(T, 0.01)). Both leave out captions below a threshold.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Gt
from numpy.typing import NDArray

from sana_lab.data.random_numbers import uniform

Rule = Literal["rotation", "uniform", "softmax", "power"]

LEAST_TEMPERATURE = 0.01
"""Of the power, as in the released code."""


@dataclass(frozen=True)
class CaptionChoice:
    """How one of several captions is chosen each time that an item is used."""

    # rotation takes them in turn, uniform at random, softmax by exp(score / temperature) as the paper, power by
    # score ** (1 / temperature) as the released code
    rule: Rule = "rotation"
    temperature: Annotated[float, Gt(0)] = 0.1  # of softmax and power; lower prefers the best more
    min_score: float = 0.0  # captions of a lower score are left out, but for the best one of an item; 25 in the code


def probabilities(scores: NDArray[np.floating], counts: NDArray[np.integer], choice: CaptionChoice) -> NDArray:
    """Probability (N, M) of each caption; row i of `scores` (N, M) has counts[i] captions, NaN is a missing score.

    Captions without a score are never below the threshold and count as the mean of the item's scores, or as equal.
    """
    present = np.arange(scores.shape[1]) < counts[:, None]
    scores = np.where(present, scores, np.nan).astype(np.float64)
    known = present & ~np.isnan(scores)
    mean = np.where(known, scores, 0).sum(1) / np.maximum(known.sum(1), 1)
    filled = np.where(known, scores, mean[:, None])
    best = present & (filled == np.where(present, filled, -np.inf).max(1, keepdims=True))
    allowed = present & ((filled >= choice.min_score) | ~known)
    allowed = np.where(allowed.any(1, keepdims=True), allowed, best)
    weights = np.exp(_log_weights(filled, allowed, choice))
    return weights / weights.sum(1, keepdims=True)


def choose(
    scores: NDArray[np.floating],
    counts: NDArray[np.integer],
    rows: NDArray[np.integer],
    turns: NDArray[np.integer],
    choice: CaptionChoice,
    seed: int,
) -> NDArray[np.int64]:
    """Index (N,) of the caption of each item `rows` on its turn, a function of (seed, row, turn)."""
    p = probabilities(scores, counts, choice)
    if choice.rule == "rotation":
        allowed = p > 0
        order = np.argsort(~allowed, axis=1, kind="stable")
        start = (uniform(seed, rows, 0) * 2**32).astype(np.int64)
        return order[np.arange(len(p)), (start + turns) % allowed.sum(1)]
    below = uniform(seed, rows, turns)[:, None] >= p.cumsum(1)
    return np.minimum(below.sum(1), _last(p))


def _last(p: NDArray) -> NDArray:
    """Index of the last caption that can be chosen; rounding may put the sum of all below the random number."""
    return p.shape[1] - 1 - np.argmax(p[:, ::-1] > 0, axis=1)


def _log_weights(scores: NDArray, allowed: NDArray, choice: CaptionChoice) -> NDArray:
    """Logarithms (N, M), 0 for the largest and -inf for what is left out."""
    if choice.rule == "softmax":
        logs = scores / choice.temperature
    elif choice.rule == "power":
        logs = np.log(np.maximum(scores, 1e-6)) / max(choice.temperature, LEAST_TEMPERATURE)
    else:
        logs = np.zeros_like(scores)
    logs = np.where(allowed, logs, -np.inf)
    return logs - logs.max(1, keepdims=True)
