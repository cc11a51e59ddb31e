"""The interface of a data set: images or latents with captions, an endless training stream and held-out items."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import lightning as L

from sana_lab.data.stream import Endless, Finite, Order
from sana_lab.types import WHOLE, Batch, Part

Split = Literal["train", "val"]

Turn = tuple[int, int]
"""(index of an item, number of earlier uses): the second selects its caption, crop and flip."""


class DataModule(L.LightningDataModule, ABC):
    """`Batch`es of a data set. A subclass sets `size` and implements `len_train`, `len_val`, `digest` and `batch_of`.

    Training batch n is a function of (seed, n), so that a resumed run continues exactly. Each epoch is a new
    permutation; if `len_train` is None, items are consecutive without end. Ranks train on equal parts of each batch.
    """

    size: int
    """Height and width in pixels of the images, or of the images behind latents."""

    gives_images: bool = True
    """Whether its batches hold images."""

    def __init__(self, batch: int, seed: int, workers: int) -> None:
        super().__init__()
        self.batch, self.seed, self.workers = batch, seed, workers
        self.check_least(batch=1, seed=0, workers=0)

    @property
    def shapes(self) -> Sequence[tuple[int, int]]:
        """Height and width in pixels of images of batches in aspect-ratio buckets; () if all are squares of `size`."""
        return ()

    @property
    @abstractmethod
    def len_train(self) -> int | None:
        """Number of training items; None is endless."""

    @property
    @abstractmethod
    def len_val(self) -> int:
        """Number of held-out items, which are the same for every seed; 0 is none."""

    @abstractmethod
    def digest(self) -> str:
        """Hash of the content, which enters the hash of every model trained on it: another digest, another model."""

    @abstractmethod
    def batch_of(self, turns: Sequence[Turn], split: Split) -> Batch:
        """The batch of these items. IndexError beyond the end."""

    def check_content(self) -> None:
        """Warn of files that are left out, before any work. ValueError if none can be used."""

    def bytes_to_write(self) -> dict[Path, int]:
        """Bytes that encoding has yet to write, by folder, at least; none of data that are not encoded. ValueError."""
        return {}

    def batch_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> Batch:
        """The items with these indices, each on its `draw`-th turn."""
        return self.batch_of([(i, draw) for i in indices], split)

    def prompts_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> list[str]:
        """The captions of `batch_at`; override if they are available without the images."""
        return self.batch_at(indices, split, draw).prompts

    def train_batch(self, number: int, part: Part = WHOLE) -> Batch:
        """Training batch `number`, or a rank's part of it."""
        positions = part.of(range(number * self.batch, (number + 1) * self.batch))
        return self.batch_of([(p, 0) for p in positions] if self._order is None else self._order.at(positions), "train")

    def train_dataloader(self) -> Endless:
        """Endless batches, starting after those that the trainer has processed."""
        make = functools.partial(self.train_batch, part=Part.of_trainer(self.trainer))
        return Endless(make, self.trainer, self.workers)

    def val_dataloader(self) -> Finite | list[Finite]:
        """The held-out items in order, each on its first turn."""
        return Finite(self._val_batch, self.len_val, self.batch, self.trainer, self.workers) if self.len_val else []

    def check_least(self, **least: int) -> None:
        """ValueError if an option of that name is below the given minimum; None is allowed."""
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                kind = type(self).__name__.lower()
                raise ValueError(f"data {kind!r}: {name} is {value}; it must be at least {minimum}")

    def _val_batch(self, rows: range) -> Batch:
        return self.batch_at(rows, "val")

    @functools.cached_property
    def _order(self) -> Order | None:
        return None if self.len_train is None else Order(self.len_train, self.seed)

    def __getstate__(self) -> dict[str, object]:
        """Without the trainer, so that a worker process gets plain data."""
        return {**self.__dict__, "trainer": None}
