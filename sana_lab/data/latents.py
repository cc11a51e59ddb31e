"""`data: latents`: another data module's pictures, encoded once by a frozen autoencoder and kept on disk."""

import functools
import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import lightning as L
import torch
from torch import Tensor

from sana_lab.checkpoints.build import build
from sana_lab.config import experiments
from sana_lab.config.specs import RUNTIME, Spec, canonical
from sana_lab.data.shards import Captions, Shards
from sana_lab.data.stream import Endless, Finite, Order, turn
from sana_lab.models.autoencoders import Autoencoder
from sana_lab.types import Batch, Json

Split = Literal["train", "val"]

PIXELS = 2**22
"""Pictures are encoded about this many pixels at a time: 64 pictures at 256 pixels, 4 at 1024."""


class Source(Protocol):
    """What a data module offers so that its pictures can be kept as latents."""

    size: int

    @property
    def len_train(self) -> int | None: ...  # None: endless

    @property
    def len_val(self) -> int: ...

    def setup(self, stage: str | None = None) -> None: ...

    def digest(self) -> str: ...

    def batch_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> Batch: ...


class Stores(NamedTuple):
    """What is kept of each split."""

    train: Shards
    val: Shards
    size: int  # of the pictures, pixels


class Latents(L.LightningDataModule):
    """(B, C, h, w) normalised latents of `items` pictures of `source`, each with up to `captions` of its captions.

    Item i is picture i of the source; beyond its last picture comes its next draw (another crop or flip). The files lie
    in `cache` (None: runs/latents) under a fingerprint of the source's content and options, the autoencoder's spec and
    weights, and `captions`: whatever changes one of them makes another set, a killed encoding goes on where it stopped,
    and several processes share the work. Training batch s is a function of (seed, s); captions come in rotation.
    """

    version = 1

    def __init__(
        self,
        source: Annotated[Spec, "data"],
        autoencoder: Annotated[Spec, "autoencoder"],
        items: int | None = None,
        captions: int = 4,
        batch: int = 64,
        seed: int = 0,
        cache: Annotated[str | None, RUNTIME] = None,
        shard: Annotated[int, RUNTIME] = 1024,
        workers: Annotated[int, RUNTIME] = 0,
    ) -> None:
        super().__init__()
        given = {"items": (1 if items is None else items, 1), "captions": (captions, 1), "batch": (batch, 1)}
        for name, (value, least) in (given | {"seed": (seed, 0), "shard": (shard, 1), "workers": (workers, 0)}).items():
            if value < least:
                raise ValueError(f"data 'latents': {name} is {value}; it must be at least {least}")
        self.source, self.autoencoder, self.items, self.captions = source, autoencoder, items, captions
        self.batch, self.seed, self.shard, self.workers = batch, seed, shard, workers
        self.cache = Path(cache) if cache else Path("runs", "latents")

    def setup(self, stage: str | None = None) -> None:
        """Encode what is not on disk yet. ValueError for an endless source without `items`, or a cache out of reach."""
        self.stores  # noqa: B018

    @property
    def size(self) -> int:
        """Width and height of the pictures in pixels."""
        return self.stores.size

    @property
    def len_train(self) -> int:
        """Number of training items."""
        return self.stores.train.rows

    @property
    def len_val(self) -> int:
        """Number of held-out items."""
        return self.stores.val.rows

    def digest(self) -> str:
        """The fingerprint of what is kept."""
        return self.stores.train.fingerprint

    def batch_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> Batch:
        """The items with these indices."""
        return self._batch(split, [(i, draw) for i in indices])

    def prompts_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> list[str]:
        """The captions of `batch_at` alone."""
        return [self._caption(split, i, draw) for i in indices]

    def train_dataloader(self) -> Endless:
        """Endless batches, starting after those that the trainer has already used."""
        return Endless(self._train_batch, self.trainer, self.workers)

    def val_dataloader(self) -> Finite | list[Finite]:
        """The held-out items in order, the first caption of each."""
        return Finite(self._val_batch, self.len_val, self.batch, self.trainer, self.workers) if self.len_val else []

    def __getstate__(self) -> dict[str, object]:
        """Without the trainer, so that a spawned worker gets plain data."""
        return {**self.__dict__, "trainer": None}

    def _train_batch(self, number: int) -> Batch:
        return self._batch("train", self._order.at(range(number * self.batch, (number + 1) * self.batch)))

    def _val_batch(self, rows: range) -> Batch:
        return self.batch_at(rows, "val")

    def _batch(self, split: Split, turns: Sequence[tuple[int, int]]) -> Batch:
        prompts = [self._caption(split, i, draw) for i, draw in turns]
        return Batch(None, prompts, self._store(split).latents([i for i, _ in turns]))

    def _caption(self, split: Split, index: int, draw: int) -> str:
        texts = self._store(split).captions[index]
        return texts[turn(len(texts), draw, *((self.seed, index) if split == "train" else ()))]

    def _store(self, split: Split) -> Shards:
        return self.stores.train if split == "train" else self.stores.val

    @functools.cached_property
    def _order(self) -> Order:
        return Order(self.len_train, self.seed)

    @functools.cached_property
    def stores(self) -> Stores:
        """The files, complete: what was missing is encoded on first use."""
        source, autoencoder = self._source(), build("autoencoder", self.autoencoder).eval()
        fingerprint = self._fingerprint(source, autoencoder)
        folder = self.cache / fingerprint[:16]
        rows: dict[Split, int] = {"train": self._items(source), "val": source.len_val}
        stores = {s: Shards(folder, s, rows[s], self.shard, fingerprint) for s in rows}
        self._encode(source, autoencoder, stores)
        return Stores(stores["train"], stores["val"], source.size)

    def _encode(self, source: Source, autoencoder: Autoencoder, stores: dict[Split, Shards]) -> None:
        autoencoder.to(self.trainer.strategy.root_device if self.trainer else "cpu")
        for split, store in stores.items():
            pictures = (source.len_train or sys.maxsize) if split == "train" else source.len_val
            store.fill(functools.partial(_encode, source, autoencoder, split, pictures, self.captions))

    def _source(self) -> Source:
        source: Source = build("data", self.source)
        source.setup("fit")
        return source

    def _items(self, source: Source) -> int:
        items = self.items or source.len_train
        if items is None:
            raise ValueError(
                "data 'latents': the source has no end, so say how many of its pictures to keep with `items`"
            )
        return items

    def _fingerprint(self, source: Source, autoencoder: Autoencoder) -> str:
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
    source: Source, autoencoder: Autoencoder, split: Split, pictures: int, captions: int, rows: range
) -> tuple[Tensor, list[Captions]]:
    """Latents (n, C, h, w) and captions of these rows."""
    device = next(autoencoder.parameters()).device
    latents, texts = [], []
    for indices, draw in _views(rows, pictures, max(1, min(64, PIXELS // source.size**2))):
        images: Any = source.batch_at(indices, split, draw).images
        latents.append(autoencoder.encode(images.to(device)).cpu())
        said = zip(*(_prompts(source, indices, split, d) for d in range(captions)), strict=True)
        texts += [tuple(dict.fromkeys(several)) for several in said]
    return torch.cat(latents), texts


def _views(rows: range, pictures: int, at_once: int) -> Iterable[tuple[list[int], int]]:
    """Rows in groups of one draw: (pictures, draw)."""
    for first in range(rows.start, rows.stop, at_once):
        group = range(first, min(first + at_once, rows.stop))
        for draw, same in itertools.groupby(group, lambda row: row // pictures):
            yield [row % pictures for row in same], draw


def _prompts(source: Source, indices: Sequence[int], split: Split, draw: int) -> list[str]:
    """Captions alone where the source can give them, for drawing or reading a picture takes longer."""
    at = getattr(source, "prompts_at", None)
    return at(indices, split, draw) if at else source.batch_at(indices, split, draw).prompts
