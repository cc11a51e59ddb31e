"""`data: shapes`: the embedded world of `scenes` as a Lightning data module; nothing to download, nothing to store."""

from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from sana_lab.data import scenes as world
from sana_lab.parts import RUNTIME
from sana_lab.types import Batch

Split = Literal["train", "val"]
_HELD_OUT_SEED = -1  # no training seed is negative, so no training scene is ever a held-out one


class Shapes(L.LightningDataModule):
    """Flat shapes on grey with captions, at any size; an endless training stream and a fixed held-out set.

    Training batch s of rank r holds scenes (s * ranks + r) * batch + 0 ... batch - 1, so a resumed run goes on where it
    stopped. The held-out scenes are the same for every seed. Images are (B, 3, size, size) in [-1, 1].
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
        for name, value, least in (
            ("size", size, 8),
            ("batch", batch, 1),
            ("seed", seed, 0),
            ("held_out", held_out, 1),
            ("workers", workers, 0),
        ):
            if value < least:
                raise ValueError(f"data 'shapes': {name} is {value}; it must be at least {least}")
        self.size, self.batch, self.seed, self.held_out, self.workers = size, batch, seed, held_out, workers

    @property
    def len_val(self) -> int:
        """Number of held-out scenes."""
        return self.held_out

    def example(self, index: int, split: Split = "train", draw: int = 0) -> tuple[NDArray[np.uint8], str]:
        """Image (3, size, size) and the caption that (seed, index, draw) picks."""
        images, prompts = self._render([index], split, draw)
        return images[0], prompts[0]

    def batch_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> Batch:
        """The scenes with these indices, as training sees them."""
        images, prompts = self._render(indices, split, draw)
        return Batch(torch.from_numpy(images).float().mul_(2 / 255).sub_(1), prompts)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless batches, starting after those that the trainer has already used."""
        return _loader(_Stream(self._train_batch, self._done), self.workers)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The held-out scenes in order."""
        return _loader(_HeldOut(self), self.workers)

    def _render(self, indices: Sequence[int], split: Split, draw: int) -> tuple[NDArray[np.uint8], list[str]]:
        if split == "val" and not all(0 <= i < self.held_out for i in indices):
            raise IndexError(f"there are {self.held_out} held-out scenes; given indices up to {max(indices)}")
        seed = _HELD_OUT_SEED if split == "val" else self.seed
        rows = world.scenes(seed, indices)
        return world.draw(rows, self.size), world.prompts(rows, seed, indices, draw)

    def _train_batch(self, step: int, rank: int, ranks: int) -> Batch:
        first = (step * ranks + rank) * self.batch
        return self.batch_at(range(first, first + self.batch))

    def _done(self) -> tuple[int, int, int]:
        """Batches trained on so far, this rank and the number of ranks; batches, not optimiser steps."""
        if self.trainer is None:
            return 0, 0, 1
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.total
        processed: int = progress.processed  # type: ignore[attr-defined]  # annotated as its base class
        return processed, self.trainer.global_rank, self.trainer.world_size

    def __getstate__(self) -> dict[str, object]:
        """Without the trainer, so that a spawned worker gets plain data."""
        return {**self.__dict__, "trainer": None}


class _Stream(IterableDataset[Batch]):
    """Batches from `done()` on; worker w of n makes every n-th."""

    def __init__(self, make: Callable[[int, int, int], Batch], done: Callable[[], tuple[int, int, int]]) -> None:
        self.make, self.done = make, done

    def __iter__(self) -> Iterator[Batch]:
        step, rank, ranks = self.done()
        worker = get_worker_info()
        step, stride = (step, 1) if worker is None else (step + worker.id, worker.num_workers)
        while True:
            yield self.make(step, rank, ranks)
            step += stride

    def __getstate__(self) -> dict[str, object]:
        """What a spawned worker gets: where the stream stood when it was made."""
        return {"make": self.make, "done": _Fixed(self.done())}


class _Fixed:
    """A callable that gives what it was given."""

    def __init__(self, value: tuple[int, int, int]) -> None:
        self.value = value

    def __call__(self) -> tuple[int, int, int]:
        return self.value


class _HeldOut(Dataset[Batch]):
    """Batch i of the held-out scenes; a map-style set, so that Lightning shares it among ranks."""

    def __init__(self, module: Shapes) -> None:
        self.module = module

    def __len__(self) -> int:
        return -(-self.module.held_out // self.module.batch)

    def __getitem__(self, i: int) -> Batch:
        first = i * self.module.batch
        return self.module.batch_at(range(first, min(first + self.module.batch, self.module.held_out)), "val")


def _loader(dataset: Dataset[Batch], workers: int) -> DataLoader[Batch]:
    return DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=_same)


def _same(batch: Any) -> Any:
    return batch
