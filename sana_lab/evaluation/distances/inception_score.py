"""Inception Score (arXiv 1606.03498): exp of how much a picture says about its class. Shapes: n images, C classes."""

import math

import torch
from torch import Tensor


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 0) -> tuple[float, Tensor]:
    """The mean over `splits` parts of exp(mean KL(p(y | x), p(y))), and its influences (n,) about 0, as images came.

    logits (n, C). Images are dealt to the parts at random, by `seed`. Within a part the score's derivative in an
    image's weight is the score times how far its own KL lies from the mean: that p(y) moves too cancels. Where a part
    has few images p(y) is theirs and the score too high, so `splits` and n belong to it. ValueError with fewer than two
    to a part.
    """
    if len(logits) < 2 * splits:
        raise ValueError(f"the Inception Score needs at least {2 * splits} images; given {len(logits)}")
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    scores, influences = [], torch.zeros(len(logits)).double()
    for part in order.tensor_split(splits):
        score, moves = _part(logits[part].double())
        scores.append(score)
        influences[part] = moves * len(logits) / (splits * len(part))
    return sum(scores) / splits, influences


def _part(logits: Tensor) -> tuple[float, Tensor]:
    log_p = logits.log_softmax(1)
    log_mean = log_p.logsumexp(0) - math.log(len(logits))
    divergence = (log_p.exp() * (log_p - log_mean)).sum(1)
    score = float(divergence.mean().exp())
    return score, score * (divergence - divergence.mean())
