"""Structure of latents by training: front channels that suffice alone, and equivariance to scaling and rotation.

Legend: B batch, C channels, h, w latent grid, f downsampling.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sana_lab.types import WHOLE, Part

MIN_SCALE = 0.25
"""Smallest factor of a scaling (EQ-VAE)."""

MIN_PIXELS = 32
"""Smallest side of a scaled image, unless the image is smaller: what discriminator and LPIPS need."""


def front_counts(channels: int, step: int) -> list[int]:
    """Numbers of front channels to train on: the multiples of `step`, and all."""
    return [*range(step, channels, step), channels]


def keep_front(z: Tensor, step: int, random: torch.Generator, part: Part = WHOLE) -> Tensor:
    """Latents (B, C, h, w) with zeros behind a random number of front channels for each image (DC-AE 1.5, arXiv
    2508.00413). Random numbers are those of this part of a batch."""
    counts = torch.tensor(front_counts(z.shape[1], step))
    chosen = counts[part.draw(lambda n: torch.randint(len(counts), (n,), generator=random), len(z))]
    return z * front_mask(chosen.to(z.device), z.shape[1]).to(z.dtype)


def front_mask(counts: Tensor, channels: int) -> Tensor:
    """(B, C, 1, 1) bool, True at the first `counts` (B,) channels."""
    return (torch.arange(channels, device=counts.device) < counts[:, None])[:, :, None, None]


class Transform(NamedTuple):
    """A scaling of the latent grid, then a rotation, of latents and images alike (EQ-VAE, arXiv 2502.09509)."""

    side: tuple[int, int]  # (h, w) after scaling
    turns: int  # quarter turns

    def of(self, x: Tensor, unit: int = 1) -> Tensor:
        """x (B, ., unit h, unit w) scaled and rotated: latents with unit 1, images with unit f."""
        size = [side * unit for side in self.side]
        scaled = x if list(x.shape[2:]) == size else F.interpolate(x, size, mode="bilinear", antialias=True)
        return torch.rot90(scaled, self.turns, (2, 3))


def draw_transform(grid: tuple[int, int], unit: int, share: float, random: torch.Generator) -> Transform | None:
    """A random transform of a grid, with probability `share`; else None. Images of `unit` pixels a cell keep a side of
    MIN_PIXELS."""
    chance, scale, turns = torch.rand(3, generator=random).tolist()
    if chance >= share:
        return None
    factor = MIN_SCALE + (1 - MIN_SCALE) * scale
    least = -(-MIN_PIXELS // unit)
    h, w = (min(side, max(least, round(factor * side))) for side in grid)
    return Transform((h, w), int(4 * turns))
