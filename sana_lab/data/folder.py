"""`data: folder`: a folder of images with captions."""

import functools
import hashlib
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sana_lab.config.ranges import BatchSize, Pixels, Seed, ShareOrNumber, Workers
from sana_lab.config.specs import RUNTIME
from sana_lab.data import DataModule, Split, Turn, captions, splits
from sana_lab.data.captions import Entry
from sana_lab.data.files import listing
from sana_lab.data.images import Resize, UnreadableError, dimensions, fit, quiet, read
from sana_lab.data.stream import turn
from sana_lab.types import Batch


class Index(NamedTuple):
    """The files of a folder, split."""

    train: list[Entry]
    val: list[Entry]
    skipped: dict[str, str]  # name -> reason


class Folder(DataModule):
    """Images of any size and mode below `root`, as (B, 3, size, size) in [-1, 1], with one caption each.

    See `data.images` for conversion to RGB and `resize`, `data.captions` for the sources of captions. An unreadable
    file is reported by name, counted in `skipped` and replaced by the next; ValueError if none can be read.
    """

    def __init__(
        self,
        root: Annotated[str, RUNTIME],  # folder of images, at any depth
        manifest: Annotated[str | None, RUNTIME] = None,  # .jsonl or .csv of files and captions; null looks in the root
        caption: str | None = None,  # caption of images without one, "" for none; null is an error
        size: Pixels = 256,  # height and width, pixels
        batch: BatchSize = 16,  # images in a batch, which devices share
        # cover takes the largest square, crop one of `size` pixels unscaled, contain pads with white, stretch distorts
        resize: Resize = "cover",
        # place of the square of cover and crop; random differs in each epoch, in training only
        crop: Literal["center", "random"] = "center",
        flip: bool = False,  # mirror half of the training images; captions with left or right are not changed
        min_side: Pixels = 1,  # skip images whose shorter side has fewer pixels
        held_out: ShareOrNumber = 0.05,  # for validation: a share below 1.0, chosen by a hash of each name, or a number
        check: Literal["headers", "pixels"] = "headers",  # part of each file read at the start to find broken files
        seed: Seed = 0,  # seed of order, crops, flips and choice of captions
        workers: Annotated[Workers, RUNTIME] = 0,  # processes that load batches; 0 loads in the main process
    ) -> None:
        super().__init__(batch, seed, workers)
        self.root, self.manifest, self.caption, self.size = Path(root), manifest, caption, size
        self.resize, self.crop, self.flip, self.min_side = resize, crop, flip, min_side
        self.held_out, self.check = held_out, check
        self.check_least(size=1, held_out=0)
        splits.check_held_out(held_out, "data 'folder': ")

    def setup(self, stage: str | None = None) -> None:
        """Find the files and read their headers, once. ValueError if the folder or its captions cannot be used."""
        self.index  # noqa: B018

    @property
    def len_train(self) -> int:
        """Number of training images."""
        return len(self.index.train)

    @property
    def len_val(self) -> int:
        """Number of held-out images."""
        return len(self.index.val)

    @property
    def skipped(self) -> dict[str, str]:
        """Files skipped so far -> reason; each worker process counts undecodable files separately."""
        return self.index.skipped

    def check_content(self) -> None:
        """Read the headers and warn of what is left out, by name and number."""
        self.setup()

    def digest(self) -> str:
        """SHA-256 of names, captions, and each file's length, first and last 4 KiB."""
        digest = hashlib.sha256()
        for entry in self._contents.entries:
            digest.update(repr((entry, _fingerprint(self.root / entry.name))).encode())
        return digest.hexdigest()

    def example(self, index: int, split: Split = "train", draw: int = 0) -> tuple[NDArray[np.uint8], str]:
        """Image (3, size, size) and its caption on its `draw`-th turn; captions come in rotation."""
        entry, image = self._picture(split, index)
        view = self._view(image, index, draw) if split == "train" else fit(image, self.size, self.resize)
        return np.asarray(view).transpose(2, 0, 1), self._caption(entry, split, index, draw)

    def prompts_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> list[str]:
        """The captions of `batch_at`, without reading an image."""
        return [self._caption(self._entry(split, i), split, i, draw) for i in indices]

    def batch_of(self, turns: Sequence[Turn], split: Split) -> Batch:
        """Images read, cropped and flipped, with their captions."""
        images, prompts = zip(*(self.example(i, split, draw) for i, draw in turns), strict=True)
        return Batch(torch.from_numpy(np.stack(images)).float().mul_(2 / 255).sub_(1), list(prompts))

    def _view(self, image: Image.Image, index: int, draw: int) -> Image.Image:
        x, y, side = np.random.default_rng([self.seed, draw, index]).random(3)
        view = fit(image, self.size, self.resize, (x, y) if self.crop == "random" else (0.5, 0.5))
        return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip and side < 0.5 else view

    def _caption(self, entry: Entry, split: Split, index: int, draw: int) -> str:
        key = (self.seed, index) if split == "train" else ()
        return entry.captions[turn(len(entry.captions), draw, *key)]

    def _picture(self, split: Split, index: int) -> tuple[Entry, Image.Image]:
        while True:
            entry = self._entry(split, index)
            try:
                return entry, read(self.root / entry.name)
            except UnreadableError as error:
                self._skip(entry, error)

    def _entry(self, split: Split, index: int) -> Entry:
        """The entry with this index or, if skipped, the next; from the other split if this one has none left."""
        train, val, skipped = self.index
        own, other = (train, val) if split == "train" else (val, train)
        if not 0 <= index < len(own):
            raise IndexError(f"there are {len(own)} {split} pictures; given index {index}")
        for k in range(len(own) + len(other)):
            entry = own[(index + k) % len(own)] if k < len(own) else other[k - len(own)]
            if entry.name not in skipped:
                return entry
        raise ValueError(_none_left(self.root, skipped))

    def _skip(self, entry: Entry, error: Exception) -> None:
        self.skipped[entry.name] = str(error)
        total = len(self.index.train) + len(self.index.val) + len(self._contents.skipped)
        warnings.warn(
            f"data 'folder': {entry.name!r} cannot be read ({error}); the next picture takes its place "
            f"({len(self.skipped)} of {total} skipped so far)",
            stacklevel=2,
        )

    @functools.cached_property
    def _contents(self) -> captions.Contents:
        return captions.contents(self.root, self.manifest, self.caption)

    @functools.cached_property
    def index(self) -> Index:
        """The usable files, split, and the others."""
        entries, skipped, dropped, _ = self._contents
        with quiet(), ThreadPoolExecutor(8) as pool:
            faults = list(pool.map(self._fault, entries))
        skipped = skipped | {e.name: fault for e, fault in zip(entries, faults, strict=True) if fault}
        good = [e for e in entries if e.name not in skipped]
        if not good:
            raise ValueError(_none_left(self.root, skipped))
        captions.report(captions.Contents(good, skipped, dropped))
        return Index(*_split(good, self.held_out), skipped)

    def _fault(self, entry: Entry) -> str | None:
        """Reason for skipping this file; None if it can be used."""
        path = self.root / entry.name
        try:
            width, height = dimensions(path) if self.check == "headers" else read(path).size
        except UnreadableError as error:
            return str(error)
        small = min(width, height) < self.min_side
        return f"{width}x{height} is smaller than min_side {self.min_side}" if small else None


def _split(entries: list[Entry], held_out: int | float) -> tuple[list[Entry], list[Entry]]:
    """(training, held-out), each sorted by name."""
    try:
        shares = splits.shares(e.group or e.name for e in entries)
        mask = splits.held_out(shares, splits.codes(entries), held_out, lambda i: entries[i].name)
    except ValueError as error:
        raise ValueError(f"data 'folder': {error}") from error
    return [e for e, out in zip(entries, mask, strict=True) if not out], [
        e for e, out in zip(entries, mask, strict=True) if out
    ]


def _fingerprint(path: Path) -> tuple[int, bytes]:
    """Length and a hash of both ends: shows that a file was replaced, without reading all of it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            ends = file.read(4096)
            file.seek(max(0, size - 4096))
            ends += file.read(4096)
    except OSError:  # `skipped` says so
        return 0, b""
    return size, hashlib.sha256(ends).digest()


def _none_left(root: Path, skipped: dict[str, str]) -> str:
    return f"data 'folder': none of the {len(skipped)} images in {str(root)!r} can be used: {listing(skipped)}"
