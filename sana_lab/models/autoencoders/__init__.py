"""Interface of the autoencoders: images to normalised latents and back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Normalise = Literal["affine", "scale"]
"""How latents are normalised: by mean and deviation of each channel, or by its root mean square alone, which the
convolutions beside it can take in exactly, at borders too (`export`)."""


class Autoencoder(nn.Module, ABC):
    """Images (B, 3, H, W) in [-1, 1] <-> latents (B, channels, H / downsample, W / downsample).

    Latents leave normalised, (z - shift) * scale per channel, and nobody else knows these numbers: a published model's
    own are options, and one that is trained here fits them. A subclass gives `channels`, `downsample`, `posterior` and
    `reconstruct`. Where `tile` is set, images of more than `tile` latents on a side go through it tile by tile, to the
    same result in less memory; not while training, where all activations are kept anyway.
    """

    channels: int
    downsample: int
    tile: int | None
    shift: Tensor
    scale: Tensor

    def __init__(
        self, channels: int, downsample: int, shift: float = 0.0, scale: float = 1.0, tile: int | None = None
    ) -> None:
        super().__init__()
        if scale <= 0:
            raise ValueError(f"autoencoder: scale is {scale}, expected more than 0: one over the latents' deviation")
        if tile is not None and tile < 1:
            raise ValueError(f"autoencoder: tile is {tile}, expected null or at least 1: latents on a tile's side")
        self.channels, self.downsample, self.given = channels, downsample, {"shift": shift, "scale": scale}
        self.tile = tile
        self.register_buffer("shift", torch.full((channels,), shift))
        self.register_buffer("scale", torch.full((channels,), scale))

    @abstractmethod
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Raw mean and log-variance, each (B, channels, h, w); a deterministic encoder gives a log-variance of -30."""

    @abstractmethod
    def reconstruct(self, z: Tensor) -> Tensor:
        """Raw latents (B, channels, h, w) -> images (B, 3, H, W), not clamped."""

    def tile_of(self, latents: Sequence[int]) -> int | None:
        """The side of a tile for a grid of (h, w) latents, or None where it goes through whole."""
        return None if self.tile is None or self.training or max(latents) <= self.tile else self.tile

    def encode(self, images: Tensor) -> Tensor:
        """Normalised latents of the posterior's mean (deterministic). ValueError where H or W is not a multiple."""
        height, width = images.shape[-2:]
        if height % self.downsample or width % self.downsample:
            near = [max(1, round(s / self.downsample)) * self.downsample for s in (height, width)]
            raise ValueError(
                f"image size {height}x{width} is not a multiple of the autoencoder's downsampling {self.downsample}; "
                f"the nearest is {near[0]}x{near[1]}"
            )
        return self.normalise(self.posterior(images)[0])

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode`: images in about [-1, 1]."""
        return self.reconstruct(self.denormalise(latents))

    def normalise(self, z: Tensor) -> Tensor:
        return ((z - self._wide("shift", z)) * self._wide("scale", z)).to(z.dtype)

    def denormalise(self, latents: Tensor) -> Tensor:
        return (latents / self._wide("scale", latents) + self._wide("shift", latents)).to(latents.dtype)

    def _wide(self, name: str, like: Tensor) -> Tensor:
        """The buffer (channels, 1, 1) in float32 or wider; where it holds the option, the option's own digits."""
        vector: Tensor = getattr(self, name)
        exact = torch.full_like(vector, self.given[name], dtype=torch.promote_types(like.dtype, torch.float32))
        same = vector.float() == exact.to(vector.dtype).float()
        return torch.where(same, exact, vector.to(exact.dtype))[:, None, None]

    @torch.no_grad()
    def fit_normalisation(self, z: Tensor, normalise: Normalise = "affine") -> None:
        """Set shift and scale from raw latents (n, channels, h, w), so that each channel has mean 0 and deviation 1, or
        for `scale` no shift and mean square 1."""
        z = z.float().transpose(0, 1).flatten(1)
        self.shift.copy_(z.mean(1) if normalise == "affine" else torch.zeros(len(z)))
        self.scale.copy_(1 / (z - self.shift[:, None]).square().mean(1).sqrt().clamp(min=1e-6))
