"""Order of items in buckets: each batch has items of one bucket, and is a function of (seed, batch number)."""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sana_lab.data.random_numbers import permuted


class Items(NamedTuple):
    """The items of a batch."""

    bucket: int
    items: NDArray[np.int64]  # index within the bucket
    epochs: NDArray[np.int64]  # number of earlier uses of each


class BucketOrder:
    """An endless order of batches of `batch` items from buckets with so many items each.

    The items of a bucket form an endless sequence, a permutation by (seed, epoch, bucket) after the other, that is cut
    into batches. So no item is dropped and none is repeated within an epoch. A batch belongs to the epoch in which its
    last item lies; the batches of an epoch are shuffled by (seed, epoch). Nothing is kept in memory.
    """

    def __init__(self, counts: Sequence[int], batch: int, seed: int) -> None:
        self.counts, self.batch, self.seed = np.asarray(counts, np.int64), batch, seed
        if not self.counts.sum():
            raise ValueError("there are no items to order")

    def at(self, number: int) -> Items:
        """The items of batch `number`."""
        epoch = self.epoch_of(number)
        before, after = epoch * self.counts // self.batch, (epoch + 1) * self.counts // self.batch
        ends = np.cumsum(after - before)
        place = int(permuted(number - self._batches_before(epoch), int(ends[-1]), self.seed, epoch))
        bucket = int(np.searchsorted(ends, place, side="right"))
        first = int(after[bucket] - (ends[bucket] - place)) * self.batch
        epochs, places = np.divmod(np.arange(first, first + self.batch), self.counts[bucket])
        return Items(bucket, self._permuted(bucket, epochs, places), epochs)

    def epoch_of(self, number: int) -> int:
        """The epoch that a batch belongs to."""
        bound = 2 + (number + len(self.counts)) * self.batch // int(self.counts.sum())
        return bisect.bisect_right(range(bound), number, key=self._batches_before) - 1

    def _batches_before(self, epoch: int) -> int:
        return int((epoch * self.counts // self.batch).sum())

    def _permuted(self, bucket: int, epochs: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
        items = np.empty_like(places)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            items[inside] = permuted(places[inside], int(self.counts[bucket]), self.seed, int(epoch), 1 + bucket)
        return items
