"""Resizes by name: what brings images to an extractor's size decides its numbers as much as its weights do.

Each takes the whole image to a square, proportions lost, and gives float32 without rounding in between. `clean` is
antialiased bicubic, what Pillow does to float images and what clean-fid measures with (arXiv 2104.11222); `tf1` is the
bilinear of TensorFlow 1, corner at corner, not antialiased, which FID is defined by and torch-fidelity repeats; `torch`
is PyTorch's bilinear with half-pixel centres, not antialiased; `none` takes images of the right size only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_lab.evaluation import Resize


def resize(images: Tensor, side: int, how: Resize) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, side, side) in [0, 255]. ValueError for other images, or to be resized."""
    check(images)
    pixels = images.float()
    if how == "none":
        return _unchanged(pixels, side)
    if how == "tf1":
        return _tensorflow(pixels, side)
    if how == "torch":
        return F.interpolate(pixels, (side, side), mode="bilinear", align_corners=False)
    exact = F.interpolate(pixels.double(), (side, side), mode="bicubic", align_corners=False, antialias=True)
    return exact.clamp(0, 255).float()


def check(images: Tensor, what: str = "images") -> None:
    """ValueError unless they are uint8 (B, 3, H, W)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{what} are {tuple(images.shape)} {images.dtype}, expected uint8 (B, 3, H, W)")


def _unchanged(pixels: Tensor, side: int) -> Tensor:
    height, width = pixels.shape[2:]
    if (height, width) != (side, side):
        raise ValueError(f"images are {height}x{width}, and resize 'none' expects {side}x{side}")
    return pixels


def _tensorflow(pixels: Tensor, side: int) -> Tensor:
    """Output pixel i looks at input i * size / side, between its two neighbours; columns first, then rows."""
    height, width = pixels.shape[2:]
    low, high, part = _neighbours(width, side, pixels.device)
    pixels = pixels[..., low] + (pixels[..., high] - pixels[..., low]) * part
    low, high, part = _neighbours(height, side, pixels.device)
    above = pixels[..., low, :]
    return above + (pixels[..., high, :] - above) * part[:, None]


def _neighbours(size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Positions (side,) of the two input pixels that each output pixel lies between, and the fraction on its way."""
    at = torch.arange(side, dtype=torch.float32, device=device) * torch.tensor(size / side, dtype=torch.float32)
    low = at.long()
    return low, (low + 1).clamp(max=size - 1), at - low
