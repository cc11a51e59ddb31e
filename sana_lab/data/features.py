"""`data: features`: cached latents with the features of their captions, encoded once by a frozen text encoder."""

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sana_lab.checkpoints.build import build
from sana_lab.config import experiments
from sana_lab.config.specs import RUNTIME, Spec, SpecError, canonical, name_of
from sana_lab.data.latents import Latents, Split, state_digest
from sana_lab.data.shards import Captions, Shards
from sana_lab.data.stream import Endless, Finite, Order
from sana_lab.models.text import TextEncoder
from sana_lab.types import Batch, Json, Text

AT_ONCE = 32
"""Captions are encoded this many at a time, those of like length together."""


class Features(L.LightningDataModule):
    """Batches of `source` (a `latents`) with `text` (B, L, D) and `null` (1, L0, D).

    L is the longest caption's number of tokens, rounded up to a multiple of `bucket`: what is compiled or captured for
    each shape then sees few of them, and the mask says what is real.

    Each distinct caption is encoded once. The files lie in `cache` (None: runs/features) under a fingerprint of the
    captions and of the encoder's spec and weights: sets of latents that say the same share them, and a killed encoding
    goes on where it stopped. Training batch s is a function of (seed, s); the source's own `batch` counts for nothing.
    """

    version = 1

    def __init__(
        self,
        source: Annotated[Spec, "data"],
        text_encoder: Annotated[Spec, "text_encoder"],
        batch: int = 64,
        seed: int = 0,
        cache: Annotated[str | None, RUNTIME] = None,
        shard: Annotated[int, RUNTIME] = 256,
        bucket: Annotated[int, RUNTIME] = 1,
        workers: Annotated[int, RUNTIME] = 0,
    ) -> None:
        super().__init__()
        given = {"batch": (batch, 1), "seed": (seed, 0), "shard": (shard, 1), "bucket": (bucket, 1)}
        for name, (value, least) in (given | {"workers": (workers, 0)}).items():
            if value < least:
                raise ValueError(f"data 'features': {name} is {value}; it must be at least {least}")
        self.source, self.text_encoder = source, text_encoder
        self.batch, self.seed, self.shard = batch, seed, shard
        self.bucket, self.workers = bucket, workers
        self.cache = Path(cache) if cache else Path("runs", "features")

    def setup(self, stage: str | None = None) -> None:
        """Encode what is not on disk yet. ValueError for another source, bare encoders, a cache out of reach."""
        self.store  # noqa: B018

    def batch_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> Batch:
        """The items with these indices."""
        return self._batch(split, [(i, draw) for i in indices])

    def text_at(self, captions: Sequence[str]) -> Text:
        """Features (in float32) of the empty prompt and of captions of the source; KeyError for any other."""
        rows = [self._tokens(self.rows[caption]) for caption in captions]
        masks = [torch.ones(len(row), dtype=torch.bool) for row in rows]
        text = Text(pad_sequence(rows, batch_first=True), pad_sequence(masks, batch_first=True))
        return text.padded(-(-text.tokens.shape[1] // self.bucket) * self.bucket)

    def train_dataloader(self) -> Endless:
        """Endless batches, starting after those that the trainer has already used."""
        return Endless(self._train_batch, self.trainer, self.workers)

    def val_dataloader(self) -> Finite | list[Finite]:
        """The held-out items in order, the first caption of each."""
        items = self.latents.len_val
        return Finite(self._val_batch, items, self.batch, self.trainer, self.workers) if items else []

    def __getstate__(self) -> dict[str, object]:
        """Without the trainer, so that a spawned worker gets plain data."""
        return {**self.__dict__, "trainer": None}

    def _train_batch(self, number: int) -> Batch:
        return self._batch("train", self._order.at(range(number * self.batch, (number + 1) * self.batch)))

    def _val_batch(self, rows: range) -> Batch:
        return self.batch_at(rows, "val")

    def _batch(self, split: Split, turns: Sequence[tuple[int, int]]) -> Batch:
        draws = itertools.groupby(turns, lambda turn: turn[1])
        found = [self.latents.batch_at([i for i, _ in same], split, draw) for draw, same in draws]
        prompts = [prompt for batch in found for prompt in batch.prompts]
        latents = torch.cat([batch.latents for batch in found if batch.latents is not None])
        return Batch(None, prompts, latents, self.text_at(prompts), self.text_at([""]))

    def _tokens(self, row: int) -> Tensor:
        """(L, D) of one caption, without padding."""
        kept = self.store.row(row)
        return kept[: int((kept[:, -1] > 0).sum()), :-1].float()

    @functools.cached_property
    def _order(self) -> Order:
        return Order(self.latents.len_train, self.seed)

    @functools.cached_property
    def latents(self) -> Latents:
        """The source, its pictures encoded."""
        source = build("data", self.source)
        if not isinstance(source, Latents):
            raise SpecError(f"data 'features': source is {name_of(self.source)!r}, expected a 'latents' of pictures")
        source.trainer = self.trainer
        source.setup("fit")
        return source

    @functools.cached_property
    def rows(self) -> dict[str, int]:
        """Where each distinct caption is kept: the empty prompt, then by length."""
        kept = [*self.latents.stores.train.captions, *self.latents.stores.val.captions]
        distinct = {"", *itertools.chain.from_iterable(kept)}
        return {caption: row for row, caption in enumerate(sorted(distinct, key=lambda c: (len(c), c)))}

    @functools.cached_property
    def store(self) -> Shards:
        """The files, complete: what was missing is encoded on first use. Rows are (L, D + 1), mask last."""
        encoder, captions = self._encoder(), list(self.rows)
        fingerprint = self._fingerprint(encoder, captions)
        store = Shards(self.cache / fingerprint[:16], "text", len(captions), self.shard, fingerprint)
        store.fill(functools.partial(_encode, encoder, captions))
        return store

    def _encoder(self) -> TextEncoder:
        encoder: TextEncoder = build("text_encoder", self.text_encoder)
        if not (encoder.pretrained or "weights" in experiments.resolve("text_encoder", self.text_encoder)):
            raise SpecError(
                f"data 'features': text_encoder {name_of(self.text_encoder)!r} has not learned anything yet; "
                "expected its `model` or `weights`, or system: text2image, which trains one from scratch"
            )
        return encoder.requires_grad_(False).eval().to(self.trainer.strategy.root_device if self.trainer else "cpu")

    def _fingerprint(self, encoder: TextEncoder, captions: Sequence[str]) -> str:
        resolved = experiments.resolve("text_encoder", self.text_encoder)
        spec = {k: v for k, v in canonical("text_encoder", resolved).items() if k != "weights"}
        facts: Json = {"version": self.version, "encoder": spec, "weights": state_digest(encoder), "shard": self.shard}
        return hashlib.sha256(json.dumps({**facts, "captions": captions}, sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def _encode(encoder: TextEncoder, captions: Sequence[str], rows: range) -> tuple[Tensor, list[Captions]]:
    """(n, L, D + 1) features of these captions, zeros after the last token, and the captions."""
    found: list[Tensor] = []
    for first in range(rows.start, rows.stop, AT_ONCE):
        text = encoder(captions[first : min(first + AT_ONCE, rows.stop)])
        marked = torch.cat([text.tokens, text.mask[:, :, None].to(text.tokens)], -1).cpu()
        found += [row[mask] for row, mask in zip(marked, text.mask.cpu(), strict=True)]
    return pad_sequence(found, batch_first=True), [(captions[row],) for row in rows]
