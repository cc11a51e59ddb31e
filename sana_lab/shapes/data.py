"""`data: shapes`: the embedded world of `scenes` as a Lightning data module; nothing to download, nothing to store."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Annotated, Literal, NamedTuple

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray

from sana_lab.config.specs import RUNTIME, AsBefore
from sana_lab.data.stream import Endless, Finite
from sana_lab.shapes import scenes as world
from sana_lab.types import Batch

Split = Literal["train", "val"]


class World(NamedTuple):
    """Which scenes there are: the seed of their random numbers, and how often each kind comes."""

    seed: int
    shares: tuple[float, ...]


_HELD_OUT = World(-1, world.SHARES)  # no training seed is negative, so no training scene is ever a held-out one


class Shapes(L.LightningDataModule):
    """Flat shapes on grey with captions, at any size; an endless training stream and a fixed held-out set.

    Training batch n, counted over all ranks, holds scenes n * batch to (n + 1) * batch - 1, so that a resumed run goes
    on where it stopped. The held-out scenes are the same for every seed. Images are (B, 3, size, size) in [-1, 1].
    `shares` says how often training scenes are of each of `scenes.KINDS` (None: `scenes.SHARES`), which the held-out
    ones always are.
    """

    def __init__(
        self,
        size: int = 64,
        batch: int = 64,
        seed: int = 0,
        held_out: int = 1000,
        shares: Annotated[list[float] | None, AsBefore(None)] = None,
        workers: Annotated[int, RUNTIME] = 0,
    ) -> None:
        super().__init__()
        given = {"size": (size, 8), "batch": (batch, 1), "seed": (seed, 0), "held_out": (held_out, 1)}
        for name, (value, least) in (given | {"workers": (workers, 0)}).items():
            if value < least:
                raise ValueError(f"data 'shapes': {name} is {value}; it must be at least {least}")
        self.size, self.batch, self.seed, self.held_out, self.workers = size, batch, seed, held_out, workers
        self.shares = _checked(shares)

    @property
    def len_train(self) -> None:
        """The world has no end."""

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

    def batch_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> Batch:
        """The scenes with these indices, as training sees them. IndexError beyond the held-out set."""
        return _batch(self._world(split, indices), self.size, indices, draw)

    def prompts_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> list[str]:
        """Their captions alone, without drawing them."""
        place = self._world(split, indices)
        return world.prompts(world.scenes(place.seed, indices, place.shares), place.seed, indices, draw)

    def train_dataloader(self) -> Iterable[Batch]:
        """Endless batches, starting after those that the trainer has already used."""
        make = partial(_numbered, World(self.seed, self.shares), self.size, self.batch)
        return Endless(make, self.trainer, self.workers)

    def val_dataloader(self) -> Iterable[Batch]:
        """The held-out scenes in order."""
        make = partial(_batch, _HELD_OUT, self.size)
        return Finite(make, self.held_out, self.batch, self.trainer, self.workers)

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


def _numbered(place: World, size: int, batch: int, n: int) -> Batch:
    return _batch(place, size, range(n * batch, (n + 1) * batch))


def _batch(place: World, size: int, indices: Sequence[int], draw: int = 0) -> Batch:
    images, prompts = _render(place, size, indices, draw)
    return Batch(torch.from_numpy(images).float().mul_(2 / 255).sub_(1), prompts)


def _render(place: World, size: int, indices: Sequence[int], draw: int) -> tuple[NDArray[np.uint8], list[str]]:
    rows = world.scenes(place.seed, indices, place.shares)
    return world.draw(rows, size), world.prompts(rows, place.seed, indices, draw)
