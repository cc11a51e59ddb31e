"""Interface of the autoencoders: images to normalised latents and back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Layers = Literal["middle", "head"]
"""Layers next to the latent on both sides, or the last ones before the decoded image: what DC-AE's second and third
phase of training change (arXiv 2410.10733, section 3.2)."""

Normalise = Literal["affine", "scale"]
"""Per-channel normalisation of latents: mean and standard deviation (`affine`), or root mean square only (`scale`),
which the adjacent convolutions can absorb exactly, including at image borders (`pretrained.fold_normalisation`).
"""


class Autoencoder(nn.Module, ABC):
    """Images (B, 3, H, W) in [-1, 1] <-> latents (B, channels, H / downsample, W / downsample).

    Latents are normalised per channel, (z - shift) * scale. Both are internal to the autoencoder: options of a
    published model, or fitted after training (`fit_normalisation`).

    A subclass calls this constructor with its `channels` and `downsample`, and implements `posterior` and
    `reconstruct` on raw latents. To support `tile`, both call `tile_for` and process the grid in tiles of that size:
    the same result in less memory.
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
            raise ValueError(f"autoencoder: scale is {scale}, expected more than 0: 1 / standard deviation of latents")
        if tile is not None and tile < 1:
            raise ValueError(f"autoencoder: tile is {tile}, expected null or at least 1: latents on a side of a tile")
        self.channels, self.downsample, self.tile = channels, downsample, tile
        self.normalisation = {"shift": shift, "scale": scale}  # as options, in float64
        self.register_buffer("shift", torch.full((channels,), shift))
        self.register_buffer("scale", torch.full((channels,), scale))

    @abstractmethod
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Raw mean and log-variance, each (B, channels, h, w); log-variance is -30 for a deterministic encoder."""

    @abstractmethod
    def reconstruct(self, z: Tensor) -> Tensor:
        """Raw latents (B, channels, h, w) -> images (B, 3, H, W), not clamped."""

    def layers(self, layers: Layers) -> list[nn.Module]:
        """The modules of a part of the network. NotImplementedError if the autoencoder does not tell them apart."""
        raise NotImplementedError(f"autoencoder {type(self).__name__} has no method `layers`")

    def tile_for(self, grid: Sequence[int]) -> int | None:
        """Latents on a side of a tile for a grid (h, w) of latents; None if it is processed whole.

        Training is never tiled, because activations are kept for the backward pass.
        """
        return None if self.tile is None or self.training or max(grid) <= self.tile else self.tile

    def encode(self, images: Tensor) -> Tensor:
        """Normalised posterior mean (B, channels, h, w). ValueError if H or W is not a multiple of `downsample`."""
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
        return ((z - self._buffer("shift", z)) * self._buffer("scale", z)).to(z.dtype)

    def denormalise(self, latents: Tensor) -> Tensor:
        return (latents / self._buffer("scale", latents) + self._buffer("shift", latents)).to(latents.dtype)

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """`shift` or `scale` as (channels, 1, 1) in float32 or wider.

        If the buffer equals the option rounded to the buffer's dtype, the option is used, so that a float16 model
        normalises with full precision.
        """
        buffer: Tensor = getattr(self, name)
        option = torch.full_like(buffer, self.normalisation[name], dtype=torch.promote_types(like.dtype, torch.float32))
        rounded = buffer.float() == option.to(buffer.dtype).float()
        return torch.where(rounded, option, buffer.to(option.dtype))[:, None, None]

    @torch.no_grad()
    def fit_normalisation(self, z: Tensor, normalise: Normalise = "affine") -> None:
        """Set shift and scale from raw latents (n, channels, h, w): each channel gets mean 0 and variance 1.

        With `scale`, shift is 0 and each channel gets mean square 1.
        """
        z = z.float().transpose(0, 1).flatten(1)  # (channels, n h w)
        self.shift.copy_(z.mean(1) if normalise == "affine" else torch.zeros(len(z)))
        self.scale.copy_(1 / (z - self.shift[:, None]).square().mean(1).sqrt().clamp(min=1e-6))
