"""Feature extractors of distribution distances: released networks from local files, and a user's own function."""

import torch
from torch import Tensor


def standardise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(B, 3, h, w) in [0, 255] -> (pixel / 255 - mean) / std for each channel."""
    centre, scale = (torch.tensor(x, device=pixels.device)[:, None, None] for x in (mean, std))
    return (pixels / 255 - centre) / scale
