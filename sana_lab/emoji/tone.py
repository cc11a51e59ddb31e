"""Judge of skin tones by luminance: the colour of a picture where the true drawings of a concept differ by tone."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

WEIGHTS = (0.299, 0.587, 0.114)
"""Luminance of 8-bit R, G, B (ITU-R BT.601)."""

CONTRAST = 60.0
"""Luminance by which a skin pixel of the lightest drawing exceeds that of the darkest."""

MIN_PIXELS = 40
"""Skin pixels, of 64 x 64, from which a concept's tone is judged."""

LIMIT = 48.0
"""RGB distance from a tone's true colour; beyond, a pixel is not of that skin. Neighbours are 45 to 60 apart."""


class Skin(NamedTuple):
    """Where a concept's drawings of one vendor show skin, and in which colour."""

    mask: Tensor  # (H, W) bool
    colors: Tensor  # (5, 3) RGB in [0, 255], light to dark


def skin(variants: Tensor) -> Skin | None:
    """The skin of a concept from its drawings (5, 3, H, W) uint8, light to dark; None if it shows too little of it."""
    pixels = variants.float()
    mask = luminance(pixels[0].movedim(0, -1)) - luminance(pixels[-1].movedim(0, -1)) > CONTRAST
    inner = _eroded(mask)
    mask = inner if int(inner.sum()) >= MIN_PIXELS else mask
    return Skin(mask, torch.stack([_color(x, mask) for x in pixels])) if int(mask.sum()) >= MIN_PIXELS else None


def luminance(colors: Tensor) -> Tensor:
    """(..., 3) RGB -> (...)."""
    return colors @ torch.tensor(WEIGHTS, dtype=colors.dtype)


def judge(image: Tensor, concept: Skin) -> int | None:
    """The tone, 1 light to 5 dark, of a picture (3, H, W) uint8 of a concept: that of the nearest luminance.

    None if fewer than a third of the pixels there have the colour of that tone, within LIMIT.
    """
    pixels = image.float()[:, concept.mask]  # (3, N)
    nearest = int((luminance(concept.colors) - luminance(pixels.median(-1).values)).abs().argmin())
    distances = (pixels - concept.colors[nearest][:, None]).norm(dim=0)
    return nearest + 1 if float((distances <= LIMIT).float().mean()) >= 1 / 3 else None


def judge_all(images: Tensor, concepts: Sequence[Skin]) -> list[int | None]:
    """`judge` of each of (B, 3, H, W)."""
    return [judge(image, concept) for image, concept in zip(images, concepts, strict=True)]


def _eroded(mask: Tensor) -> Tensor:
    """The pixels whose eight neighbours are in the region too, as edges are blurred first."""
    return F.max_pool2d((~mask).float()[None], 3, 1, 1)[0] == 0


def _color(image: Tensor, mask: Tensor) -> Tensor:
    """Median of each channel (3,) over a region."""
    return image[:, mask].median(-1).values
