"""DC-AE: the deep-compression autoencoder, space-to-channel shortcuts and linear attention (arXiv 2410.10733).

Shapes: B batch, C channels, h x w grid, G heads, D head width, N = h * w.
"""

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_lab.autoencoders import Autoencoder
from sana_lab.autoencoders.tiling import Tiled, convolving_first, doubling, flat, halving, through, within
from sana_lab.parts import RUNTIME, AsBefore

Down = Literal["conv", "unshuffle"]
Up = Literal["interpolate", "shuffle"]
Activation = Literal["relu", "silu"]

FINEST = 3  # halvings from full resolution on that are tiled together; on coarser grids margins would be wide
GAIN = 0.1  # initial weight of the norm that ends a residual branch, so that blocks start near the identity


class DcAe(Autoencoder):
    """A deterministic autoencoder with one stage per width; each stage after the first halves the grid.

    Defaults are SANA's f32c32. The last `attention_stages` stages hold EfficientViT blocks with one extra branch per
    kernel size in `multiscales`, the others hold residual blocks. A first depth of 0 folds that stage into a strided
    stem, so that nothing runs at full resolution (its width is then unused). The decoder may have its own number of
    attention stages; its first `batch_norm_stages` end their residual blocks with batch norm and have ReLU in them,
    where all others have RMSNorm and SiLU. `last` is its last activation; `shift` and `scale` normalise latents.

    `tile` bounds the memory: images of more latents on a side go through tile by tile, to the same result. From full
    resolution down to an eighth the layers are local and run in one pass; attention sums its state over the tiles.
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
    ) -> None:
        super().__init__(latent, 2 ** (len(widths) - 1), shift, scale, tile)
        decoder_stages = attention_stages if decoder_attention_stages is None else decoder_attention_stages
        _check_depths(widths, encoder_depths, decoder_depths, attention_stages)
        _check_decoder(widths, decoder_stages, batch_norm_stages)
        _check_widths(widths, latent, len(widths) - max(attention_stages, decoder_stages), head_dim)
        blocks = Blocks(len(widths) - attention_stages, head_dim, multiscales)
        back = Blocks(len(widths) - decoder_stages, head_dim, multiscales, batch_norm_stages)
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
        self, first_attention: int, head_dim: int, multiscales: Sequence[int], batch_norm_stages: int = 0
    ) -> None:
        self.first_attention, self.head_dim, self.multiscales = first_attention, head_dim, multiscales
        self.batch_norm_stages = batch_norm_stages

    def stage(self, index: int, width: int, depth: int) -> list[nn.Module]:
        if index < self.first_attention:
            return [ResBlock(width, batch_norm=index < self.batch_norm_stages) for _ in range(depth)]
        return [EfficientViTBlock(width, self.head_dim, self.multiscales) for _ in range(depth)]


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> raw latents (B, latent, H / f, W / f). `tile` is in pixels."""

    def __init__(self, widths: Sequence[int], depths: Sequence[int], blocks: Blocks, latent: int, down: Down) -> None:
        super().__init__()
        folded = depths[0] == 0
        self.stem = Downsample(3, widths[1], down, shortcut=False) if folded else nn.Conv2d(3, widths[0], 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *([Downsample(widths[i - 1], w, down)] if i > folded else []),
                *blocks.stage(i, w, d),
            )
            for i, (w, d) in enumerate(zip(widths, depths, strict=True))
        )
        self.head = nn.Conv2d(widths[-1], latent, 3, padding=1)
        self.latent = latent

    def forward(self, images: Tensor, tile: int | None = None) -> Tensor:
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
        folded, last = depths[0] == 0, len(widths) - 1
        self.stem = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *([Upsample(widths[i + 1], w, up)] if i < last and d else []),
                *blocks.stage(i, w, d),
            )
            for i, (w, d) in enumerate(zip(widths, depths, strict=True))
        )
        width = widths[1] if folded else widths[0]
        self.norm = RmsNorm2d(width)
        self.head = Upsample(width, 3, up, shortcut=False) if folded else nn.Conv2d(width, 3, 3, padding=1)
        self.width, self.activation = widths[-1], getattr(F, activation)

    def forward(self, z: Tensor, tile: int | None = None) -> Tensor:
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
        return self.activation(self.norm(x))


def local_blocks(blocks: Sequence[nn.Module]) -> int:
    """How many of these, full resolution first, are tiled together: up to an eighth of it or the first attention."""
    halvings = 0
    for i, block in enumerate(blocks):
        if isinstance(block, EfficientViTBlock) or halvings == FINEST:
            return i
        halvings += isinstance(block, Downsample | Upsample)
    return len(blocks)


class Downsample(nn.Module):
    """(B, C, 2h, 2w) -> (B, C', h, w): a convolution beside space-to-channel averaging."""

    def __init__(self, width: int, out: int, how: Down, shortcut: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, 3, 2, 1) if how == "conv" else nn.Conv2d(width, out // 4, 3, padding=1)
        self.unshuffle, self.shortcut, self.out = how == "unshuffle", shortcut, out

    def tiled(self, x: Tiled) -> Tiled:
        return x.then(self, halving, down=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = F.pixel_unshuffle(y, 2) if self.unshuffle else y
        return y + average_channels(F.pixel_unshuffle(x, 2), self.out) if self.shortcut else y


class Upsample(nn.Module):
    """(B, C, h, w) -> (B, C', 2h, 2w): a convolution beside channel-to-space duplication."""

    def __init__(self, width: int, out: int, how: Up, shortcut: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out if how == "interpolate" else 4 * out, 3, padding=1)
        self.shuffle, self.shortcut, self.out = how == "shuffle", shortcut, out

    def tiled(self, x: Tiled) -> Tiled:
        return x.then(self, convolving_first if self.shuffle else doubling, up=2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pixel_shuffle(self.conv(x), 2) if self.shuffle else self.conv(F.interpolate(x, scale_factor=2.0))
        return y + F.pixel_shuffle(repeat_channels(x, 4 * self.out), 2) if self.shortcut else y


class ResBlock(nn.Module):
    """x + norm(conv(act(conv(x)))), (B, C, h, w) -> same: RMSNorm and SiLU, or batch norm and ReLU."""

    def __init__(self, width: int, batch_norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = batch_norm_2d(width) if batch_norm else RmsNorm2d(width, GAIN)
        self.activation = F.relu if batch_norm else F.silu

    def tiled(self, x: Tiled) -> Tiled:
        return x.then(self, within(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(self.activation(self.conv1(x))))


class EfficientViTBlock(nn.Module):
    """Multi-scale linear attention, then a gated convolutional feed-forward, each with its residual."""

    def __init__(self, width: int, head_dim: int, multiscales: Sequence[int]) -> None:
        super().__init__()
        self.attention = MultiscaleAttention(width, head_dim, multiscales)
        self.ffn = GluMbConv(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.ffn(x)

    def tiled(self, x: Tiled) -> Tiled:
        state = self.attention.state(x)
        x = x.then(lambda t: t + self.attention.read(t, state), within(self.attention.around)).settled()
        return x.then(lambda t: t + self.ffn(t), within(1))


class MultiscaleAttention(nn.Module):
    """ReLU attention over (B, C, h, w). Channels of `qkv` come head by head, q then k then v, D of each."""

    def __init__(self, width: int, head_dim: int, multiscales: Sequence[int]) -> None:
        super().__init__()
        heads = width // head_dim
        inner = heads * head_dim
        self.head_dim, self.around = head_dim, max(multiscales, default=1) // 2
        self.qkv = nn.Conv2d(width, 3 * inner, 1, bias=False)
        self.scales = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3 * inner, 3 * inner, size, padding=size // 2, groups=3 * inner, bias=False),
                nn.Conv2d(3 * inner, 3 * inner, 1, groups=3 * heads, bias=False),
            )
            for size in multiscales
        )
        self.out = nn.Conv2d(inner * (1 + len(multiscales)), width, 1, bias=False)
        self.norm = RmsNorm2d(width, GAIN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.project(x))
        return self.merge(relu_attention(q, k, v), x)

    def state(self, x: Tiled) -> Tensor:
        """What all of x tells each query, (B, G, D + 1, D), summed over its tiles."""
        parts = x.then(self.project, within(self.around)).parts()
        kv = (self.split(values)[1:] for _, values in parts)
        return functools.reduce(Tensor.add, (wide(attention_state(k, v)) for k, v in kv))

    def read(self, x: Tensor, state: Tensor) -> Tensor:
        """The attention of a part of the grid to the whole, whose state is given."""
        return self.merge(read_state(self.split(self.project(x))[0], state), x)

    def project(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3 G D, h, w)."""
        qkv = self.qkv(x)
        return torch.cat([qkv, *(scale(qkv) for scale in self.scales)], dim=1)

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """q, k and v, each (B, G, D, N)."""
        return qkv.flatten(2).unflatten(1, (-1, 3 * self.head_dim)).chunk(3, dim=2)

    def merge(self, y: Tensor, x: Tensor) -> Tensor:
        """(B, G, D, N) -> (B, C, h, w), as x is."""
        return self.norm(self.out(y.to(x.dtype).reshape(x.shape[0], -1, *x.shape[2:])))


def relu_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-15) -> Tensor:
    """Attention with weights relu(q) . relu(k), each (B, G, D, N) -> same, in float32 or wider.

    The products are taken in the cheaper order: D x D when there are more tokens than D, else N x N.
    """
    if q.shape[-1] <= q.shape[-2]:
        weights = F.relu(wide(k)).mT @ F.relu(wide(q))
        return wide(v) @ (weights / (weights.sum(-2, keepdim=True) + eps))
    return read_state(q, attention_state(k, v), eps)


def attention_state(k: Tensor, v: Tensor) -> Tensor:
    """Values (B, G, D, N) summed with weights relu(k): (B, G, D + 1, D), whose last row makes the normaliser."""
    return F.pad(wide(v), (0, 0, 0, 1), value=1.0) @ F.relu(wide(k)).mT


def read_state(q: Tensor, state: Tensor, eps: float = 1e-15) -> Tensor:
    """What queries (B, G, D, N) find in a state of keys and values -> same."""
    y = state @ F.relu(wide(q))
    return y[:, :, :-1] / (y[:, :, -1:] + eps)


class GluMbConv(nn.Module):
    """Inverted bottleneck, 3x3 depthwise convolution and SiLU gate, (B, C, h, w) -> same; no residual inside."""

    def __init__(self, width: int, expand: int = 4) -> None:
        super().__init__()
        hidden = expand * width
        self.inverted = nn.Conv2d(width, 2 * hidden, 1)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.point = nn.Conv2d(hidden, width, 1, bias=False)
        self.norm = RmsNorm2d(width, GAIN)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.depthwise(F.silu(self.inverted(x))).chunk(2, dim=1)
        return self.norm(self.point(value * F.silu(gate)))


class RmsNorm2d(nn.Module):
    """x / rms(x) over the channels of (B, C, h, w), with weight and bias; statistics in float32 or wider."""

    def __init__(self, width: int, gain: float = 1.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.full((width,), gain)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(wide(x).square().mean(1, keepdim=True) + self.eps)
        return (x * scale).to(x.dtype) * self.weight[:, None, None] + self.bias[:, None, None]


def batch_norm_2d(width: int) -> nn.BatchNorm2d:
    """Over (B, C, h, w), beginning as quietly as the other norms of residual branches."""
    norm = nn.BatchNorm2d(width)
    nn.init.constant_(norm.weight, GAIN)
    return norm


def wide(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def average_channels(x: Tensor, out: int) -> Tensor:
    """(B, C, h, w) -> (B, out, h, w): the mean of each run of C / out channels."""
    return x.unflatten(1, (out, -1)).mean(2)


def repeat_channels(x: Tensor, out: int) -> Tensor:
    """(B, C, h, w) -> (B, out, h, w): each channel out / C times in a row."""
    return x.repeat_interleave(out // x.shape[1], dim=1)


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
