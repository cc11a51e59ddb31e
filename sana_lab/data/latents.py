"""`data: latents`: the images of another data set, encoded once by a frozen autoencoder and cached on disk."""

import functools
import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from sana_lab.checkpoints.build import build, build_on_meta
from sana_lab.config import experiments
from sana_lab.config.ranges import BatchSize, Count, Seed, Workers
from sana_lab.config.specs import RUNTIME, AsBefore, Spec, canonical
from sana_lab.data import DataModule, Split, Turn
from sana_lab.data.shards import Captions, Shards
from sana_lab.data.sizes import stored_bytes
from sana_lab.data.stream import turn
from sana_lab.models.autoencoders import Autoencoder
from sana_lab.types import Batch, Json

PIXELS = 2**22
"""Images are encoded about this many pixels at a time: 64 images of 256 pixels, 4 of 1024."""


class Stores(NamedTuple):
    """The files of a set."""

    train: Shards
    val: Shards
    size: int  # of the images, pixels


class Latents(DataModule):
    """Normalised latents (B, C, h, w) of `source`'s images with captions, encoded once and cached on disk.

    Item i is image i of the source; indices beyond its last image start over with another crop or flip. Files are
    stored in `cache` under a fingerprint of the source's content and options, the autoencoder's spec and weights, and
    `captions`. An interrupted encoding resumes, and several processes share the work.
    """

    version = 1

    def __init__(
        self,
        source: Annotated[Spec, "data"],  # data set whose images are encoded
        autoencoder: Annotated[Spec, "autoencoder"],  # frozen autoencoder that encodes them
        items: Count | None = None,  # number of training images to encode; null is all of the source
        captions: Count = 4,  # maximum number of captions kept per image
        batch: BatchSize = 64,  # latents in a batch, which devices share
        seed: Seed = 0,  # seed of order and choice of captions
        cache: Annotated[str | None, RUNTIME] = None,  # folder of the encoded sets; null is runs/latents
        shard: Annotated[Count, RUNTIME] = 1024,  # latents in a file
        workers: Annotated[Workers, RUNTIME] = 0,  # processes that load batches; 0 loads in the main process
        images: Annotated[bool, AsBefore(False)] = False,  # add the source's images to batches, for training methods
    ) -> None:
        super().__init__(batch, seed, workers)
        self.source, self.autoencoder, self.items, self.captions = source, autoencoder, items, captions
        self.gives_images = images
        self.shard, self.cache = shard, Path(cache) if cache else Path("runs", "latents")
        self.check_least(items=1, captions=1, shard=1)

    def setup(self, stage: str | None = None) -> None:
        """Encode missing files. ValueError for an endless source without `items`, or a cache that cannot be used."""
        self.stores  # noqa: B018

    @property
    def size(self) -> int:  # type: ignore[override]
        """Height and width of the source's images in pixels."""
        return self.stores.size

    @property
    def len_train(self) -> int:
        """Number of training items."""
        return self.stores.train.rows

    @property
    def len_val(self) -> int:
        """Number of held-out items."""
        return self.stores.val.rows

    def check_content(self) -> None:
        """Check the source."""
        build("data", self.source).check_content()

    def bytes_to_write(self) -> dict[Path, int]:
        """Of latents in float32, less all files in `cache`, which may be of this set."""
        source: DataModule = build("data", self.source)
        if (items := self.items or source.len_train) is None:
            return {}
        part = build_on_meta("autoencoder", self.autoencoder)
        latent = 4 * part.channels * (source.size // part.downsample) ** 2
        return {self.cache: max(0, (items + source.len_val) * latent - stored_bytes(self.cache))}

    def digest(self) -> str:
        """The fingerprint of the set."""
        return self.stores.train.fingerprint

    def batch_of(self, turns: Sequence[Turn], split: Split) -> Batch:
        """Latents read from disk, with captions in rotation."""
        prompts = [self._caption(split, i, draw) for i, draw in turns]
        images = self._images([i for i, _ in turns], split) if self.gives_images else None
        return Batch(images, prompts, self._store(split).latents([i for i, _ in turns]))

    def _images(self, rows: Sequence[int], split: Split) -> Tensor | None:
        """The images (B, 3, H, W) that these rows were encoded from, on the same turns."""
        count = (self.images_source.len_train or sys.maxsize) if split == "train" else self.images_source.len_val
        return self.images_source.batch_of([(row % count, row // count) for row in rows], split).images

    def prompts_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> list[str]:
        """The captions of `batch_at`."""
        return [self._caption(split, i, draw) for i in indices]

    def _caption(self, split: Split, index: int, draw: int) -> str:
        texts = self._store(split).captions[index]
        return texts[turn(len(texts), draw, *((self.seed, index) if split == "train" else ()))]

    def _store(self, split: Split) -> Shards:
        return self.stores.train if split == "train" else self.stores.val

    @functools.cached_property
    def images_source(self) -> DataModule:
        """The source, for batches with images."""
        return self._source()

    @functools.cached_property
    def stores(self) -> Stores:
        """The files, complete: those that are missing are encoded on first use."""
        source, autoencoder = self._source(), build("autoencoder", self.autoencoder).eval()
        fingerprint = self._fingerprint(source, autoencoder)
        folder = self.cache / fingerprint[:16]
        rows: dict[Split, int] = {"train": self._items(source), "val": source.len_val}
        stores = {s: Shards(folder, s, rows[s], self.shard, fingerprint) for s in rows}
        self._encode(source, autoencoder, stores)
        return Stores(stores["train"], stores["val"], source.size)

    def _encode(self, source: DataModule, autoencoder: Autoencoder, stores: dict[Split, Shards]) -> None:
        autoencoder.to(self.trainer.strategy.root_device if self.trainer else "cpu")
        for split, store in stores.items():
            images = (source.len_train or sys.maxsize) if split == "train" else source.len_val
            store.fill(functools.partial(_encode, source, autoencoder, split, images, self.captions))

    def _source(self) -> DataModule:
        source: DataModule = build("data", self.source)
        source.setup("fit")
        return source

    def _items(self, source: DataModule) -> int:
        items = self.items or source.len_train
        if items is None:
            raise ValueError("data 'latents': the source has no end; say how many of its images to encode with `items`")
        return items

    def _fingerprint(self, source: DataModule, autoencoder: Autoencoder) -> str:
        resolved = experiments.resolve("autoencoder", self.autoencoder)
        facts: Json = {
            "version": self.version,
            "source": {k: v for k, v in canonical("data", self.source).items() if k != "batch"},
            "content": source.digest(),
            "autoencoder": {k: v for k, v in canonical("autoencoder", resolved).items() if k != "weights"},
            "weights": state_digest(autoencoder),
            "captions": self.captions,
            "shard": self.shard,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def state_digest(module: torch.nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers: names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def _encode(
    source: DataModule, autoencoder: Autoencoder, split: Split, images: int, captions: int, rows: range
) -> tuple[Tensor, list[Captions]]:
    """Latents (n, C, h, w) and captions of these rows."""
    device = autoencoder.shift.device  # a buffer that each autoencoder has, also one without parameters
    latents, texts = [], []
    for indices, draw in _views(rows, images, max(1, min(64, PIXELS // source.size**2))):
        pixels = source.batch_at(indices, split, draw).images
        assert pixels is not None, "the source holds latents"
        latents.append(autoencoder.encode(pixels.to(device)).cpu())
        prompts = zip(*(source.prompts_at(indices, split, d) for d in range(captions)), strict=True)
        texts += [tuple(dict.fromkeys(several)) for several in prompts]
    return torch.cat(latents), texts


def _views(rows: range, images: int, at_once: int) -> Iterable[tuple[list[int], int]]:
    """Rows in groups of one turn: (indices of the source, turn)."""
    for first in range(rows.start, rows.stop, at_once):
        group = range(first, min(first + at_once, rows.stop))
        for draw, same in itertools.groupby(group, lambda row: row // images):
            yield [row % images for row in same], draw
