"""`data: shapes`: the embedded world of `scenes` as a Lightning data module; nothing to download, nothing to store."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Annotated, Literal

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray

from sana_lab.data import scenes as world
from sana_lab.data.stream import Endless, Finite
from sana_lab.parts import RUNTIME
from sana_lab.types import Batch

Split = Literal["train", "val"]
_HELD_OUT_SEED = -1  # no training seed is negative, so no training scene is ever a held-out one


class Shapes(L.LightningDataModule):
    """Flat shapes on grey with captions, at any size; an endless training stream and a fixed held-out set.

    Training batch n, counted over all ranks, holds scenes n * batch to (n + 1) * batch - 1, so that a resumed run goes
    on where it stopped. The held-out scenes are the same for every seed. Images are (B, 3, size, size) in [-1, 1].
    """

    def __init__(
        self,
        size: int = 64,
        batch: int = 64,
        seed: int = 0,
        held_out: int = 1000,
        workers: Annotated[int, RUNTIME] = 0,
    ) -> None:
        super().__init__()
        given = {"size": (size, 8), "batch": (batch, 1), "seed": (seed, 0), "held_out": (held_out, 1)}
        for name, (value, least) in (given | {"workers": (workers, 0)}).items():
            if value < least:
                raise ValueError(f"data 'shapes': {name} is {value}; it must be at least {least}")
        self.size, self.batch, self.seed, self.held_out, self.workers = size, batch, seed, held_out, workers

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
        images, prompts = _render(self._seed(split, [index]), self.size, [index], draw)
        return images[0], prompts[0]

    def batch_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> Batch:
        """The scenes with these indices, as training sees them. IndexError beyond the held-out set."""
        return _batch(self._seed(split, indices), self.size, indices, draw)

    def prompts_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> list[str]:
        """Their captions alone, without drawing them."""
        seed = self._seed(split, indices)
        return world.prompts(world.scenes(seed, indices), seed, indices, draw)

    def train_dataloader(self) -> Iterable[Batch]:
        """Endless batches, starting after those that the trainer has already used."""
        return Endless(partial(_numbered, self.seed, self.size, self.batch), self.trainer, self.workers)

    def val_dataloader(self) -> Iterable[Batch]:
        """The held-out scenes in order."""
        make = partial(_batch, _HELD_OUT_SEED, self.size)
        return Finite(make, self.held_out, self.batch, self.trainer, self.workers)

    def _seed(self, split: Split, indices: Sequence[int]) -> int:
        if split == "train":
            return self.seed
        if not all(0 <= i < self.held_out for i in indices):
            raise IndexError(f"there are {self.held_out} held-out scenes; given indices up to {max(indices)}")
        return _HELD_OUT_SEED


def _numbered(seed: int, size: int, batch: int, n: int) -> Batch:
    return _batch(seed, size, range(n * batch, (n + 1) * batch))


def _batch(seed: int, size: int, indices: Sequence[int], draw: int = 0) -> Batch:
    images, prompts = _render(seed, size, indices, draw)
    return Batch(torch.from_numpy(images).float().mul_(2 / 255).sub_(1), prompts)


def _render(seed: int, size: int, indices: Sequence[int], draw: int) -> tuple[NDArray[np.uint8], list[str]]:
    rows = world.scenes(seed, indices)
    return world.draw(rows, size), world.prompts(rows, seed, indices, draw)
