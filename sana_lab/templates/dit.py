"""A denoiser: noisy latents, times and text to a velocity."""

import torch
from torch import Tensor, nn

from sana_lab.models.dit import Dit
from sana_lab.types import Text


class ConvNet(Dit):
    """Convolutions on the latent grid, each block shifted by time and the mean of the caption's features."""

    def __init__(
        self,
        dim: int = 64,  # features of a cell of the grid
        depth: int = 3,  # number of blocks
        *,
        channels: int,  # of the latents, supplied by the system
        text_dim: int,  # width of the text's features, supplied by the system
    ) -> None:
        super().__init__()
        self.channels, self.text_dim, self.patch = channels, text_dim, 1
        self.open, self.close = nn.Conv2d(channels, dim, 3, padding=1), nn.Conv2d(dim, channels, 3, padding=1)
        self.condition = nn.Linear(text_dim + 2, dim)
        self.blocks = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor, text: Text, guidance: Tensor | None = None) -> Tensor:
        """(B, channels, h, w) at times t (B,), 1 is noise -> velocity (B, channels, h, w)."""
        weight = text.mask[..., None] / text.mask.sum(1)[:, None, None]
        times = torch.stack([t, t.square()], 1).to(x)
        condition = self.condition(torch.cat([(text.tokens * weight).sum(1).to(x), times], 1))
        x = self.open(x)
        for block in self.blocks:
            x = x + block(torch.relu(x + condition[:, :, None, None]))
        return self.close(x)
