"""The KL autoencoder of latent diffusion (arXiv 2112.10752), as in Stable Diffusion; diffusers' `AutoencoderKL`.

Legend: B batch, C channels, h x w grid, f downsampling.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_lab.config.ranges import Depth, Pixels, Positive, Real, Width, Widths
from sana_lab.config.specs import RUNTIME, AsBefore
from sana_lab.models.autoencoders import Autoencoder, Layers
from sana_lab.models.autoencoders.fast_inference import apply_conv3x3, channels_last
from sana_lab.models.autoencoders.tiling import (
    Layer,
    Tiled,
    append_blocks,
    flatten_stages,
    group_norm,
    reach_doubling,
    reach_halving,
    reach_same,
)
from sana_lab.ops.conv import upsample_conv3x3
from sana_lab.ops.inference_backend import Fast

EPS = 1e-6  # of group norms


class Vae(Autoencoder):
    """A variational autoencoder with one stage per width; each stage after the first halves the grid.

    Defaults are Stable Diffusion's f8c4. With `tile`, each group norm needs the statistics of the whole grid, so a
    stage is recomputed once for each of its norms, up to that norm.
    """

    def __init__(
        self,
        widths: Widths = (128, 256, 512, 512),  # channels of each stage, full resolution first
        depth: Depth = 2,  # residual blocks per encoder stage, at least 1; a decoder stage has one more
        latent: Width = 4,  # latent channels
        groups: Width = 32,  # groups of the group norms; divides every width
        middle_attention: bool = True,  # self-attention on the coarsest grid, in encoder and decoder
        quant: bool = True,  # 1x1 convolutions on both sides of the latents: SD 1 and SDXL have them, SD3 and FLUX not
        shift: Annotated[Real, AsBefore(0.0)] = 0.0,  # mean of raw latents; normalised ones are (z - shift) x scale
        scale: Annotated[Positive, AsBefore(1.0)] = 1.0,  # 1 / standard deviation of raw latents, above 0
        # latents on a side of a tile; larger images are encoded and decoded in tiles: same result in less memory
        tile: Annotated[Pixels | None, RUNTIME] = None,
        # inference: torch (as defined), fast (fewer operations, no gradients; relative L2 error about 5e-6 in
        # float32) or auto (fast where it pays)
        backend: Annotated[Fast, RUNTIME] = "auto",
    ) -> None:
        super().__init__(latent, 2 ** (len(widths) - 1), shift, scale, tile)
        _check(widths, depth, groups)
        self.encoder = Encoder(widths, depth, latent, groups, middle_attention, backend)
        self.decoder = Decoder(widths, depth, latent, groups, middle_attention, backend)
        self.quant = nn.Conv2d(2 * latent, 2 * latent, 1) if quant else nn.Identity()
        self.post_quant = nn.Conv2d(latent, latent, 1) if quant else nn.Identity()

    def layers(self, layers: Layers) -> list[nn.Module]:
        """The middle blocks with the convolutions at the latent, or the finest stage of the decoder with its head."""
        encoder, decoder = self.encoder, self.decoder
        if layers == "middle":
            return [encoder.middle, encoder.head, self.quant, self.post_quant, decoder.stem, decoder.middle]
        return [decoder.stages[0], decoder.head]

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tile = self.tile_for([n // self.downsample for n in images.shape[-2:]])
        moments = self.encoder(images, tile and tile * self.downsample)
        mean, log_variance = self.quant(moments).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def reconstruct(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant(z), self.tile_for(z.shape[-2:]))


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> (B, 2 latent, H / f, W / f), mean and log-variance; `tile` in pixels."""

    def __init__(
        self, widths: Sequence[int], depth: int, latent: int, groups: int, attention: bool, backend: Fast
    ) -> None:
        super().__init__()
        inputs = [widths[0], *widths[:-1]]
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(*([Downsample(b)] if i else []), *res_blocks(b, w, depth, groups, backend))
            for i, (b, w) in enumerate(zip(inputs, widths, strict=True))
        )
        self.middle = middle(widths[-1], groups, attention, backend)
        self.head = head(widths[-1], 2 * latent, groups)
        self.backend = backend

    def forward(self, images: Tensor, tile: int | None = None) -> Tensor:
        images = channels_last(images, self.backend, self.stem.weight)
        return self.head(self.middle(self.stages_tiled(images, tile) if tile else self.stages_whole(images)))

    def stages_whole(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return x

    def stages_tiled(self, images: Tensor, tile: int) -> Tensor:
        return append_blocks(Tiled(images, tile), [self.stem, *flatten_stages(self.stages)]).compute()


class Decoder(nn.Module):
    """Latents (B, latent, h, w) -> images (B, 3, f h, f w); `tile` in latents.

    Stage i runs on the grid of the encoder's stage i, so the last stage runs first.
    """

    def __init__(
        self, widths: Sequence[int], depth: int, latent: int, groups: int, attention: bool, backend: Fast
    ) -> None:
        super().__init__()
        inputs = [*widths[1:], widths[-1]]
        self.stem = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.middle = middle(widths[-1], groups, attention, backend)
        self.stages = nn.ModuleList(
            nn.Sequential(*res_blocks(b, w, depth + 1, groups, backend), *([Upsample(w, backend)] if i else []))
            for i, (b, w) in enumerate(zip(inputs, widths, strict=True))
        )
        self.head = head(widths[0], 3, groups)
        self.backend = backend

    def forward(self, z: Tensor, tile: int | None = None) -> Tensor:
        x = self.middle(self.stem(channels_last(z, self.backend, self.stem.weight)))
        return self.stages_tiled(x, tile) if tile else self.stages_whole(x)

    def stages_whole(self, x: Tensor) -> Tensor:
        for stage in reversed(self.stages):
            x = stage(x)
        return self.head(x)

    def stages_tiled(self, x: Tensor, tile: int) -> Tensor:
        return append_blocks(Tiled(x, tile), [*flatten_stages(reversed(self.stages)), *self.head.children()]).compute()


def res_blocks(width: int, out: int, depth: int, groups: int, backend: Fast) -> list[nn.Module]:
    return [ResBlock(out if i else width, out, groups, backend) for i in range(depth)]


def middle(width: int, groups: int, attention: bool, backend: Fast) -> nn.Sequential:
    between = [AttentionBlock(width, groups)] if attention else []
    return nn.Sequential(ResBlock(width, width, groups, backend), *between, ResBlock(width, width, groups, backend))


def head(width: int, out: int, groups: int) -> nn.Sequential:
    return nn.Sequential(nn.GroupNorm(groups, width, EPS), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))


class ResBlock(nn.Module):
    """x + two pre-normalised 3x3 convolutions, (B, C, h, w) -> (B, C', h, w)."""

    def __init__(self, width: int, out: int, groups: int, backend: Fast = "auto") -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width, EPS)
        self.conv1 = nn.Conv2d(width, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, EPS)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(width, out, 1) if width != out else nn.Identity()
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_second(self.conv_first(x, self.norm1), x, self.norm2)

    def tiled(self, x: Tiled) -> Tiled:
        norm1 = group_norm(self.norm1, x)
        y = x.then(lambda t: self.conv_first(t, norm1), reach_same(1))
        norm2 = group_norm(self.norm2, y)
        return x.then(lambda t: self.conv_second(self.conv_first(t, norm1), t, norm2), reach_same(2))

    def conv_first(self, x: Tensor, norm: Layer) -> Tensor:
        return apply_conv3x3(self.conv1, silu(norm(x)), self.backend)

    def conv_second(self, y: Tensor, x: Tensor, norm: Layer) -> Tensor:
        return apply_conv3x3(self.conv2, silu(norm(y)), self.backend, self.skip(x))


def silu(x: Tensor) -> Tensor:
    """SiLU of a norm's output, in place if no gradient needs that output."""
    return F.silu(x, inplace=not (x.requires_grad and torch.is_grad_enabled()))


class AttentionBlock(nn.Module):
    """x + single-head softmax self-attention over the grid, (B, C, h, w) -> same."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).mT  # (B, h w, C)
        q, k, v = self.qkv(tokens)[:, None].chunk(3, dim=-1)
        y = self.out(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + y.mT.reshape(x.shape)


class Downsample(nn.Module):
    """(B, C, 2h, 2w) -> (B, C, h, w): a 3x3 convolution of stride 2, padded on the right and bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))

    def tiled(self, x: Tiled) -> Tiled:
        return x.then(self, reach_halving, down=2).materialised()


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C, 2h, 2w): nearest-neighbour upsampling, then a 3x3 convolution."""

    def __init__(self, width: int, backend: Fast = "auto") -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        return upsample_conv3x3(x, self.conv.weight, self.conv.bias, self.backend)

    def tiled(self, x: Tiled) -> Tiled:
        return x.materialised().then(self, reach_doubling, up=2)


def _check(widths: Sequence[int], depth: int, groups: int) -> None:
    if depth < 1:
        raise ValueError(f"vae: depth is {depth}, expected at least 1")
    for width in widths:
        if width % groups:
            near = max(1, round(width / groups)) * groups
            raise ValueError(f"vae: width {width} is not a multiple of groups {groups}; the nearest is {near}")
