"""The network of emoji's own features: small enough for a CPU, trained by `emoji_features`.

Legend: B images, D features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_lab.config.specs import SpecError
from sana_lab.models.layers import Downsample

SIDE = 64  # pixels a side of the input


class Features(nn.Module):
    """Convolutional network whose features have length 1, near for distorted views of one drawing, else far.

    Each width is a stage of stride 2. The last stage's cells enter the features with their positions, as an arrow to
    the left is not one to the right.
    """

    def __init__(self, widths: Sequence[int] = (24, 48, 96, 128), dim: int = 96) -> None:
        super().__init__()
        if not 1 <= len(widths) <= 6 or min(widths) < 1:
            raise SpecError(f"widths is {list(widths)}, expected one to six numbers from 1")
        self.dim = dim
        self.body = nn.Sequential(*[Downsample(a, b) for a, b in zip((3, *widths), widths, strict=False)])
        self.head = nn.Linear(widths[-1] * (SIDE >> len(widths)) ** 2, dim)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 64, 64) in [-1, 1] -> (B, D) of length 1."""
        return F.normalize(self.head(self.body(images).flatten(1)), dim=-1)


@torch.no_grad()
def features_of(network: Features, pictures: Tensor, batch: int = 128) -> Tensor:
    """(B, D) of uint8 (B, 3, 64, 64), a few at a time."""
    return torch.cat([network(as_input(part)) for part in pictures.split(batch)])


def as_input(pictures: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pictures.float().mul(2 / 255).sub(1)
