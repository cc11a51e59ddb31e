"""What turns images into features: released networks from local files, and a callable of one's own."""

import torch
from torch import Tensor


def standardised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[0, 255] (B, 3, h, w) to what a network was trained on: each colour less its mean, over its deviation."""
    centre, scale = (torch.tensor(x, device=pixels.device)[:, None, None] for x in (mean, std))
    return (pixels / 255 - centre) / scale
