"""An autoencoder: raw latents of images and back; the interface owns normalisation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_lab.models.autoencoders import Autoencoder


class Pixels(Autoencoder):
    """No learning: a block of pixels is a latent of 3 x block x block channels."""

    def __init__(
        self,
        block: int = 2,  # pixels on a side that become one latent
        scale: float = 2.0,  # one over the latents' standard deviation
    ) -> None:
        super().__init__(channels=3 * block**2, downsample=block, scale=scale)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, channels, H / downsample, W / downsample) of images in [-1, 1]."""
        mean = F.pixel_unshuffle(images, self.downsample)
        return mean, torch.full_like(mean, -30.0)  # deterministic

    def reconstruct(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W) of raw latents."""
        return F.pixel_shuffle(z, self.downsample)
