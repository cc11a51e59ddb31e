"""Fréchet Inception distance (arXiv 1706.08500) of two streams of images, in one call."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from sana_lab.evaluation.distances.frechet import frechet
from sana_lab.evaluation.distances.moments import Moments
from sana_lab.evaluation.extractors.inception import Inception, Layer, hint
from sana_lab.evaluation.extractors.resize import check
from sana_lab.types import Json


def fid(
    real: Iterable[Tensor],
    fake: Iterable[Tensor],
    weights: str | Path,
    *,
    batch: int = 32,
    layer: Layer = "2048",
    device: torch.device | str = "cpu",
) -> Json:
    """FID between two streams of uint8 images (B, 3, H, W), each read once; with what it was measured.

    FileNotFoundError without weights; ValueError for images of another kind and for fewer than two on a side.
    """
    extractor = Inception(str(weights), layer, device=str(device))
    a, b = (_moments(extractor, images, batch, side) for images, side in ((real, "real"), (fake, "fake")))
    return {"value": frechet(a.gaussian(), b.gaussian()), "n_real": a.n, "n_fake": b.n, **extractor.identity()}


def fid_hint() -> str:
    """How to get the weights, in one line."""
    return hint()


def _moments(extractor: Inception, images: Iterable[Tensor], batch: int, side: str) -> Moments:
    moments = Moments()
    for group in images:
        check(group, f"{side} images")
        for part in group.split(batch):
            moments.add(extractor.features(part).cpu())
    if moments.n < 2:
        raise ValueError(f"FID needs at least two {side} images; given {moments.n}")
    return moments
