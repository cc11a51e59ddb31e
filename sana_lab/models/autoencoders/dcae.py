"""DC-AE: the deep-compression autoencoder, space-to-channel shortcuts and linear attention (arXiv 2410.10733).

Shapes: B batch, C channels, h x w grid.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor, nn

from sana_lab.config.specs import RUNTIME, AsBefore
from sana_lab.models.autoencoders import Autoencoder
from sana_lab.models.autoencoders.dcae_blocks import (
    Activation,
    Down,
    Downsample,
    EfficientViTBlock,
    ResBlock,
    RmsNorm2d,
    Up,
    Upsample,
    average_channels,
    repeat_channels,
)
from sana_lab.models.autoencoders.fast_inference import channels_last
from sana_lab.models.autoencoders.tiling import Tiled, flat, through, within
from sana_lab.ops.conv.conv3x3 import activate
from sana_lab.ops.inference_backend import Fast

FINEST = 3  # halvings from full resolution on that are tiled together; on coarser grids margins would be wide


class DcAe(Autoencoder):
    """A deterministic autoencoder with one stage per width; each stage after the first halves the grid.

    Defaults are SANA's f32c32. The last `attention_stages` stages hold EfficientViT blocks with one extra branch per
    kernel size in `multiscales`, the others hold residual blocks. A first depth of 0 folds that stage into a strided
    stem, so that nothing runs at full resolution (its width is then unused). The decoder may have its own number of
    attention stages; its first `batch_norm_stages` end their residual blocks with batch norm and have ReLU in them,
    where all others have RMSNorm and SiLU. `last` is its last activation; `shift` and `scale` normalise latents.

    `tile` bounds the memory: images of more latents on a side go through tile by tile, to the same result. From full
    resolution down to an eighth the layers are local and run in one pass; attention sums its state over the tiles.

    `backend` says how inference is computed: `torch` as defined; `auto` in fewer operations where that pays, to the
    same result within rounding (relative L2 error about 5e-6 in float32); `fast` so always, without gradients.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024),
        encoder_depths: tuple[int, ...] = (2, 2, 2, 3, 3, 3),
        decoder_depths: tuple[int, ...] = (3, 3, 3, 3, 3, 3),
        attention_stages: int = 3,
        multiscales: tuple[int, ...] = (5,),
        latent: int = 32,
        head_dim: int = 32,
        down: Down = "conv",
        up: Up = "interpolate",
        decoder_attention_stages: Annotated[int | None, AsBefore(None)] = None,
        batch_norm_stages: Annotated[int, AsBefore(0)] = 0,
        last: Annotated[Activation, AsBefore("relu")] = "relu",
        shift: Annotated[float, AsBefore(0.0)] = 0.0,
        scale: Annotated[float, AsBefore(1.0)] = 1.0,
        tile: Annotated[int | None, RUNTIME] = None,
        backend: Annotated[Fast, RUNTIME] = "auto",
    ) -> None:
        super().__init__(latent, 2 ** (len(widths) - 1), shift, scale, tile)
        decoder_stages = attention_stages if decoder_attention_stages is None else decoder_attention_stages
        _check_depths(widths, encoder_depths, decoder_depths, attention_stages)
        _check_decoder(widths, decoder_stages, batch_norm_stages)
        _check_widths(widths, latent, len(widths) - max(attention_stages, decoder_stages), head_dim)
        blocks = Blocks(len(widths) - attention_stages, head_dim, multiscales, backend)
        back = Blocks(len(widths) - decoder_stages, head_dim, multiscales, backend, batch_norm_stages)
        self.encoder = Encoder(widths, encoder_depths, blocks, latent, down)
        self.decoder = Decoder(widths, decoder_depths, back, latent, up, last)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tile = self.tile_of([n // self.downsample for n in images.shape[-2:]])
        mean = self.encoder(images, tile and tile * self.downsample)
        return mean, torch.full_like(mean, -30.0)

    def reconstruct(self, z: Tensor) -> Tensor:
        return self.decoder(z, self.tile_of(z.shape[-2:]))


class Blocks:
    """Which block a stage is made of."""

    def __init__(
        self,
        first_attention: int,
        head_dim: int,
        multiscales: Sequence[int],
        backend: Fast = "auto",
        batch_norm_stages: int = 0,
    ) -> None:
        self.first_attention, self.head_dim, self.multiscales = first_attention, head_dim, multiscales
        self.backend, self.batch_norm_stages = backend, batch_norm_stages

    def stage(self, index: int, width: int, depth: int) -> list[nn.Module]:
        if index < self.first_attention:
            return [ResBlock(width, index < self.batch_norm_stages, self.backend) for _ in range(depth)]
        return [EfficientViTBlock(width, self.head_dim, self.multiscales, self.backend) for _ in range(depth)]


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> raw latents (B, latent, H / f, W / f). `tile` is in pixels."""

    def __init__(self, widths: Sequence[int], depths: Sequence[int], blocks: Blocks, latent: int, down: Down) -> None:
        super().__init__()
        folded, backend = depths[0] == 0, blocks.backend
        self.stem = Downsample(3, widths[1], down, False) if folded else nn.Conv2d(3, widths[0], 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *([Downsample(widths[i - 1], w, down, backend=backend)] if i > folded else []),
                *blocks.stage(i, w, d),
            )
            for i, (w, d) in enumerate(zip(widths, depths, strict=True))
        )
        self.head = nn.Conv2d(widths[-1], latent, 3, padding=1)
        self.latent, self.backend = latent, backend

    def forward(self, images: Tensor, tile: int | None = None) -> Tensor:
        images = channels_last(images, self.backend, self.head.weight)
        x = self.tiled(images, tile) if tile else self.whole(images)
        return self.head(x) + average_channels(x, self.latent)

    def whole(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return x

    def tiled(self, images: Tensor, tile: int) -> Tensor:
        blocks = [self.stem, *flat(self.stages)]
        local = local_blocks(blocks)
        x = through(Tiled(images, tile), blocks[:local]).settled()
        for block in blocks[local:]:
            x = through(x, [block]).settled()
        return x.source


class Decoder(nn.Module):
    """Raw latents (B, latent, h, w) -> images (B, 3, f h, f w). The last stage runs first, on the smallest grid. `tile`
    is in latents."""

    def __init__(
        self, widths: Sequence[int], depths: Sequence[int], blocks: Blocks, latent: int, up: Up, activation: Activation
    ) -> None:
        super().__init__()
        folded, last, backend = depths[0] == 0, len(widths) - 1, blocks.backend
        self.stem = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *([Upsample(widths[i + 1], w, up, backend=backend)] if i < last and d else []),
                *blocks.stage(i, w, d),
            )
            for i, (w, d) in enumerate(zip(widths, depths, strict=True))
        )
        width = widths[1] if folded else widths[0]
        self.norm = RmsNorm2d(width, backend=backend)
        self.head = Upsample(width, 3, up, False, backend) if folded else nn.Conv2d(width, 3, 3, padding=1)
        self.width, self.activation, self.backend = widths[-1], activation, backend

    def forward(self, z: Tensor, tile: int | None = None) -> Tensor:
        z = channels_last(z, self.backend, self.stem.weight)
        x = self.stem(z) + repeat_channels(z, self.width)
        return self.tiled(x, tile) if tile else self.whole(x)

    def whole(self, x: Tensor) -> Tensor:
        for stage in reversed(self.stages):
            x = stage(x)
        return self.head(self.activate(x))

    def tiled(self, x: Tensor, tile: int) -> Tensor:
        blocks = [*flat(reversed(self.stages)), self.head]
        coarse = len(blocks) - local_blocks(blocks[::-1])
        grid = Tiled(x, tile)
        for block in blocks[:coarse]:
            grid = through(grid, [block]).settled()
        last = through(grid, blocks[coarse:-1]).then(self.activate, within(0))
        return through(last, [self.head]).whole()

    def activate(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return activate(y, self.activation, keep=y.requires_grad and torch.is_grad_enabled())


def local_blocks(blocks: Sequence[nn.Module]) -> int:
    """How many of these, full resolution first, are tiled together: up to an eighth of it or the first attention."""
    halvings = 0
    for i, block in enumerate(blocks):
        if isinstance(block, EfficientViTBlock) or halvings == FINEST:
            return i
        halvings += isinstance(block, Downsample | Upsample)
    return len(blocks)


def _check_depths(
    widths: Sequence[int], encoder_depths: Sequence[int], decoder_depths: Sequence[int], attention_stages: int
) -> None:
    if not 0 <= attention_stages <= len(widths):
        raise ValueError(f"dcae: attention_stages is {attention_stages}, expected 0 to {len(widths)}, one per width")
    for name, depths in (("encoder_depths", encoder_depths), ("decoder_depths", decoder_depths)):
        if len(depths) != len(widths):
            raise ValueError(f"dcae: {name} has {len(depths)} entries and widths {len(widths)}; give as many")
        if min(depths[1:]) < 1 or depths[0] < 0:
            raise ValueError(f"dcae: {name} is {list(depths)}; only the first depth may be 0, none may be negative")


def _check_decoder(widths: Sequence[int], attention_stages: int, batch_norm_stages: int) -> None:
    if not 0 <= attention_stages <= len(widths):
        raise ValueError(f"dcae: decoder_attention_stages is {attention_stages}, expected 0 to {len(widths)}")
    residual = len(widths) - attention_stages
    if not 0 <= batch_norm_stages <= residual:
        raise ValueError(
            f"dcae: batch_norm_stages is {batch_norm_stages}, expected 0 to {residual}: the decoder's residual stages"
        )


def _check_widths(widths: Sequence[int], latent: int, first_attention: int, head_dim: int) -> None:
    """The shortcuts average or repeat whole channels, and heads fill a width."""
    for a, b in pairwise(widths):
        if 4 * a % b:
            raise ValueError(f"dcae: neighbouring widths {a} and {b}: {b} does not divide 4 x {a}")
    if widths[-1] % latent:
        raise ValueError(f"dcae: the last width {widths[-1]} is not a multiple of latent {latent}")
    for width in widths[first_attention:]:
        if width % head_dim:
            raise ValueError(f"dcae: width {width} of an attention stage is not a multiple of head_dim {head_dim}")
