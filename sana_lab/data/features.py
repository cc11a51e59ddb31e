"""`data: features`: cached latents with the features of their captions, encoded once by a frozen text encoder."""

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sana_lab.checkpoints.build import build, build_on_meta
from sana_lab.config import experiments
from sana_lab.config.ranges import BatchSize, Count, Seed, Width, Workers
from sana_lab.config.specs import RUNTIME, Spec, SpecError, canonical, name_of
from sana_lab.data import DataModule, Split, Turn
from sana_lab.data.latents import Latents, state_digest
from sana_lab.data.shards import Captions, Shards
from sana_lab.data.sizes import least_tokens, stored_bytes
from sana_lab.models.text import TextEncoder
from sana_lab.types import Batch, Json, Text

ENCODER_BATCH = 32
"""Number of captions encoded at a time, sorted by length."""

SAMPLED = 256
"""Images whose captions are counted before all are known."""


class Features(DataModule):
    """Batches of `source`'s latents with `text` (B, L, D) and `null`, the empty prompt's (1, L0, D).

    L is the token count of the longest caption, rounded up to a multiple of `bucket`. Each distinct caption is encoded
    once. Files are stored in `cache` under a fingerprint of the captions and of the encoder's spec and weights: sets of
    latents with the same captions share them, and an interrupted encoding resumes.
    """

    version = 1

    def __init__(
        self,
        source: Annotated[Spec, "data"],  # data set of kind `latents`; its own `batch` has no effect
        text_encoder: Annotated[Spec, "text_encoder"],  # frozen encoder, with pretrained or given weights
        batch: BatchSize = 64,  # items in a batch, which devices share
        seed: Seed = 0,  # seed of the order; captions use the source's seed
        cache: Annotated[str | None, RUNTIME] = None,  # folder of the encoded captions; null is runs/features
        shard: Annotated[Count, RUNTIME] = 256,  # captions in a file
        bucket: Annotated[Width, RUNTIME] = 1,  # pad text to multiples of so many tokens, to compile fewer lengths
        workers: Annotated[Workers, RUNTIME] = 0,  # processes that load batches; 0 loads in the main process
    ) -> None:
        super().__init__(batch, seed, workers)
        self.source, self.text_encoder, self.shard, self.bucket = source, text_encoder, shard, bucket
        self.cache = Path(cache) if cache else Path("runs", "features")
        self.gives_images = isinstance(source, dict) and bool(source.get("images"))
        self.check_least(shard=1, bucket=1)

    def setup(self, stage: str | None = None) -> None:
        """Encode the captions that are not on disk. ValueError for another kind of source, an untrained encoder, a
        cache that cannot be written."""
        self.store  # noqa: B018

    @property
    def size(self) -> int:  # type: ignore[override]
        """Height and width of the images in pixels."""
        return self.latents.size

    @property
    def len_train(self) -> int:
        """Number of training items."""
        return self.latents.len_train

    @property
    def len_val(self) -> int:
        """Number of held-out items."""
        return self.latents.len_val

    def check_content(self) -> None:
        """Check the source."""
        build("data", self.source).check_content()

    def bytes_to_write(self) -> dict[Path, int]:
        """Of the source, and of the captions of its first images in float32, a token for each word."""
        source = build("data", self.source)
        sizes: dict[Path, int] = source.bytes_to_write()
        images: DataModule = build("data", source.source)
        rows = min(SAMPLED, source.items or SAMPLED, images.len_train or SAMPLED)
        encoder, captions = build_on_meta("text_encoder", self.text_encoder), {*images.prompts_at(range(rows))}
        size = least_tokens([*captions], encoder.max_tokens) * 4 * (encoder.dim + 1)
        if len(captions) == rows and images.len_train:  # no two images share one
            size *= max(1, (source.items or images.len_train) // rows)
        return {**sizes, self.cache: max(0, size - stored_bytes(self.cache))}

    def digest(self) -> str:
        """The fingerprints of latents and captions."""
        return f"{self.latents.digest()} {self.store.fingerprint}"

    def batch_of(self, turns: Sequence[Turn], split: Split) -> Batch:
        """The source's batch, with the features of its captions and of the empty prompt."""
        batch = self.latents.batch_of(turns, split)
        return batch._replace(text=self.text_at(batch.prompts), null=self.text_at([""]))

    def prompts_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> list[str]:
        """The captions of `batch_at`."""
        return self.latents.prompts_at(indices, split, draw)

    def text_at(self, captions: Sequence[str]) -> Text:
        """Features (in float32) of the empty prompt and of captions of the source; KeyError for any other."""
        rows = [self._tokens(self.rows[caption]) for caption in captions]
        masks = [torch.ones(len(row), dtype=torch.bool) for row in rows]
        text = Text(pad_sequence(rows, batch_first=True), pad_sequence(masks, batch_first=True))
        return text.padded(-(-text.tokens.shape[1] // self.bucket) * self.bucket)

    def _tokens(self, row: int) -> Tensor:
        """Features (L, D) of one caption, without padding."""
        marked = self.store.row(row)  # (L, D + 1), the mask last
        return marked[: int((marked[:, -1] > 0).sum()), :-1].float()

    @functools.cached_property
    def latents(self) -> Latents:
        """The source, with its images encoded."""
        source = build("data", self.source)
        if not isinstance(source, Latents):
            raise SpecError(f"data 'features': source is {name_of(self.source)!r}, expected a 'latents' of images")
        source.trainer = self.trainer
        source.setup("fit")
        return source

    @functools.cached_property
    def rows(self) -> dict[str, int]:
        """Row of each distinct caption in the files: the empty prompt first, then by length."""
        captions = [*self.latents.stores.train.captions, *self.latents.stores.val.captions]
        distinct = {"", *itertools.chain.from_iterable(captions)}
        return {caption: row for row, caption in enumerate(sorted(distinct, key=lambda c: (len(c), c)))}

    @functools.cached_property
    def store(self) -> Shards:
        """The files, complete: those that are missing are encoded on first use. Rows are (L, D + 1), the mask last."""
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
    """Features (n, L, D + 1) of these captions, the mask last and zeros after the last token, and the captions."""
    features: list[Tensor] = []
    for first in range(rows.start, rows.stop, ENCODER_BATCH):
        text = encoder(captions[first : min(first + ENCODER_BATCH, rows.stop)])
        marked = torch.cat([text.tokens, text.mask[:, :, None].to(text.tokens)], -1).cpu()
        features += [row[mask] for row, mask in zip(marked, text.mask.cpu(), strict=True)]
    return pad_sequence(features, batch_first=True), [(captions[row],) for row in rows]
