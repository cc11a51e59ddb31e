"""Resizes to an extractor's input size, by name; they affect a distance as much as the weights do.

Each scales the whole image to a square, aspect ratio lost, in float32 without rounding in between. `clean`: antialiased
bicubic, as Pillow resizes float images and clean-fid does (arXiv 2104.11222); `tf1`: TensorFlow 1's bilinear with
aligned corners and without antialiasing, by which FID is defined and which torch-fidelity repeats; `torch`: PyTorch's
bilinear with half-pixel centres, without antialiasing; `none`: images must have the right size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_lab.evaluation import Resize


def resize(images: Tensor, side: int, method: Resize) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, side, side) in [0, 255]. ValueError for other images or sizes."""
    check(images)
    pixels = images.float()
    if method == "none":
        return _unchanged(pixels, side)
    if method == "tf1":
        return _tensorflow(pixels, side)
    if method == "torch":
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
    """Output pixel i interpolates around input position i * size / side; columns first, then rows."""
    height, width = pixels.shape[2:]
    low, high, fraction = _neighbours(width, side, pixels.device)
    pixels = pixels[..., low] + (pixels[..., high] - pixels[..., low]) * fraction
    low, high, fraction = _neighbours(height, side, pixels.device)
    above = pixels[..., low, :]
    return above + (pixels[..., high, :] - above) * fraction[:, None]


def _neighbours(size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each output pixel (side,) both neighbouring input positions and the fraction of the way between them."""
    at = torch.arange(side, dtype=torch.float32, device=device) * torch.tensor(size / side, dtype=torch.float32)
    low = at.long()
    return low, (low + 1).clamp(max=size - 1), at - low
