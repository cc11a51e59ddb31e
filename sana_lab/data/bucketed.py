"""Base of the data sets with an index on the disk: items in aspect-ratio buckets, one shape in each batch."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sana_lab.config.specs import SpecError
from sana_lab.data import DataModule, Split, Turn
from sana_lab.data.bucket_order import BucketOrder
from sana_lab.data.buckets import Shape
from sana_lab.data.caption_choice import CaptionChoice, choose
from sana_lab.data.disk_columns import Table
from sana_lab.data.stream import Finite
from sana_lab.types import WHOLE, Batch, Part


class Rows(NamedTuple):
    """Rows of the index by bucket: those of bucket k are `rows[ends[k - 1]:ends[k]]`."""

    rows: NDArray[np.int32]
    ends: NDArray[np.int64]

    @classmethod
    def sorted(cls, rows: NDArray[np.integer], buckets: NDArray[np.uint8], count: int) -> "Rows":
        """These rows, of these buckets, in order of bucket."""
        order = np.argsort(buckets, kind="stable")
        return cls(rows[order].astype(np.int32), np.cumsum(np.bincount(buckets, minlength=count)))

    @property
    def counts(self) -> NDArray[np.int64]:
        """Rows in each bucket."""
        return np.diff(self.ends, prepend=0)


class Bucketed(DataModule):
    """Training batch n has items of one bucket (`data.bucket_order`); held-out batches too, bucket by bucket.

    A subclass implements `table`, `shapes`, `selection` and `make`.
    """

    choice: CaptionChoice

    @property
    @abstractmethod
    def table(self) -> Table:
        """The index."""

    @property
    @abstractmethod
    def shapes(self) -> list[Shape]:
        """The image shape of each bucket."""

    @abstractmethod
    def selection(self, split: Split) -> Rows:
        """The rows of a split."""

    @abstractmethod
    def make(
        self,
        rows: NDArray[np.integer],
        turns: NDArray[np.integer],
        split: Split,
        captions: NDArray,
        shape: Shape | None,
    ) -> Batch:
        """The batch of these rows of the index, with these captions (rows of the column of captions). `shape` is the
        bucket's, None for items of any buckets."""

    def check_scores(self) -> None:
        """SpecError for a choice by scores, or a threshold, of captions that have none."""
        if self.table.meta["scores"]:
            return
        if self.choice.rule in ("softmax", "power"):
            raise SpecError(
                f"choice.rule is {self.choice.rule!r}, and no caption has a score; expected `rotation` or `uniform`, "
                "or a column `clip_scores`"
            )
        if self.choice.min_score:
            raise SpecError(
                f"choice.min_score is {self.choice.min_score:g}, and no caption has a score; expected 0, or a column "
                "`clip_scores`"
            )

    @property
    def len_train(self) -> int:
        """Number of training items."""
        return len(self.selection("train").rows)

    @property
    def len_val(self) -> int:
        """Number of held-out items."""
        return len(self.selection("val").rows)

    @cached_property
    def order(self) -> BucketOrder:
        """The order of training."""
        return BucketOrder(self.selection("train").counts.tolist(), self.batch, self.seed)

    def train_batch(self, number: int, part: Part = WHOLE) -> Batch:
        """Training batch `number`, or a rank's part of it: every rank has the same bucket."""
        items, selected = self.order.at(number), self.selection("train")
        mine = list(part.of(range(self.batch)))
        first = selected.ends[items.bucket] - selected.counts[items.bucket]
        rows = selected.rows[first + items.items[mine]]
        return self._chosen(rows, items.epochs[mine], "train", self.shapes[items.bucket])

    def val_dataloader(self) -> Finite | list[Finite]:
        """The held-out items, bucket by bucket, each on its first turn."""
        selected = self.selection("val")
        begins = selected.ends - selected.counts
        parts = [
            range(first, min(first + self.batch, int(end)))
            for begin, end in zip(begins, selected.ends, strict=True)
            for first in range(int(begin), int(end), self.batch)
        ]
        return Finite(self._val_batch, 0, self.batch, self.trainer, self.workers, parts) if parts else []

    def _val_batch(self, rows: range) -> Batch:
        selected = self.selection("val")
        bucket = int(np.searchsorted(selected.ends, rows.start, side="right"))
        index = selected.rows[rows.start : rows.stop]
        return self._chosen(index, np.zeros(len(index), np.int64), "val", self.shapes[bucket])

    def batch_of(self, turns: Sequence[Turn], split: Split) -> Batch:
        """The batch of these items, of any buckets."""
        rows, uses = self._rows_of(turns, split)
        return self._chosen(rows, uses, split, None)

    def prompts_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> list[str]:
        """The captions of `batch_at`."""
        rows, uses = self._rows_of([(i, draw) for i in indices], split)
        return self.texts(self.captions_of(rows, uses, split))

    def texts(self, captions: NDArray[np.integer]) -> list[str]:
        """The texts of these captions."""
        return [self.table.text("caption", int(row)) for row in captions]

    def captions_of(self, rows: NDArray[np.integer], uses: NDArray[np.integer], split: Split) -> NDArray[np.int64]:
        """The caption of each row on its turn; held-out rows have captions of the seed 0."""
        ends = self.table["row_captions_end"]
        first = np.where(rows > 0, ends[np.maximum(rows, 1) - 1], 0)
        counts = ends[rows] - first
        at = first[:, None] + np.arange(counts.max())
        scores = self.table["score"][np.minimum(at, len(self.table["score"]) - 1)]
        seed = self.seed if split == "train" else 0
        return first + choose(scores, counts, rows, uses, self.choice, seed)

    def _chosen(self, rows: NDArray, uses: NDArray, split: Split, shape: Shape | None) -> Batch:
        return self.make(rows, uses, split, self.captions_of(rows, uses, split), shape)

    def _rows_of(self, turns: Sequence[Turn], split: Split) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        selected, given = self.selection(split).rows, np.asarray(turns, np.int64).reshape(-1, 2)
        if len(given) and not 0 <= given[:, 0].min() <= given[:, 0].max() < len(selected):
            raise IndexError(f"there are {len(selected)} {split} pictures; given index {given[:, 0].max()}")
        return selected[given[:, 0]], given[:, 1]
