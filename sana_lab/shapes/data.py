"""`data: shapes`: the embedded world of `scenes` as a Lightning data module; nothing to download, nothing to store."""

import itertools
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sana_lab.config.specs import RUNTIME, AsBefore
from sana_lab.data import DataModule, Split, Turn
from sana_lab.shapes import scenes as world
from sana_lab.types import Batch


class World(NamedTuple):
    """Which scenes there are: the seed of their random numbers, and how often each kind comes."""

    seed: int
    shares: tuple[float, ...]


_HELD_OUT = World(-1, world.SHARES)  # no training seed is negative, so no training scene is ever a held-out one


class Shapes(DataModule):
    """Flat shapes on grey with captions, at any size, (B, 3, size, size) in [-1, 1]; nothing to download.

    Training batch n, counted over all ranks, holds scenes n * batch to (n + 1) * batch - 1. The held-out scenes are the
    same for every seed, and always have the default `shares`.
    """

    def __init__(
        self,
        size: int = 64,  # height and width, pixels, at least 8
        batch: int = 64,  # images in a batch, of one device
        seed: int = 0,  # of the training scenes
        held_out: int = 1000,  # scenes for validation
        # how often training scenes are of each of scenes.KINDS, in any unit; null is scenes.SHARES
        shares: Annotated[list[float] | None, AsBefore(None)] = None,
        workers: Annotated[int, RUNTIME] = 0,  # processes that render batches; 0 renders in the main process
    ) -> None:
        super().__init__(batch, seed, workers)
        self.size, self.held_out = size, held_out
        self.check_least(size=8, held_out=1)
        self.shares = _checked(shares)

    @property
    def len_train(self) -> None:
        """Scenes have no end."""

    def digest(self) -> str:
        """The world is its options: nothing else can change under them."""
        return "shapes"

    @property
    def len_val(self) -> int:
        """Number of held-out scenes."""
        return self.held_out

    def example(self, index: int, split: Split = "train", draw: int = 0) -> tuple[NDArray[np.uint8], str]:
        """Image (3, size, size) and the caption that (seed, index, draw) picks."""
        images, prompts = _render(self._world(split, [index]), self.size, [index], draw)
        return images[0], prompts[0]

    def batch_of(self, turns: Sequence[Turn], split: Split) -> Batch:
        """The scenes rendered, with captions. IndexError beyond the held-out set."""
        place = self._world(split, [i for i, _ in turns])
        parts = [
            _render(place, self.size, [i for i, _ in same], draw)
            for draw, same in itertools.groupby(turns, lambda turn: turn[1])
        ]
        images = torch.from_numpy(np.concatenate([images for images, _ in parts]))
        return Batch(images.float().mul_(2 / 255).sub_(1), [prompt for _, prompts in parts for prompt in prompts])

    def prompts_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> list[str]:
        """Their captions alone, without drawing them."""
        place = self._world(split, indices)
        return world.prompts(world.scenes(place.seed, indices, place.shares), place.seed, indices, draw)

    def _world(self, split: Split, indices: Sequence[int]) -> World:
        if split == "train":
            return World(self.seed, self.shares)
        if not all(0 <= i < self.held_out for i in indices):
            raise IndexError(f"there are {self.held_out} held-out scenes; given indices up to {max(indices)}")
        return _HELD_OUT


def _checked(shares: Sequence[float] | None) -> tuple[float, ...]:
    """One share for each kind of scene, none negative, scaled to sum to 1. ValueError otherwise."""
    if shares is None:
        return world.SHARES
    if len(shares) != len(world.KINDS) or min(shares) < 0 or not sum(shares) > 0:
        raise ValueError(
            f"data 'shapes': shares is {list(shares)}; expected {len(world.KINDS)} numbers from 0 with a positive sum, "
            f"of {', '.join(world.KINDS)}"
        )
    return tuple(share / sum(shares) for share in shares)


def _render(place: World, size: int, indices: Sequence[int], draw: int) -> tuple[NDArray[np.uint8], list[str]]:
    rows = world.scenes(place.seed, indices, place.shares)
    return world.draw(rows, size), world.prompts(rows, place.seed, indices, draw)
