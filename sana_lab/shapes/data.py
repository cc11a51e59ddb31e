"""`data: shapes`: the embedded world as a data module, rendered on the fly, without files."""

import itertools
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Le
from numpy.typing import NDArray

from sana_lab.config.ranges import BatchSize, Nonnegative, Number, Seed, Workers
from sana_lab.config.specs import RUNTIME, AsBefore
from sana_lab.data import DataModule, Split, Turn
from sana_lab.shapes import captions
from sana_lab.shapes import scenes as world
from sana_lab.types import Batch


class World(NamedTuple):
    """Distribution of scenes."""

    seed: int  # seed of all random numbers
    shares: tuple[float, ...]  # probabilities of `scenes.KINDS`
    style: captions.Style  # of captions


HELD_OUT = -1  # seed of the held-out scenes; training seeds are not negative


class Shapes(DataModule):
    """Flat shapes on grey with captions, (B, 3, size, size) in [-1, 1]; nothing to download.

    Training batch n has scenes n * batch to (n + 1) * batch - 1. The held-out scenes are the
    same for every seed, and always have the default `shares`.
    """

    def __init__(
        self,
        size: Annotated[int, Ge(8), Le(2**15)] = 64,  # height and width, pixels, at least 8
        batch: BatchSize = 64,  # images in a batch, which devices share
        seed: Seed = 0,  # seed of the training scenes
        held_out: Number = 1000,  # scenes for validation
        # weights of single, pair, count and mixed training scenes; null is 0.25, 0.40, 0.27, 0.08
        shares: Annotated[list[Nonnegative] | None, AsBefore(None)] = None,
        workers: Annotated[Workers, RUNTIME] = 0,  # processes that render batches; 0 renders in the main process
        # Patterns of captions: geneval (half without colours), detailed (most with colours and relations), or varied
        # (more than a hundred forms).
        captions: Annotated[captions.Style, AsBefore("geneval")] = "geneval",
    ) -> None:
        super().__init__(batch, seed, workers)
        self.size, self.held_out, self.style = size, held_out, captions
        self.check_least(size=8, held_out=1)
        self.shares = _normalised(shares)

    @property
    def len_train(self) -> None:
        """None: the training stream is endless."""

    def digest(self) -> str:
        """Constant, because the scenes depend only on the options."""
        return "shapes"

    @property
    def len_val(self) -> int:
        """Number of held-out scenes."""
        return self.held_out

    def example(self, index: int, split: Split = "train", draw: int = 0) -> tuple[NDArray[np.uint8], str]:
        """Image (3, size, size) uint8 and the caption selected by (seed, index, draw)."""
        images, prompts = _render(self._world(split, [index]), self.size, [index], draw)
        return images[0], prompts[0]

    def batch_of(self, turns: Sequence[Turn], split: Split) -> Batch:
        """Rendered scenes with captions. IndexError beyond the held-out set."""
        source = self._world(split, [i for i, _ in turns])
        parts = [
            _render(source, self.size, [i for i, _ in same], draw)
            for draw, same in itertools.groupby(turns, lambda turn: turn[1])
        ]
        images = torch.from_numpy(np.concatenate([images for images, _ in parts]))
        return Batch(images.float().mul_(2 / 255).sub_(1), [prompt for _, prompts in parts for prompt in prompts])

    def prompts_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> list[str]:
        """Captions of `batch_at`, without rendering."""
        source = self._world(split, indices)
        rows = world.scenes(source.seed, indices, source.shares)
        return captions.prompts(rows, source.seed, indices, draw, source.style)

    def _world(self, split: Split, indices: Sequence[int]) -> World:
        if split == "train":
            return World(self.seed, self.shares, self.style)
        if not all(0 <= i < self.held_out for i in indices):
            raise IndexError(f"there are {self.held_out} held-out scenes; given indices up to {max(indices)}")
        return World(HELD_OUT, world.SHARES, self.style)


def _normalised(shares: Sequence[float] | None) -> tuple[float, ...]:
    """Non-negative shares of each kind of scene, scaled to sum to 1. ValueError otherwise."""
    if shares is None:
        return world.SHARES
    if len(shares) != len(world.KINDS) or min(shares) < 0 or not sum(shares) > 0:
        raise ValueError(
            f"data 'shapes': shares is {list(shares)}; expected {len(world.KINDS)} numbers from 0 with a positive sum, "
            f"of {', '.join(world.KINDS)}"
        )
    return tuple(share / sum(shares) for share in shares)


def _render(source: World, size: int, indices: Sequence[int], draw: int) -> tuple[NDArray[np.uint8], list[str]]:
    rows = world.scenes(source.seed, indices, source.shares)
    return world.render(rows, size), captions.prompts(rows, source.seed, indices, draw, source.style)
