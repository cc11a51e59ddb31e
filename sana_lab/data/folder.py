"""`data: folder`: your own pictures with captions, as a Lightning data module."""

import functools
import hashlib
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sana_lab.config.specs import RUNTIME
from sana_lab.data import captions
from sana_lab.data.captions import Entry
from sana_lab.data.images import Resize, UnreadableError, dimensions, fit, read
from sana_lab.data.stream import Endless, Finite, Order, turn
from sana_lab.types import Batch

Split = Literal["train", "val"]


class Index(NamedTuple):
    """What a scan found."""

    train: list[Entry]
    val: list[Entry]
    skipped: dict[str, str]  # name -> why


class Folder(L.LightningDataModule):
    """Pictures of any size and mode below `root`, as (B, 3, size, size) in [-1, 1], with one caption each.

    `pictures` states how a file becomes RGB and how `resize` works, `captions` where captions come from (`caption` is
    for pictures that have none). `crop: random` and `flip` vary with the epoch, in training only; a flip turns left
    into right but not in the caption. A file that cannot be read is reported by name, counted in `skipped`, and the
    next one takes its place; ValueError if none can. `check: pixels` decodes every file at the start, `headers` trusts
    the rest until its turn. `min_side` leaves out pictures whose shorter side is smaller.

    `held_out` is a share, drawn by a hash of each name so that new files move no others (where there are two pictures,
    one at least is held out and one trains), or a number of pictures. Training batch s is a function of (seed, s).
    """

    def __init__(
        self,
        root: Annotated[str, RUNTIME],
        manifest: Annotated[str | None, RUNTIME] = None,
        caption: str | None = None,
        size: int = 256,
        batch: int = 16,
        resize: Resize = "cover",
        crop: Literal["center", "random"] = "center",
        flip: bool = False,
        min_side: int = 1,
        held_out: int | float = 0.05,
        check: Literal["headers", "pixels"] = "headers",
        seed: int = 0,
        workers: Annotated[int, RUNTIME] = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("size", size, 1),
            ("batch", batch, 1),
            ("held_out", held_out, 0),
            ("seed", seed, 0),
            ("workers", workers, 0),
        ):
            if value < least:
                raise ValueError(f"data 'folder': {name} is {value}; it must be at least {least}")
        if isinstance(held_out, float) and held_out >= 1:
            raise ValueError(
                f"data 'folder': held_out is {held_out}; expected a share below 1.0 or a number of pictures"
            )
        self.root, self.manifest, self.caption, self.size, self.batch = Path(root), manifest, caption, size, batch
        self.resize, self.crop, self.flip, self.min_side = resize, crop, flip, min_side
        self.held_out, self.check, self.seed, self.workers = held_out, check, seed, workers

    def setup(self, stage: str | None = None) -> None:
        """Find the files and read their headers, once. ValueError where the folder or its captions are not usable."""
        self.index  # noqa: B018

    @property
    def len_train(self) -> int:
        """Number of training pictures."""
        return len(self.index.train)

    @property
    def len_val(self) -> int:
        """Number of held-out pictures."""
        return len(self.index.val)

    @property
    def skipped(self) -> dict[str, str]:
        """Files left out so far and why; pixels found broken by a worker process are counted there."""
        return self.index.skipped

    def digest(self) -> str:
        """SHA-256 of names, captions, and each file's length, first and last 4 KiB."""
        digest = hashlib.sha256()
        for entry in self._entries:
            digest.update(repr((entry, _glimpse(self.root / entry.name))).encode())
        return digest.hexdigest()

    def example(self, index: int, split: Split = "train", draw: int = 0) -> tuple[NDArray[np.uint8], str]:
        """Picture (3, size, size) and the caption that it takes on its draw-th turn; all captions in rotation."""
        entry, image = self._picture(split, index)
        view = self._view(image, index, draw) if split == "train" else fit(image, self.size, self.resize)
        return np.asarray(view).transpose(2, 0, 1), self._caption(entry, split, index, draw)

    def batch_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> Batch:
        """The pictures with these indices."""
        return self._batch(split, [(i, draw) for i in indices])

    def prompts_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> list[str]:
        """The captions of `batch_at` alone, without reading a picture."""
        return [self._caption(self._entry(split, i), split, i, draw) for i in indices]

    def train_dataloader(self) -> Endless:
        """Endless batches, starting after those that the trainer has already used."""
        return Endless(self._train_batch, self.trainer, self.workers)

    def val_dataloader(self) -> Finite | list[Finite]:
        """The held-out pictures in order, the first caption of each."""
        if not self.len_val:
            return []
        return Finite(self._val_batch, self.len_val, self.batch, self.trainer, self.workers)

    def __getstate__(self) -> dict[str, object]:
        """Without the trainer, so that a spawned worker gets plain data."""
        return {**self.__dict__, "trainer": None}

    def _train_batch(self, number: int) -> Batch:
        return self._batch("train", self._order.at(range(number * self.batch, (number + 1) * self.batch)))

    def _val_batch(self, rows: range) -> Batch:
        return self.batch_at(rows, "val")

    def _batch(self, split: Split, turns: Sequence[tuple[int, int]]) -> Batch:
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
        """The entry with this index or, where that was skipped, the next; the other split's when this one has none."""
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
        warnings.warn(
            f"data 'folder': {entry.name!r} cannot be read ({error}); the next picture takes its place "
            f"({len(self.skipped)} of {len(self._entries)} skipped so far)",
            stacklevel=2,
        )

    @functools.cached_property
    def _entries(self) -> list[Entry]:
        return captions.entries(self.root, self.manifest, self.caption)

    @functools.cached_property
    def _order(self) -> Order:
        return Order(self.len_train, self.seed)

    @functools.cached_property
    def index(self) -> Index:
        """The files that can be used, split, and those that cannot."""
        with ThreadPoolExecutor(8) as pool:
            faults = list(pool.map(self._fault, self._entries))
        skipped = {e.name: fault for e, fault in zip(self._entries, faults, strict=True) if fault}
        good = [e for e in self._entries if e.name not in skipped]
        if not good:
            raise ValueError(_none_left(self.root, skipped))
        if skipped:
            told = _told(skipped)
            warnings.warn(f"data 'folder': skipped {len(skipped)} of {len(faults)} files: {told}", stacklevel=2)
        return Index(*_split(good, self.held_out), skipped)

    def _fault(self, entry: Entry) -> str | None:
        """Why this file is left out."""
        path = self.root / entry.name
        try:
            width, height = dimensions(path) if self.check == "headers" else read(path).size
        except UnreadableError as error:
            return str(error)
        small = min(width, height) < self.min_side
        return f"{width}x{height} is smaller than min_side {self.min_side}" if small else None


def _split(entries: list[Entry], held_out: int | float) -> tuple[list[Entry], list[Entry]]:
    """(training, held-out), each in the order of names."""
    by_hash = sorted(entries, key=_share)
    if isinstance(held_out, int) and held_out >= len(entries):
        raise ValueError(
            f"data 'folder': held_out is {held_out} of {len(entries)} pictures; "
            f"at most {len(entries) - 1} leave one to train on"
        )
    count = held_out if isinstance(held_out, int) else sum(_share(e) < held_out for e in entries)
    count = min(max(count, int(held_out > 0)), len(entries) - 1)
    return sorted(by_hash[count:]), sorted(by_hash[:count])


def _share(entry: Entry) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(entry.name.encode()).digest()[:7]) / 2**56


def _glimpse(path: Path) -> tuple[int, bytes]:
    """Length, and a hash of both ends: enough to see that a picture was exchanged, without reading all of it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = file.read(4096)
        file.seek(max(0, size - 4096))
        ends += file.read(4096)
    return size, hashlib.sha256(ends).digest()


def _none_left(root: Path, skipped: dict[str, str]) -> str:
    return f"data 'folder': none of the {len(skipped)} images in {str(root)!r} can be used: {_told(skipped)}"


def _told(skipped: dict[str, str]) -> str:
    shown = [f"{name!r} ({why})" for name, why in list(skipped.items())[:5]]
    return ", ".join(shown) + (", ..." if len(skipped) > 5 else "")
