"""Token routing (TREAD, arXiv 2501.04765): a random share of tokens skips a range of blocks in training.

Mix-FFN's 3 x 3 convolution needs a grid, and the tokens that are routed through leave holes in it. Two answers are
options: `fill` applies it on the whole grid with zeros in the holes, as its padding has outside; `skip` applies its
centre alone, so that each token sees itself.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, final

from annotated_types import Gt, Lt
from torch import Tensor, nn

from sana_lab.config.ranges import Number
from sana_lab.config.specs import SpecError
from sana_lab.methods import Grid, Method, Model, Step
from sana_lab.models.attention import Attention
from sana_lab.models.dit import BlockCall
from sana_lab.models.layers import MixFfn, Scattered
from sana_lab.ops.transfer import to_device

Holes = Literal["fill", "skip"]


@dataclass
class Route:
    """The tokens of a step that take the blocks of a route, and the whole grid at its entry."""

    indices: Tensor  # (B, n), ascending, of the N = h w tokens
    grid: Grid
    entry: Tensor | None = None  # (B, h, w, C)

    def enter(self, tokens: Tensor) -> Tensor:
        """(B, h, w, C) -> the tokens that take the route, (B, 1, n, C)."""
        self.entry = tokens
        return tokens.flatten(1, 2).gather(1, self._wide(tokens))[:, None]

    def whole(self, tokens: Tensor) -> Tensor:
        """(B, 1, n, C) -> (B, h, w, C), with the tokens that skipped as they were at the entry."""
        assert self.entry is not None
        return self._onto(self.entry.flatten(1, 2), tokens)

    def fill(self, convolve: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """The convolution on the whole grid with zeros in the holes."""
        zeros = tokens.new_zeros(len(tokens), self.grid[0] * self.grid[1], tokens.shape[-1])
        mixed = convolve(self._onto(zeros, tokens)).flatten(1, 2)
        return mixed.gather(1, self._wide(mixed))[:, None]

    def _onto(self, base: Tensor, tokens: Tensor) -> Tensor:
        return base.scatter(1, self._wide(tokens), tokens[:, 0].to(base.dtype)).unflatten(1, self.grid)

    def _wide(self, tokens: Tensor) -> Tensor:
        return self.indices[:, :, None].expand(-1, -1, tokens.shape[-1])


@final
class Tread(Method):
    """Blocks `start` to `stop` - 1 run on a random subset of tokens in training; the others return after them."""

    def __init__(
        self,
        share: Annotated[float, Gt(0), Lt(1)] = 0.5,  # share of tokens that skip, in (0, 1)
        start: Number = 1,  # first block of the route, from 0
        stop: Number | None = None,  # block at which all tokens are back; null leaves one block after the route
        holes: Holes = "fill",  # Mix-FFN's 3 x 3: on the grid with zeros in the holes, or its centre alone (skip)
    ) -> None:
        super().__init__()
        self.share, self.start, self.stop, self.holes = share, start, stop, holes
        self.route: Route | None = None

    def build(self, model: Model) -> None:
        self.end_block = model.depth - 1 if self.stop is None else self.stop
        if not self.start < self.end_block <= model.depth:
            raise SpecError(
                f"method {self.name!r} has start {self.start} and stop {self.end_block}, and the DiT has {model.depth} "
                f"blocks; expected 0 <= start < stop <= {model.depth}"
            )
        for count in map(math.prod, model.grids.values()):
            if not 0 < (kept := self.kept(count)) < count:
                raise SpecError(f"method {self.name!r} has share {self.share}, which leaves {kept} of {count} tokens")
        for block in model.dit.blocks[self.start : self.end_block]:
            if not mixes_sets(mixer := getattr(block, "attention", None)):
                raise SpecError(
                    f"method {self.name!r} gives blocks a part of the tokens, and {type(mixer).__name__} needs their "
                    f"grid; expected attention softmax, linear or mean in blocks {self.start} to {self.end_block - 1}"
                )

    def kept(self, count: int) -> int:
        """Number of tokens that take the route, of `count`."""
        return count - round(self.share * count)

    def begin(self, step: Step) -> None:
        count = math.prod(step.grid)
        indices = step.uniform(count).argsort(1)[:, : self.kept(count)].sort(1).values
        self.route = Route(to_device(indices, step.latents.device), step.grid)

    def wrap(self, index: int, call: BlockCall, block: nn.Module) -> BlockCall:
        if not self.start <= index < self.end_block:
            return call
        route, first, last = self.route, index == self.start, index == self.end_block - 1
        assert route is not None

        def routed(tokens: Tensor, *conditions: Tensor | None) -> Tensor:
            tokens = route.enter(tokens) if first else tokens
            with scattering(getattr(block, "ffn", None), route.fill if self.holes == "fill" else skip):
                tokens = call(tokens, *conditions)
            return route.whole(tokens) if last else tokens

        return routed

    def whole(self, index: int, tokens: Tensor) -> Tensor:
        if self.route is None or not self.start <= index < self.end_block - 1:
            return tokens
        return self.route.whole(tokens)

    def end(self) -> None:
        self.route = None


def mixes_sets(mixer: Any) -> bool:
    """Whether a mixer takes tokens as a set: an `Attention` that only says how q, k and v are mixed."""
    return isinstance(mixer, Attention) and type(mixer).forward is Attention.forward


def skip(convolve: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """The convolution of each token (B, 1, n, C) alone, as a grid of 1 x 1: its centre."""
    alone = tokens.reshape(-1, 1, 1, tokens.shape[-1])
    return convolve(alone).reshape(*tokens.shape[:3], -1)


@contextmanager
def scattering(ffn: Any, scattered: Scattered) -> Iterator[None]:
    """Context in which Mix-FFN's convolution is applied to tokens that are no whole grid; none for other layers."""
    if not isinstance(ffn, MixFfn):
        yield
        return
    ffn.scattered = scattered
    try:
        yield
    finally:
        ffn.scattered = None
