"""Seamless tiled evaluation of local layers: each tile is read with all input cells that it depends on.

Legend: B batch, C channels, h x w grid, G groups. A cell is a position of a grid.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

Layer = Callable[[Tensor], Tensor]
"""(B, C, h, w) -> (B, C', h', w'), a local function whose grid is the same, twice as fine or half as fine."""

Reach = Callable[[int], int]
"""Receptive field of a layer: width of the margin around its output, in cells -> margin needed around its input."""


class Box(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of a grid."""

    top: int
    bottom: int
    left: int
    right: int

    def scaled(self, factor: int) -> "Box":
        return Box(*(n * factor for n in self))

    def relative_to(self, outer: "Box") -> "Box":
        """The same cells, counted from the outer box's corner."""
        return Box(self.top - outer.top, self.bottom - outer.top, self.left - outer.left, self.right - outer.left)

    def crop(self, x: Tensor) -> Tensor:
        return x[..., self.top : self.bottom, self.left : self.right]

    def grown(self, margin: int, height: int, width: int) -> "Box":
        """With a margin on each side, clipped at the borders of a height x width grid."""
        top, left = max(0, self.top - margin), max(0, self.left - margin)
        return Box(top, min(self.bottom + margin, height), left, min(self.right + margin, width))


class Tiled:
    """A lazy chain of local layers on `source` (B, C, h, w), computed in tiles of `tile` x `tile` source cells.

    Each tile is read with a margin that covers its receptive field, clipped at the image's border, where the layers'
    padding applies. Within a chain the grid becomes finer or coarser, not both; `materialised` ends a chain.
    """

    def __init__(self, source: Tensor, tile: int) -> None:
        self.source, self.tile = source, tile
        self.layers: tuple[tuple[Layer, Reach], ...] = ()
        self.up = self.down = 1

    def then(self, layer: Layer, reach: Reach, up: int = 1, down: int = 1) -> "Tiled":
        """The chain with one more layer, whose grid is `up` times finer or `down` times coarser."""
        longer = Tiled(self.source, self.tile)
        longer.layers = (*self.layers, (layer, reach))
        longer.up, longer.down = self.up * up, self.down * down
        return longer

    def margin(self) -> int:
        """Width of the receptive field beyond a tile, in steps of `down` source cells."""
        margin = 0
        for _, reach in reversed(self.layers):
            margin = reach(margin)
        return -(-margin // self.down)

    def tiles(self) -> Iterator[tuple[Box, Tensor]]:
        """Box and values (B, C', h', w') of each tile of the result; the boxes partition it."""
        for core, window in self._boxes():
            x = window.scaled(self.down).crop(self.source)
            for layer, _ in self.layers:
                x = layer(x)
            yield core.scaled(self.up), core.relative_to(window).scaled(self.up).crop(x)

    def _boxes(self) -> Iterator[tuple[Box, Box]]:
        """Each tile without and with its margin, in steps of `down` source cells."""
        height, width = (n // self.down for n in self.source.shape[-2:])
        step, margin = max(1, self.tile // self.down), self.margin()
        for top in range(0, height, step):
            for left in range(0, width, step):
                core = Box(top, min(top + step, height), left, min(left + step, width))
                yield core, core.grown(margin, height, width)

    def compute(self) -> Tensor:
        """The whole result (B, C', h', w')."""
        out = None
        for box, values in self.tiles():
            if out is None:
                height, width = (n // self.down * self.up for n in self.source.shape[-2:])
                out = _empty_grid(values, height, width)
            box.crop(out).copy_(values)
        assert out is not None
        return out

    def materialised(self) -> "Tiled":
        """The result as the source of a new chain, its tiles covering the same part of the image."""
        return Tiled(self.compute(), max(1, self.tile * self.up // self.down)) if self.layers else self


def _empty_grid(values: Tensor, height: int, width: int) -> Tensor:
    """An uninitialised (B, C, height, width) like `values` (B, C, h, w), in the same memory format."""
    channels_last = values.stride(1) == 1 and values.shape[1] > 1
    order = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(*values.shape[:2], height, width, dtype=values.dtype, device=values.device, memory_format=order)


def append_blocks(x: Tiled, blocks: Iterable[nn.Module]) -> Tiled:
    """The chain with more layers: grid-preserving torch modules, and modules with `tiled(x: Tiled) -> Tiled`."""
    for block in blocks:
        match block:
            case nn.GroupNorm():
                x = x.then(group_norm(block, x), reach_same(0))
            case nn.Conv2d():
                x = x.then(block, reach_same(block.kernel_size[0] // 2))
            case nn.SiLU():
                x = x.then(block, reach_same(0))
            case _:
                x = cast("Any", block).tiled(x)
    return x


def flatten_stages(stages: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks of all stages, in order."""
    return [block for stage in stages for block in stage.children()]


def reach_same(radius: int) -> Reach:
    """Reach of a layer that keeps the grid and reads `radius` cells around each."""
    return lambda margin: margin + radius


def reach_halving(margin: int) -> int:
    """Reach of a 3x3 convolution of stride 2, or of one followed by pixel unshuffle."""
    return 2 * margin + 1


def reach_doubling(margin: int) -> int:
    """Reach of nearest-neighbour upsampling followed by a 3x3 convolution."""
    return (margin + 2) // 2


def reach_pixel_shuffle(margin: int) -> int:
    """Reach of a 3x3 convolution followed by pixel shuffle."""
    return (margin + 1) // 2 + 1


def group_norm(norm: nn.GroupNorm, x: Tiled) -> Layer:
    """The norm with statistics of the whole grid x, accumulated over its tiles in float64."""
    grouped = (values.unflatten(1, (norm.num_groups, -1)).flatten(2).double() for _, values in x.tiles())
    moments = ((g.sum(-1), g.square().sum(-1), g.shape[-1]) for g in grouped)  # g is (B, G, C / G h w)
    totals, squares, counts = zip(*moments, strict=True)
    mean = torch.stack(totals).sum(0) / sum(counts)
    deviation = (torch.stack(squares).sum(0) / sum(counts) - mean.square() + norm.eps).sqrt()
    return lambda tile: _normalise(norm, tile, mean, deviation)


def _normalise(norm: nn.GroupNorm, x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """(x - mean) / deviation, each (B, G), then the norm's weight and bias; in float32 or wider."""
    dtype, repeats = torch.promote_types(x.dtype, torch.float32), norm.num_channels // norm.num_groups
    weight = norm.weight / deviation.repeat_interleave(repeats, 1)  # (B, C)
    bias = norm.bias - weight * mean.repeat_interleave(repeats, 1)
    return (x.to(dtype) * weight[..., None, None].to(dtype) + bias[..., None, None].to(dtype)).to(x.dtype)
