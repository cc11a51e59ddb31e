"""Inception Score (arXiv 1606.03498): exp E KL(p(y | x), p(y)). Shapes: n images, C classes."""

import math

import torch
from torch import Tensor


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 0) -> tuple[float, Tensor]:
    """The mean over `splits` of exp(mean KL(p(y | x), p(y))), and its influences (n,) of mean 0, in the images' order.

    logits (n, C). Images are assigned to splits at random, by `seed`. Within a split the score's derivative in an
    image's weight is the score times the deviation of its KL from the mean; the change of p(y) cancels. Few images per
    split bias the score upwards, so it depends on `splits` and n. ValueError below two images per split.
    """
    if len(logits) < 2 * splits:
        raise ValueError(f"the Inception Score needs at least {2 * splits} images; given {len(logits)}")
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    scores, influences = [], torch.zeros(len(logits)).double()
    for part in order.tensor_split(splits):
        score, part_influences = _split_score(logits[part].double())
        scores.append(score)
        influences[part] = part_influences * len(logits) / (splits * len(part))
    return sum(scores) / splits, influences


def _split_score(logits: Tensor) -> tuple[float, Tensor]:
    log_p = logits.log_softmax(1)
    log_mean = log_p.logsumexp(0) - math.log(len(logits))
    divergence = (log_p.exp() * (log_p - log_mean)).sum(1)
    score = float(divergence.mean().exp())
    return score, score * (divergence - divergence.mean())
