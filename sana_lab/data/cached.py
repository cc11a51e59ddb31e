"""`data: cached`: latents and text features of millions of pictures, encoded once by frozen networks."""

import functools
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sana_lab.checkpoints.build import build, build_on_meta
from sana_lab.config import experiments
from sana_lab.config.hashing import with_contents
from sana_lab.config.ranges import BatchSize, Count, Seed, Share, Width, Workers
from sana_lab.config.specs import RUNTIME, Spec, SpecError, canonical, name_of
from sana_lab.data import Split, cache_keys, encoding
from sana_lab.data.bucketed import Bucketed, Rows
from sana_lab.data.buckets import Shape
from sana_lab.data.caption_choice import CaptionChoice
from sana_lab.data.disk_columns import Table
from sana_lab.data.pictures import Pictures
from sana_lab.data.ragged import Ragged
from sana_lab.data.sizes import least_tokens
from sana_lab.models.autoencoders import Autoencoder
from sana_lab.types import Batch, Json, Text

VERSION = 1

SAMPLED = 1000
"""Captions by whose words the size of text features is estimated."""

Advance = Callable[[str, int], None]
"""Called with latents or text, and the rows that were encoded."""


class Stores(NamedTuple):
    """The files of a cache."""

    latents: Ragged
    text: Ragged | None
    null: Ragged | None  # the features of the empty prompt

    def each(self) -> list[Ragged]:
        """Those that there are."""
        return [store for store in self if store is not None]


class Cached(Bucketed):
    """Latents (B, C, h, w) and, with `text_encoder`, text features of a set of pictures, read from the disk by row.

    `sana-lab cache` makes them with several processes; what is missing is made before training. They are stored in
    `cache` under keys of all that makes them: pictures, shapes, the autoencoder with its weights; captions, the text
    encoder with its weights and instruction. Shards that were damaged since are named, skipped and counted.
    """

    def __init__(
        self,
        source: Annotated[Spec, "data"],  # data set `pictures`; its batch, seed and choice have no effect
        autoencoder: Annotated[Spec, "autoencoder"],  # frozen autoencoder, with weights
        # frozen encoder, pretrained or with weights; null gives captions, for a system that encodes them
        text_encoder: Annotated[Spec | None, "text_encoder"] = None,
        batch: BatchSize = 64,  # items in a batch, which devices share
        # which of several captions: a mapping of `rule` (rotation, uniform, softmax or power), `temperature` and
        # `min_score`, the lowest CLIP score
        choice: CaptionChoice = CaptionChoice(),  # noqa: B008
        seed: Seed = 0,  # seed of order and choice of captions
        dtype: Literal["float16", "bfloat16", "float32"] = "float16",  # stored type of latents
        text_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",  # stored type of text features
        images: bool = False,  # add the pictures to batches, for training methods
        cache: Annotated[str | None, RUNTIME] = None,  # folder of caches; null is runs/cache
        shard: Annotated[Count, RUNTIME] = 1024,  # pictures in a file
        bucket: Annotated[Width, RUNTIME] = 1,  # pad text to multiples of so many tokens, to compile fewer lengths
        unreadable: Annotated[Share, RUNTIME] = 0.01,  # largest share of pictures left out as unreadable or damaged
        workers: Annotated[Workers, RUNTIME] = 1,  # processes that load batches; 0 loads in the main process
    ) -> None:
        super().__init__(batch, seed, workers)
        self.source_spec, self.autoencoder, self.text_encoder = source, autoencoder, text_encoder
        self.choice = CaptionChoice(**choice) if isinstance(choice, dict) else choice
        self.dtype, self.text_dtype, self.gives_images = dtype, text_dtype, images
        self.cache, self.shard, self.bucket = Path(cache) if cache else Path("runs", "cache"), shard, bucket
        self.unreadable = unreadable
        self.check_least(shard=1, bucket=1)

    def setup(self, stage: str | None = None) -> None:
        """Encode what is missing. ValueError for data that cannot be used, SpecError for encoders without weights."""
        self.check_scores()
        if not all(store.complete for store in self.stores.each()):
            self.fill()
        self.rows  # noqa: B018

    def check_content(self) -> None:
        """Check the source."""
        self.source.check_content()

    def bytes_to_write(self) -> dict[Path, int]:
        """Of latents, and of text features of a token for each word of a caption."""
        latents, text, _ = self.stores
        side, rows = self._autoencoder.downsample, max(1, latents.rows)
        areas = np.array([(height // side) * (width // side) for height, width in self.shapes])
        cells = int(areas[self.source.buckets_of].sum())
        left = 1 - latents.done() / rows
        sizes = {latents.folder: int(left * cells * self._autoencoder.channels * getattr(torch, self.dtype).itemsize)}
        if text is not None:
            encoder = build_on_meta("text_encoder", self.text_encoder or "")
            count = int(self.table["row_captions_end"][-1])
            texts = self.texts(np.linspace(0, count - 1, min(count, SAMPLED)).astype(int))
            tokens = least_tokens(texts, encoder.max_tokens) * count / len(texts)
            left = 1 - text.done() / rows
            sizes[text.folder] = int(left * tokens * encoder.dim * getattr(torch, self.text_dtype).itemsize)
        return sizes

    def digest(self) -> str:
        """The digest of the source."""
        return self.source.digest()

    @property
    def size(self) -> int:  # type: ignore[override]
        """Side of the square shape in pixels."""
        return self.source.size

    @property
    def table(self) -> Table:
        """The source's index."""
        return self.source.table

    @property
    def shapes(self) -> list[Shape]:
        """The image shape of each bucket."""
        return self.source.shapes

    def selection(self, split: Split) -> Rows:
        """The rows of a split that are usable."""
        return self.rows[split]

    def make(
        self,
        rows: NDArray[np.integer],
        turns: NDArray[np.integer],
        split: Split,
        captions: NDArray,
        shape: Shape | None,
    ) -> Batch:
        """Latents and text features read from the disk. ValueError for items of several shapes."""
        images = None
        if self.gives_images:
            used, images = self._pictures(rows, turns, split)
            if (used != rows).any():
                rows, captions = used, self.captions_of(used, turns, split)
        batch = Batch(images, self.texts(captions), self._latents(rows))
        if self.stores.text is None:
            return batch
        return batch._replace(text=self._text(self.stores.text, rows, captions), null=self.null)

    def _pictures(
        self, rows: NDArray[np.integer], turns: NDArray[np.integer], split: Split
    ) -> tuple[NDArray[np.integer], Tensor]:
        """Pictures as they were encoded, and their rows: others in place of those that cannot be read any more."""
        selected, shapes = self.selection(split), [self.shapes[int(k)] for k in self.source.buckets_of[rows]]
        read = functools.partial(self.source.readable, among=selected)
        views = [read(int(r), int(t), split, s) for r, t, s in zip(rows, turns, shapes, strict=True)]
        pixels = torch.from_numpy(np.stack([view for _, view in views])).float().mul_(2 / 255).sub_(1)
        return np.array([row for row, _ in views]), pixels

    def _latents(self, rows: NDArray[np.integer]) -> Tensor:
        buckets = np.unique(self.source.buckets_of[rows])
        if len(buckets) > 1:
            raise ValueError("data 'cached': items of several buckets have no common shape; expected those of a batch")
        height, width = (side // self._autoencoder.downsample for side in self.shapes[int(buckets[0])])
        flat = self.stores.latents.read(rows, rows)
        return flat.view(len(rows), -1, height, width).float()

    def _text(self, store: Ragged, rows: NDArray[np.integer], captions: NDArray[np.integer]) -> Text:
        tokens, lengths = store.read(rows, captions, self.bucket), torch.from_numpy(store.lengths(captions))
        return Text(tokens, torch.arange(tokens.shape[1]) < lengths[:, None])

    @cached_property
    def null(self) -> Text:
        """Features of the empty prompt (1, L, D)."""
        assert self.stores.null is not None
        return self._text(self.stores.null, np.zeros(1, int), np.zeros(1, int))

    # the files

    @cached_property
    def source(self) -> Pictures:
        """The pictures."""
        source = build("data", self.source_spec)
        if not isinstance(source, Pictures):
            raise SpecError(f"data 'cached': source is {name_of(self.source_spec)!r}, expected 'pictures'")
        if source.crop != "center" or source.flip:
            raise SpecError("data 'cached': pictures are encoded once; expected source.crop=center source.flip=false")
        return source

    @cached_property
    def _autoencoder(self) -> Autoencoder:
        part: Autoencoder = build_on_meta("autoencoder", self.autoencoder)
        return part

    @cached_property
    def stores(self) -> Stores:
        """The files, which may be incomplete. SpecError for encoders without weights, or a cache of other facts."""
        pictures, rows = self.digest(), int(self.table.meta["rows"])
        transform = {"size": self.size, "shapes": [list(shape) for shape in self.shapes]}
        facts = {"version": VERSION, "pictures": pictures, "transform": transform, "dtype": self.dtype}
        facts["autoencoder"] = _identity("autoencoder", self.autoencoder)
        latents = self._store("latents", rows, facts)
        if self.text_encoder is None:
            return Stores(latents, None, None)
        facts = {"version": VERSION, "pictures": pictures, "dtype": self.text_dtype}
        facts["text_encoder"] = _identity("text_encoder", self.text_encoder)
        text = self._store("text", rows, facts)
        return Stores(latents, text, Ragged(text.folder / "null", "null", 1, 1, facts))

    def _store(self, kind: str, rows: int, facts: Json) -> Ragged:
        folder = self._folder(kind, facts)
        return Ragged(folder, kind, rows, cache_keys.shard(folder) or self.shard, facts)

    def _folder(self, kind: str, facts: Json) -> Path:
        path = cache_keys.folder(self.cache, kind, facts)
        if self.cache.name.startswith(f"{kind}-") and (self.cache / cache_keys.RECORD).is_file():
            cache_keys.check(self.cache, kind, facts)
            return self.cache
        return path

    def fill(self, advance: Advance = lambda what, rows: None, device: torch.device | None = None) -> None:
        """Encode what is missing or damaged, together with other processes that do the same, and write the indexes."""
        where = device or (self.trainer.strategy.root_device if self.trainer else torch.device("cpu"))
        latents, text, null = self.stores
        for store in (latents, text):
            if store is not None:
                for line in cache_keys.begin(store.folder, store.facts, store.per_shard):
                    print(f"data 'cached': {store.kind} are encoded anew: {line}", file=sys.stderr)
        autoencoder = functools.cache(lambda: build("autoencoder", self.autoencoder).eval().to(where))
        encoder = functools.cache(lambda: build("text_encoder", self.text_encoder or "").eval().to(where))
        kind, text_kind = getattr(torch, self.dtype), getattr(torch, self.text_dtype)
        latents.fill(
            lambda rows: encoding.latents(self.source, autoencoder(), kind, rows),
            functools.partial(advance, "latents"),
        )
        if text is not None and null is not None:
            null.fill(lambda rows: encoding.features(encoder(), [""], text_kind))
            text.fill(
                lambda rows: encoding.features(encoder(), self._captions(rows), text_kind),
                functools.partial(advance, "text"),
            )
        for store in self.stores.each():
            store.join()

    def _captions(self, rows: range) -> list[str]:
        """All captions of these rows."""
        ends = self.table["row_captions_end"]
        first = int(ends[rows.start - 1]) if rows.start else 0
        return self.texts(np.arange(first, int(ends[rows.stop - 1])))

    @cached_property
    def rows(self) -> dict[Split, Rows]:
        """The rows of both splits that are usable. ValueError if too many are not."""
        latents, text, _ = self.stores
        rows = dict(self.source.rows)
        left_out = latents.broken or latents.table.meta["unreadable"] or (text is not None and text.broken)
        if not left_out:
            return rows
        usable = latents.usable() & (text.usable() if text is not None else True)
        self._report(usable, [s for s in (latents, text) if s is not None])
        return {split: _only(selected, usable) for split, selected in rows.items()}

    def _report(self, usable: NDArray[np.bool_], stores: list[Ragged]) -> None:
        count = int((~usable).sum())
        names = [str(store.folder / name) for store in stores for name in store.broken.values()]
        names += [f"{name} ({why})" for s in stores for name, why in s.table.meta["examples"].items()]
        text = f"{count} of {len(usable)} pictures are left out: {', '.join(names[:5])}"
        text += f" and {len(names) - 5} more" if len(names) > 5 else ""
        if count > self.unreadable * len(usable):
            raise ValueError(
                f"data 'cached': {text}; at most a share `unreadable` of {self.unreadable:g} may be; "
                "`sana-lab cache EXPERIMENT` encodes damaged shards again"
            )
        print(f"data 'cached': {text}", file=sys.stderr)


def _only(selected: Rows, usable: NDArray[np.bool_]) -> Rows:
    kept = usable[selected.rows]
    ends = np.concatenate([[0], np.cumsum(kept)])[selected.ends]
    return Rows(selected.rows[kept], ends)


def _identity(kind: str, spec: Spec) -> Json:
    """What a frozen part is: its options, and its weights and files by content. SpecError if it has no weights."""
    resolved = experiments.resolve(kind, spec)
    if "weights" not in resolved and not (kind == "text_encoder" and build_on_meta(kind, spec).pretrained):
        expected = "`weights`" if kind == "autoencoder" else "`model` or `weights`"
        raise SpecError(
            f"data 'cached': {kind} {name_of(resolved)!r} has not learned anything yet; expected {expected}"
        )
    identity: Json = with_contents(canonical(kind, resolved))
    return identity
