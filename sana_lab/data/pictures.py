"""`data: pictures`: millions of pictures with captions, in a folder, tars or tables, through an index on the disk."""

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sana_lab.config import specs
from sana_lab.config.atomic_write import write_text
from sana_lab.config.ranges import BatchSize, Pixels, Seed, Share, ShareOrNumber, Workers
from sana_lab.config.specs import RUNTIME, Spec
from sana_lab.data import Split, buckets, disk_columns, images, picture_index, splits
from sana_lab.data.bucketed import Bucketed, Rows
from sana_lab.data.buckets import Buckets, Shape
from sana_lab.data.caption_choice import CaptionChoice
from sana_lab.data.files import times
from sana_lab.data.images import Blob, UnreadableError
from sana_lab.data.layouts import Layout, Place, detect
from sana_lab.data.random_numbers import uniform
from sana_lab.types import Batch, Json


class Pictures(Bucketed):
    """Pictures of any size and mode below `root`, cropped to the shape of their bucket, in [-1, 1], with a caption.

    An index in `index` is written once for each content of the root; without the root, that of its last content is
    used. Items with batches of any buckets (`batch_at`) are squares of `size`.
    """

    def __init__(
        self,
        root: Annotated[str, RUNTIME],  # folder of pictures, tars or tables; or one manifest, tar or table
        # how the pictures lie there: folder, tars, tables, mjhq or pd12m with options; null finds out
        layout: Annotated[Spec | None, "layout"] = None,
        size: Pixels = 256,  # side of the square shape, pixels; other buckets have about as many
        buckets: Buckets = "none",  # none crops squares, sana has SANA's 40 shapes from 1:4 to 4:1
        multiple: Pixels = 32,  # sides of buckets are multiples of it, such as the autoencoder's factor x patch
        batch: BatchSize = 16,  # pictures in a batch, which devices share
        crop: Literal["center", "random"] = "center",  # place of the crop; random differs in each epoch, in training
        flip: bool = False,  # mirror half of the training pictures; captions with left or right are not changed
        min_side: Pixels = 1,  # leave out pictures whose shorter side has fewer pixels
        # for validation, of pictures without a split in the manifest: a share below 1.0 by a hash of group or name, or
        # a number
        held_out: ShareOrNumber = 0.01,
        unreadable: Annotated[Share, RUNTIME] = 0.01,  # largest share of pictures that may be left out as unusable
        # which of several captions: a mapping of `rule` (rotation, uniform, softmax or power), `temperature` and
        # `min_score`, the lowest CLIP score
        choice: CaptionChoice = CaptionChoice(),  # noqa: B008
        seed: Seed = 0,  # seed of order, crops, flips and choice of captions
        index: Annotated[str | None, RUNTIME] = None,  # folder of indexes; null is runs/index
        workers: Annotated[Workers, RUNTIME] = 0,  # processes that load batches; 0 loads in the main process
    ) -> None:
        super().__init__(batch, seed, workers)
        self.root, self.layout_spec, self.size, self.buckets, self.multiple = (
            Path(root),
            layout,
            size,
            buckets,
            multiple,
        )
        self.crop, self.flip, self.min_side, self.held_out = crop, flip, min_side, held_out
        self.unreadable, self.index = unreadable, Path(index) if index else Path("runs", "index")
        self.choice = CaptionChoice(**choice) if isinstance(choice, dict) else choice
        self.faults: dict[int, str] = {}  # rows that could not be read in this process -> reason
        self.check_least(size=1, held_out=0, multiple=1)
        splits.check_held_out(held_out, "data 'pictures': ")
        self.shapes  # noqa: B018

    @cached_property
    def shapes(self) -> list[Shape]:
        """The image shape of each bucket."""
        if self.buckets == "none":
            return [Shape(self.size, self.size)]
        return buckets.shapes(self.size, self.multiple)

    def setup(self, stage: str | None = None) -> None:
        """Open or write the index. ValueError for a root or a choice of captions that cannot be used."""
        self.check_scores()
        self.rows  # noqa: B018

    def check_content(self) -> None:
        """Open or write the index, and warn of what is left out."""
        picture_index.check_share(self.table, self.unreadable)

    def check_root(self) -> None:
        """Open the reader of the root. SpecError if it is missing, ValueError if it is empty; an index may be there
        without it."""
        detect.check(self.root)
        self.layout  # noqa: B018

    def digest(self) -> str:
        """SHA-256 of names, captions, sizes, and each file's length and both ends."""
        return str(self.table.meta["digest"])

    def make(
        self,
        rows: NDArray[np.integer],
        turns: NDArray[np.integer],
        split: Split,
        captions: NDArray,
        shape: Shape | None,
    ) -> Batch:
        """Images read, cropped and flipped, with their captions."""
        views = [self.readable(int(row), int(turn), split, shape) for row, turn in zip(rows, turns, strict=True)]
        used = np.array([row for row, _ in views])
        if (used != rows).any():
            captions = self.captions_of(used, turns, split)
        pixels = torch.from_numpy(np.stack([view for _, view in views]))
        return Batch(pixels.float().mul_(2 / 255).sub_(1), self.texts(captions))

    def readable(
        self, row: int, turn: int, split: Split, shape: Shape | None, among: Rows | None = None
    ) -> tuple[int, NDArray[np.uint8]]:
        """A row and its view; instead of one that cannot be read, the next of its bucket, or of the other buckets if it
        has none, `among` the usable rows of the split. ValueError if none can be read, or too many cannot."""
        for candidate in itertools.chain([row], self._others(row, among or self.selection(split))):
            try:
                return candidate, self.view(candidate, turn, split, shape)
            except (UnreadableError, OSError, ValueError) as error:
                self._count(candidate, error)
        raise ValueError(f"data 'pictures': no picture of {split} in {str(self.root)!r} can be read")

    def _others(self, row: int, among: Rows) -> Iterator[int]:
        bucket = int(self.buckets_of[row])
        begin, end = int(among.ends[bucket] - among.counts[bucket]), int(among.ends[bucket])
        at = begin + int(np.searchsorted(among.rows[begin:end], row))
        inside, outside = (range(at + 1, end), range(begin, at)), (range(end, len(among.rows)), range(begin))
        return (int(among.rows[place]) for place in itertools.chain(*inside, *outside))

    def _count(self, row: int, error: Exception) -> None:
        """Report a picture that broke after the index was written. ValueError if they are too many."""
        if row not in self.faults:
            self.faults[row] = str(error)
            rows = self.table.meta["rows"]
            text = (
                f"data 'pictures': {self.name_of(row)!r} cannot be read ({error}); {len(self.faults)} of {rows} so far"
            )
            if len(self.faults) > self.unreadable * rows:
                raise ValueError(f"{text}; at most a share `unreadable` of {self.unreadable:g} may be") from error
            print(f"{text}; the next picture takes its place", file=sys.stderr)

    def view(self, row: int, turn: int, split: Split, shape: Shape | None) -> NDArray[np.uint8]:
        """A picture (3, h, w) as training sees it on a turn. UnreadableError, OSError, ValueError."""
        height, width = shape or (self.size, self.size)
        x, y, side = uniform(self.seed, row, turn, np.arange(3)) if split == "train" else (0.5, 0.5, 1.0)
        at = (float(x), float(y)) if self.crop == "random" else (0.5, 0.5)
        image = images.cover(self.picture(row), height, width, at)
        flipped = self.flip and side < 0.5
        return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else image).transpose(2, 0, 1)

    def picture(self, row: int) -> Image.Image:
        """A picture, upright, in RGB. UnreadableError, OSError, ValueError."""
        place = Place(*(int(self.table[column][row]) for column in ("file", "offset", "length")))
        return images.read(Blob(self.layout.read(self.name_of(row), place)))

    def name_of(self, row: int) -> str:
        """The name of a picture."""
        return self.table.text("name", row)

    @cached_property
    def buckets_of(self) -> NDArray[np.uint8]:
        """The bucket of each row of the index."""
        return buckets.nearest(self.shapes, self.table["height"], self.table["width"])

    def selection(self, split: Split) -> Rows:
        """The rows of a split."""
        return self.rows[split]

    @cached_property
    def rows(self) -> dict[Split, Rows]:
        """The rows of both splits, by bucket."""
        table = self.table
        kept = np.arange(table.meta["rows"], dtype=np.int32)
        if self.min_side > 1:
            kept = kept[np.minimum(table["height"], table["width"]) >= self.min_side]
        if not len(kept):
            raise ValueError(f"data 'pictures': all pictures in {str(self.root)!r} are below min_side {self.min_side}")
        shares, codes = table["share"][kept], table["split"][kept]
        try:
            name, groups = (lambda i: self.name_of(int(kept[i]))), table.meta["groups"]
            mask = splits.held_out(shares, codes, self.held_out, name, groups)
        except ValueError as error:
            raise ValueError(f"data 'pictures': {error}") from error
        chosen: dict[Split, NDArray[np.int32]] = {"train": kept[~mask], "val": kept[mask]}
        return {s: Rows.sorted(r, self.buckets_of[r], len(self.shapes)) for s, r in chosen.items()}

    @cached_property
    def layout(self) -> Layout:
        """The reader of the root."""
        resolved = specs.resolve("layout", self._layout_name)
        options = {key: value for key, value in resolved.items() if key != "name"}
        layout: Layout = specs.find("layout", resolved["name"])(self.root, **options)
        return layout

    @cached_property
    def table(self) -> disk_columns.Table:
        """The index, of the root's present content; of its last one, if the root is missing."""
        last, exists = self._last, self.root.exists()
        if self._unchanged or (last and not exists):
            table = disk_columns.Table(self.index / last["index"])
            if exists:
                picture_index.check_share(table, self.unreadable)
            return table
        folder = _key(self.layout.fingerprint(), specs.canonical("layout", self._layout_name), picture_index.VERSION)
        table = picture_index.build(self.layout, self.index / folder, self.unreadable)
        state = {"times": self.layout.times, "layout": self._layout_name, "version": picture_index.VERSION}
        many = table.meta["rows"] >= picture_index.MANY
        about = {"root": str(self.root.absolute()), "index": folder, **(state if many else {})}
        write_text(self._pointer, json.dumps(about))
        return table

    @property
    def _pointer(self) -> Path:
        return self.index / f"{_key(str(self.root.absolute()), self.layout_spec)}.json"

    @cached_property
    def _last(self) -> Json:
        """What is known of the last content of the root; empty if nothing is."""
        last: Json = json.loads(self._pointer.read_text("utf-8")) if self._pointer.is_file() else {}
        return last

    @cached_property
    def _unchanged(self) -> bool:
        """Whether no folder of a large root, nor its manifest, has changed since."""
        last = self._last
        if last.get("version") != picture_index.VERSION or not disk_columns.is_table(self.index / last["index"]):
            return False
        return bool(last["times"]) and all(times(path) == known for path, known in last["times"].items())

    @cached_property
    def _layout_name(self) -> Spec:
        if self.layout_spec is None and self._unchanged:
            return str(self._last["layout"])
        return self.layout_spec or detect.layout_of(self.root)


def _key(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
