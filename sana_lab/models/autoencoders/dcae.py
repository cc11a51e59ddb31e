"""DC-AE: the deep-compression autoencoder, space-to-channel shortcuts and linear attention (arXiv 2410.10733).

Reference: efficientvit's `dc_ae.py`, diffusers' `AutoencoderDC`. Legend: B batch, C channels, h x w grid, f
downsampling.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor, nn

from sana_lab.config.ranges import Depths, Number, Pixels, Positive, Real, Width, Widths
from sana_lab.config.specs import RUNTIME, AsBefore
from sana_lab.models.autoencoders import Autoencoder, Layers
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
from sana_lab.models.autoencoders.tiling import Tiled, append_blocks, flatten_stages, reach_same
from sana_lab.ops.conv.reference import activate
from sana_lab.ops.inference_backend import Fast

LOCAL_HALVINGS = 3  # grids down to 1/8 of full resolution are tiled in one pass; coarser ones need wide margins


class DcAe(Autoencoder):
    """A deterministic autoencoder with one stage per width; each stage after the first halves the grid.

    Defaults are SANA's f32c32. The coarsest stages hold EfficientViT blocks (linear attention), the others residual
    blocks. With `tile`, local layers down to 1/8 of full resolution run in one pass over the tiles, and attention sums
    its state over them.
    """

    def __init__(
        self,
        # channels of each stage, full resolution first; 4 x a width is a multiple of the next
        widths: Widths = (128, 256, 512, 512, 1024, 1024),
        # blocks of each encoder stage; a first 0 replaces that stage by a strided stem (its width is then unused)
        encoder_depths: Depths = (2, 2, 2, 3, 3, 3),
        # blocks of each decoder stage, full resolution first; a first 0 as in the encoder
        decoder_depths: Depths = (3, 3, 3, 3, 3, 3),
        attention_stages: Number = 3,  # stages with attention, counted from the coarsest; 0 to the number of widths
        multiscales: tuple[Width, ...] = (5,),  # kernel sizes of extra attention branches, odd; [] for one scale
        latent: Width = 32,  # latent channels; divides the last width
        head_dim: Width = 32,  # width of an attention head; divides the widths of attention stages
        down: Down = "conv",  # downsampling: conv (stride 2) or unshuffle (convolution, then space to channels)
        up: Up = "interpolate",  # upsampling: interpolate (nearest, then convolution) or shuffle (channels to space)
        # attention stages of the decoder; null: as the encoder
        decoder_attention_stages: Annotated[Number | None, AsBefore(None)] = None,
        # finest decoder stages whose residual blocks have batch norm and ReLU instead of RMSNorm and SiLU
        batch_norm_stages: Annotated[Number, AsBefore(0)] = 0,
        last: Annotated[Activation, AsBefore("relu")] = "relu",  # activation before the decoder's last convolution
        shift: Annotated[Real, AsBefore(0.0)] = 0.0,  # mean of raw latents; normalised ones are (z - shift) x scale
        scale: Annotated[Positive, AsBefore(1.0)] = 1.0,  # 1 / standard deviation of raw latents, above 0
        # latents on a side of a tile; larger images are encoded and decoded in tiles: same result in less memory
        tile: Annotated[Pixels | None, RUNTIME] = None,
        # inference: torch (as defined), fast (fewer operations, no gradients; relative L2 error about 5e-6 in
        # float32) or auto (fast where it pays)
        backend: Annotated[Fast, RUNTIME] = "auto",
    ) -> None:
        super().__init__(latent, 2 ** (len(widths) - 1), shift, scale, tile)
        decoder_stages = attention_stages if decoder_attention_stages is None else decoder_attention_stages
        _check_depths(widths, encoder_depths, decoder_depths, attention_stages)
        _check_decoder(widths, decoder_stages, batch_norm_stages)
        _check_widths(widths, latent, len(widths) - max(attention_stages, decoder_stages), head_dim)
        encoder_blocks = Blocks(len(widths) - attention_stages, head_dim, multiscales, backend)
        decoder_blocks = Blocks(len(widths) - decoder_stages, head_dim, multiscales, backend, batch_norm_stages)
        self.encoder = Encoder(widths, encoder_depths, encoder_blocks, latent, down)
        self.decoder = Decoder(widths, decoder_depths, decoder_blocks, latent, up, last)

    def layers(self, layers: Layers) -> list[nn.Module]:
        """The coarsest stages with the convolutions at the latent, or the finest stage of the decoder with its head."""
        encoder, decoder = self.encoder, self.decoder
        if layers == "middle":
            return [encoder.stages[-1], encoder.head, decoder.stem, decoder.stages[-1]]
        finest = next(stage for stage in decoder.stages if any(True for _ in stage.parameters()))
        return [finest, decoder.norm, decoder.head]

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tile = self.tile_for([n // self.downsample for n in images.shape[-2:]])
        mean = self.encoder(images, tile and tile * self.downsample)
        return mean, torch.full_like(mean, -30.0)

    def reconstruct(self, z: Tensor) -> Tensor:
        return self.decoder(z, self.tile_for(z.shape[-2:]))


class Blocks:
    """Factory of a stage's blocks: residual below stage `first_attention`, EfficientViT from it on."""

    def __init__(
        self,
        first_attention: int,
        head_dim: int,
        multiscales: Sequence[int],
        backend: Fast = "auto",
        batch_norm_stages: Number = 0,
    ) -> None:
        self.first_attention, self.head_dim, self.multiscales = first_attention, head_dim, multiscales
        self.backend, self.batch_norm_stages = backend, batch_norm_stages

    def stage(self, index: int, width: int, depth: int) -> list[nn.Module]:
        if index < self.first_attention:
            return [ResBlock(width, index < self.batch_norm_stages, self.backend) for _ in range(depth)]
        return [EfficientViTBlock(width, self.head_dim, self.multiscales, self.backend) for _ in range(depth)]


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> raw latents (B, latent, H / f, W / f); `tile` in pixels."""

    def __init__(self, widths: Sequence[int], depths: Sequence[int], blocks: Blocks, latent: int, down: Down) -> None:
        super().__init__()
        strided_stem, backend = depths[0] == 0, blocks.backend
        self.stem = Downsample(3, widths[1], down, False) if strided_stem else nn.Conv2d(3, widths[0], 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *([Downsample(widths[i - 1], w, down, backend=backend)] if i > strided_stem else []),
                *blocks.stage(i, w, d),
            )
            for i, (w, d) in enumerate(zip(widths, depths, strict=True))
        )
        self.head = nn.Conv2d(widths[-1], latent, 3, padding=1)
        self.latent, self.backend = latent, backend

    def forward(self, images: Tensor, tile: int | None = None) -> Tensor:
        images = channels_last(images, self.backend, self.head.weight)
        x = self.stages_tiled(images, tile) if tile else self.stages_whole(images)
        return self.head(x) + average_channels(x, self.latent)

    def stages_whole(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return x

    def stages_tiled(self, images: Tensor, tile: int) -> Tensor:
        blocks = [self.stem, *flatten_stages(self.stages)]
        local = count_local(blocks)
        x = append_blocks(Tiled(images, tile), blocks[:local]).materialised()
        for block in blocks[local:]:
            x = append_blocks(x, [block]).materialised()
        return x.source


class Decoder(nn.Module):
    """Raw latents (B, latent, h, w) -> images (B, 3, f h, f w); `tile` in latents.

    Stage i runs on the grid of the encoder's stage i, so the last stage runs first.
    """

    def __init__(
        self, widths: Sequence[int], depths: Sequence[int], blocks: Blocks, latent: int, up: Up, activation: Activation
    ) -> None:
        super().__init__()
        strided_stem, last, backend = depths[0] == 0, len(widths) - 1, blocks.backend
        self.stem = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *([Upsample(widths[i + 1], w, up, backend=backend)] if i < last and d else []),
                *blocks.stage(i, w, d),
            )
            for i, (w, d) in enumerate(zip(widths, depths, strict=True))
        )
        width = widths[1] if strided_stem else widths[0]
        self.norm = RmsNorm2d(width, backend=backend)
        self.head = Upsample(width, 3, up, False, backend) if strided_stem else nn.Conv2d(width, 3, 3, padding=1)
        self.width, self.activation, self.backend = widths[-1], activation, backend

    def forward(self, z: Tensor, tile: int | None = None) -> Tensor:
        z = channels_last(z, self.backend, self.stem.weight)
        x = self.stem(z) + repeat_channels(z, self.width)
        return self.stages_tiled(x, tile) if tile else self.stages_whole(x)

    def stages_whole(self, x: Tensor) -> Tensor:
        for stage in reversed(self.stages):
            x = stage(x)
        return self.head(self.activate(x))

    def stages_tiled(self, x: Tensor, tile: int) -> Tensor:
        blocks = [*flatten_stages(reversed(self.stages)), self.head]
        coarse = len(blocks) - count_local(blocks[::-1])
        grid = Tiled(x, tile)
        for block in blocks[:coarse]:
            grid = append_blocks(grid, [block]).materialised()
        last = append_blocks(grid, blocks[coarse:-1]).then(self.activate, reach_same(0))
        return append_blocks(last, [self.head]).compute()

    def activate(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return activate(y, self.activation, keep=y.requires_grad and torch.is_grad_enabled())


def count_local(blocks: Sequence[nn.Module]) -> int:
    """Number of leading blocks, full resolution first, tiled in one pass: down to 1/8 or to the first attention."""
    halvings = 0
    for i, block in enumerate(blocks):
        if isinstance(block, EfficientViTBlock) or halvings == LOCAL_HALVINGS:
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
            raise ValueError(f"dcae: {name} has {len(depths)} entries, expected {len(widths)}: one per width")
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
    """Shortcuts average or repeat whole channels, and heads divide a width."""
    for a, b in pairwise(widths):
        if 4 * a % b:
            raise ValueError(f"dcae: widths {a} and {b} of neighbouring stages: {b} does not divide 4 x {a}")
    if widths[-1] % latent:
        raise ValueError(f"dcae: the last width {widths[-1]} is not a multiple of latent {latent}")
    for width in widths[first_attention:]:
        if width % head_dim:
            raise ValueError(f"dcae: width {width} of an attention stage is not a multiple of head_dim {head_dim}")
