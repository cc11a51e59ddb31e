"""How well an autoencoder gives images back: PSNR and SSIM per image and in total.

Shapes: B images, H x W pixels. Values are those of 8-bit images, [0, 255], in float64.
"""

import math
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_lab.autoencoders import Autoencoder
from sana_lab.evaluation.statistics import bootstrap_mean
from sana_lab.types import Batch

WINDOW, SIGMA = 11, 1.5
"""Width in pixels and deviation of SSIM's Gaussian window."""


class Scores(NamedTuple):
    """Per image, float64."""

    psnr: Tensor  # (B,) dB
    ssim: Tensor  # (B,) at most 1


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image pair (B, 3, H, W) in [0, 255], in dB; infinite where they are equal."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each image pair (B, 3, H, W) in [0, 255]: the mean over colours and windows within.

    Wang et al. 2004, as scikit-image measures it: 11 x 11 Gaussian window of deviation 1.5, K1 = 0.01, K2 = 0.03.
    ValueError below 11 pixels.
    """
    if min(a.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW}x{WINDOW}; given {a.shape[-2]}x{a.shape[-1]}")
    a, b = a.double(), b.double()
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).flatten(1).mean(1)


def evaluate_reconstruction(
    autoencoder: Autoencoder, batches: Iterable[Batch], limit: int | None = None
) -> dict[str, Any]:
    """PSNR and SSIM over the first `limit` images: means, 95 % bootstrap intervals over images, n, and both per image.

    Outputs are rounded to 8 bits first. The mean of PSNR is over images (not the PSNR of a mean error); an image given
    back without error counts as if one of its values were off by one. ValueError without images.
    """
    parts = list(_scores(autoencoder, batches, limit))
    if not parts:
        raise ValueError("there are no images to measure a reconstruction on")
    values = {name: torch.cat([getattr(p, name) for p in parts]).tolist() for name in Scores._fields}
    means = {name: bootstrap_mean(value) for name, value in values.items()}
    intervals = {f"{name}_interval": [mean.low, mean.high] for name, mean in means.items()}
    return (
        {name: mean.value for name, mean in means.items()} | intervals | {"n": len(values["psnr"]), "per_image": values}
    )


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> 0 ... 255, rounded; what lies outside is clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _scores(autoencoder: Autoencoder, batches: Iterable[Batch], limit: int | None) -> Iterator[Scores]:
    device = next(autoencoder.parameters()).device
    for images in _first(batches, limit):
        yield score(to_uint8(images), to_uint8(_round_trip(autoencoder, images.to(device))).to(images.device))


def _first(batches: Iterable[Batch], limit: int | None) -> Iterator[Tensor]:
    """Images (B, 3, H, W) until there were `limit`."""
    left = sys.maxsize if limit is None else limit
    for batch in batches:
        if batch.images is None:
            raise ValueError("a reconstruction is measured on images; this data yields latents only")
        yield batch.images[:left]
        left -= len(batch.images)
        if left <= 0:
            return


def score(images: Tensor, others: Tensor) -> Scores:
    """PSNR (at most that of a single value off by one) and SSIM of uint8 images (B, 3, H, W)."""
    most = 10 * math.log10(255**2 * images[0].numel())
    return Scores(psnr(images, others).clamp(max=most), ssim(images, others))


@torch.no_grad()
def _round_trip(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    training = autoencoder.training
    autoencoder.eval()
    try:
        return autoencoder.decode(autoencoder.encode(images))
    finally:
        autoencoder.train(training)


def _blur(x: Tensor) -> Tensor:
    """Gaussian means over the windows that lie within the image: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    at = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    kernel = torch.exp(-(at**2) / (2 * SIGMA**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, WINDOW)
    rows = F.conv2d(x, kernel, groups=x.shape[1])
    return F.conv2d(rows, kernel.mT, groups=x.shape[1])
