"""Order and loading of batches: the items of a step are a pure function of (seed, step)."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from sana_lab.types import Batch


class Order:
    """A permutation of `items` items for each epoch, by (seed, epoch); positions count through all epochs."""

    def __init__(self, items: int, seed: int) -> None:
        self.items, self.seed = items, seed
        self._epoch = -1
        self._permutation: NDArray[np.int64] = np.empty(0, np.int64)

    def at(self, positions: Iterable[int]) -> list[tuple[int, int]]:
        """(item, epoch) at each position."""
        return [(int(self._of(p // self.items)[p % self.items]), p // self.items) for p in positions]

    def _of(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.items)
            self._epoch = epoch
        return self._permutation


def turn(choices: int, draw: int, *key: int) -> int:
    """Index below `choices` for an item's draw-th turn: in rotation, from a start that is a hash of `key`."""
    start = int(np.random.default_rng(key).integers(choices)) if key else 0
    return (start + draw) % choices


class Endless:
    """Endless training batches `make(0), make(1), ...`, starting at the trainer's position.

    Checkpoints store the number of processed batches, independently of accumulation and number of optimisers, so that
    a resumed run continues exactly.
    """

    def __init__(self, make: Callable[[int], Batch], trainer: L.Trainer | None, workers: int = 0) -> None:
        self.make, self.trainer, self.workers = make, trainer, workers

    def __iter__(self) -> Iterator[Batch]:
        numbers = range(_processed(self.trainer), sys.maxsize)
        return _deliver(self.make, numbers, self.workers, _pinned(self.trainer))


class Finite:
    """Held-out batches: `make(rows)` over `items` items in order, `batch` at a time; every rank takes them all.

    With `parts`, the batches are these ranges of rows.
    """

    def __init__(
        self,
        make: Callable[[range], Batch],
        items: int,
        batch: int,
        trainer: L.Trainer | None = None,
        workers: int = 0,
        parts: Sequence[range] | None = None,
    ) -> None:
        self.make, self.trainer, self.workers = make, trainer, workers
        whole = [range(first, min(first + batch, items)) for first in range(0, items, batch)]
        self.parts = whole if parts is None else parts

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Batch]:
        rows = _Rows(self.make, self.parts)
        return _deliver(rows, range(len(self.parts)), self.workers, _pinned(self.trainer))


class _Rows:
    """The batch of a number; a class, so that it can be pickled for a worker process."""

    def __init__(self, make: Callable[[range], Batch], parts: Sequence[range]) -> None:
        self.make, self.parts = make, parts

    def __call__(self, number: int) -> Batch:
        return self.make(self.parts[number])


class _Numbered(IterableDataset[Batch]):
    """`make(n)` for each n of `numbers`; worker w of W computes every W-th, and the loader keeps their order."""

    def __init__(self, make: Callable[[int], Batch], numbers: range) -> None:
        self.make, self.numbers = make, numbers

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        mine = self.numbers if worker is None else self.numbers[worker.id :: worker.num_workers]
        return map(self.make, mine)


def _deliver(make: Callable[[int], Batch], numbers: range, workers: int, pinned: bool) -> Iterator[Batch]:
    data = _Numbered(make, numbers)
    return iter(DataLoader(data, batch_size=None, num_workers=workers, collate_fn=_same, pin_memory=pinned))


def _pinned(trainer: L.Trainer | None) -> bool:
    """Whether batches go to a CUDA device: the host does not wait for copies from pinned memory."""
    return trainer is not None and trainer.strategy.root_device.type == "cuda"


def _processed(trainer: L.Trainer | None) -> int:
    if trainer is None:
        return 0
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return int(progress.processed)


def _same(batch: Any) -> Any:
    return batch
