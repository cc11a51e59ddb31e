"""Local functions of large images, tile by tile and without seams: each tile is worked out with all that it depends on.

Shapes: B batch, C channels, h x w grid, G groups.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

Layer = Callable[[Tensor], Tensor]
"""(B, C, h, w) -> (B, C', ...), on the same grid, one twice as fine or one half as fine; local."""

Reach = Callable[[int], int]
"""How far beyond a tile a layer reads, in cells of its input, for what lies so many cells beyond it in its output."""


class Box(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of a grid."""

    top: int
    bottom: int
    left: int
    right: int

    def scaled(self, factor: int) -> "Box":
        return Box(*(n * factor for n in self))

    def seen_from(self, outer: "Box") -> "Box":
        """The same cells, counted from the outer box's corner."""
        return Box(self.top - outer.top, self.bottom - outer.top, self.left - outer.left, self.right - outer.left)

    def of(self, x: Tensor) -> Tensor:
        return x[..., self.top : self.bottom, self.left : self.right]


class Tiled:
    """What layers make of `source` (B, C, h, w), worked out when asked for, `tile` x `tile` source cells at a time.

    A tile is read with a margin of all the cells that its result depends on, clipped at the image's border, where the
    layers' own padding is right. The layers of one chain make the grid finer or coarser, not both; `settled` ends one.
    """

    def __init__(self, source: Tensor, tile: int) -> None:
        self.source, self.tile = source, tile
        self.layers: tuple[tuple[Layer, Reach], ...] = ()
        self.up = self.down = 1

    def then(self, layer: Layer, reach: Reach, up: int = 1, down: int = 1) -> "Tiled":
        """With one more layer, after which the grid is `up` times finer or `down` times coarser."""
        longer = Tiled(self.source, self.tile)
        longer.layers = (*self.layers, (layer, reach))
        longer.up, longer.down = self.up * up, self.down * down
        return longer

    def margin(self) -> int:
        """How far beyond a tile its result depends on the source, in steps of `down` cells."""
        beyond = 0
        for _, reach in reversed(self.layers):
            beyond = reach(beyond)
        return -(-beyond // self.down)

    def parts(self) -> Iterator[tuple[Box, Tensor]]:
        """Each tile's place in the result and its values; together they fill the result once."""
        for core, window in self._boxes():
            x = window.scaled(self.down).of(self.source)
            for layer, _ in self.layers:
                x = layer(x)
            yield core.scaled(self.up), core.seen_from(window).scaled(self.up).of(x)

    def _boxes(self) -> Iterator[tuple[Box, Box]]:
        """Tiles without and with their margins, in steps of `down` cells."""
        height, width = (n // self.down for n in self.source.shape[-2:])
        step, margin = max(1, self.tile // self.down), self.margin()
        for top in range(0, height, step):
            for left in range(0, width, step):
                core = Box(top, min(top + step, height), left, min(left + step, width))
                yield (
                    core,
                    Box(
                        max(0, core.top - margin),
                        min(core.bottom + margin, height),
                        max(0, core.left - margin),
                        min(core.right + margin, width),
                    ),
                )

    def whole(self) -> Tensor:
        """The result (B, C', h', w')."""
        out = None
        for place, values in self.parts():
            if out is None:
                height, width = (n // self.down * self.up for n in self.source.shape[-2:])
                out = new(values, height, width)
            place.of(out).copy_(values)
        assert out is not None
        return out

    def settled(self) -> "Tiled":
        """The result as a source of its own, whose tiles cover as much of the image."""
        return Tiled(self.whole(), max(1, self.tile * self.up // self.down)) if self.layers else self


def new(values: Tensor, height: int, width: int) -> Tensor:
    """Room for a grid of this size of the kind of values (B, C, h, w), with channels last where they are."""
    last = values.stride(1) == 1 and values.shape[1] > 1
    order = torch.channels_last if last else torch.contiguous_format
    return torch.empty(*values.shape[:2], height, width, dtype=values.dtype, device=values.device, memory_format=order)


def through(x: Tiled, blocks: Iterable[nn.Module]) -> Tiled:
    """With more layers: modules with a method `tiled(x: Tiled) -> Tiled`, and torch's own that keep the grid."""
    for block in blocks:
        match block:
            case nn.GroupNorm():
                x = x.then(group_norm(block, x), within(0))
            case nn.Conv2d():
                x = x.then(block, within(block.kernel_size[0] // 2))
            case nn.SiLU():
                x = x.then(block, within(0))
            case _:
                x = cast("Any", block).tiled(x)
    return x


def flat(stages: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks of all stages, in order."""
    return [block for stage in stages for block in stage.children()]


def within(cells: int) -> Reach:
    """The reach of a layer that keeps the grid and sees so many cells around each."""
    return lambda beyond: beyond + cells


def halving(beyond: int) -> int:
    """The reach of a 3x3 convolution of stride 2, or of one before 2x2 cells become channels."""
    return 2 * beyond + 1


def doubling(beyond: int) -> int:
    """The reach of nearest neighbours twice as large and a 3x3 convolution after them."""
    return (beyond + 2) // 2


def convolving_first(beyond: int) -> int:
    """The reach of a 3x3 convolution whose channels then become 2x2 cells."""
    return (beyond + 1) // 2 + 1


def group_norm(norm: nn.GroupNorm, x: Tiled) -> Layer:
    """The norm with the statistics of the whole of x, streamed tile by tile and summed in float64."""
    grouped = (values.unflatten(1, (norm.num_groups, -1)).flatten(2).double() for _, values in x.parts())
    moments = ((g.sum(-1), g.square().sum(-1), g.shape[-1]) for g in grouped)  # g is (B, G, C / G h w)
    totals, squares, counts = zip(*moments, strict=True)
    mean = torch.stack(totals).sum(0) / sum(counts)
    deviation = (torch.stack(squares).sum(0) / sum(counts) - mean.square() + norm.eps).sqrt()
    return lambda tile: _scaled(norm, tile, mean, deviation)


def _scaled(norm: nn.GroupNorm, x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """(x - mean) / deviation, each (B, G), with the norm's weight and bias; in float32 or wider."""
    kind, runs = torch.promote_types(x.dtype, torch.float32), norm.num_channels // norm.num_groups
    weight = norm.weight / deviation.repeat_interleave(runs, 1)  # (B, C)
    bias = norm.bias - weight * mean.repeat_interleave(runs, 1)
    return (x.to(kind) * weight[..., None, None].to(kind) + bias[..., None, None].to(kind)).to(x.dtype)
