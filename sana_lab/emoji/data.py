"""`data: emoji`: drawings of Noto and Twemoji with captions, from the archives that the user fetched."""

import functools
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Le
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sana_lab.config.ranges import BatchSize, Count, Seed, Share, Workers
from sana_lab.config.specs import RUNTIME
from sana_lab.data import DataModule, Split, Turn
from sana_lab.data.stream import turn
from sana_lab.emoji import archives, drawings
from sana_lab.emoji.archives import VENDORS
from sana_lab.emoji.drawings import By, Drawing
from sana_lab.types import WHOLE, Batch, Part

BACKGROUNDS = {"white": 255, "grey": 128}


class Content(NamedTuple):
    """All distinct drawings, split; rows of `pixels` in the order of `rows`."""

    rows: list[Drawing]
    pixels: NDArray[np.uint8]  # (N, 3, size, size)
    train: list[int]  # indices into rows, each as often as it comes in an epoch
    val: list[int]
    duplicates: dict[str, str]  # label and vendor of a drawing that is left out -> label of the same drawing


class Emoji(DataModule):
    """Emoji on a plain background, (B, 3, size, size) in [-1, 1], with captions of labels, tags and style.

    A drawing that repeats another of the same vendor is left out. The split goes by concept or by combination of
    concept and skin tones (`drawings.is_held_out`), the same for both vendors. People are a fifth of the labels and
    three fifths of the drawings, as many come in several skin tones; `repeats` balances them by label. ValueError for
    missing or other archives, with the command that fetches them.
    """

    def __init__(
        self,
        archives: Annotated[str, RUNTIME] = "emoji",  # folder of the archives of `npm pack`, see docs/emoji.md
        vendors: Literal["both", "noto", "twemoji"] = "both",  # whose drawings
        size: Annotated[int, Ge(8), Le(512)] = 64,  # height and width, pixels; the drawings have 64
        batch: BatchSize = 64,  # images in a batch, which devices share
        background: Literal["white", "grey"] = "white",  # colour behind the drawings
        split: By = "combinations",  # unit that is held out: a concept in a skin tone, or a concept in all
        held_out: Share = 0.1,  # share of the units for validation
        repeats: Count = 6,  # times that a label comes in an epoch, in all its skin tones together; 1 is no balance
        seed: Seed = 0,  # seed of order and choice of captions
        workers: Annotated[Workers, RUNTIME] = 0,  # processes that load batches; 0 loads in the main process
    ) -> None:
        super().__init__(batch, seed, workers)
        self.archives, self.size, self.background = Path(archives), size, background
        self.vendors = VENDORS if vendors == "both" else (vendors,)
        self.by, self.held_out, self.repeats = split, held_out, repeats
        self.check_least(size=8, repeats=1)

    def setup(self, stage: str | None = None) -> None:
        """Read the archives, once."""
        self.content  # noqa: B018

    def check_content(self) -> None:
        """ValueError for missing or other archives."""
        archives.check(self.archives)

    @property
    def len_train(self) -> int:
        """Number of training items in an epoch; a drawing may be several."""
        return len(self.content.train)

    @property
    def len_val(self) -> int:
        """Number of held-out drawings."""
        return len(self.content.val)

    def digest(self) -> str:
        """Hash of the archives' own hashes, which are verified when they are read."""
        used = [archives.ARCHIVES[name].sha256 for name in (*self.vendors, "names")]
        return hashlib.sha256(" ".join(used).encode()).hexdigest()

    def drawing(self, index: int, split: Split = "train") -> Drawing:
        """What an item shows. IndexError beyond the end."""
        return self.content.rows[self._row(index, split)]

    def train_rows(self, number: int, part: Part = WHOLE) -> list[int]:
        """What training batch `number`, or a rank's part of it, shows: indices into `content.rows`."""
        assert self._order is not None, "the data end"
        positions = part.of(range(number * self.batch, (number + 1) * self.batch))
        return [self.content.train[i] for i, _ in self._order.at(positions)]

    def batch_of(self, turns: Sequence[Turn], split: Split) -> Batch:
        """Drawings with their captions."""
        pixels = self.content.pixels[[self._row(i, split) for i, _ in turns]]
        images = torch.from_numpy(pixels).float().mul_(2 / 255).sub_(1)
        return Batch(images, [self._caption(i, split, draw) for i, draw in turns])

    def prompts_at(self, indices: Sequence[int], split: Split = "train", draw: int = 0) -> list[str]:
        """The captions of `batch_at`."""
        return [self._caption(i, split, draw) for i in indices]

    def pictures(self, rows: Sequence[int]) -> Tensor:
        """uint8 (B, 3, size, size) of rows of `content.rows`."""
        return torch.from_numpy(self.content.pixels[list(rows)])

    def _row(self, index: int, split: Split) -> int:
        rows = self.content.train if split == "train" else self.content.val
        if not 0 <= index < len(rows):
            raise IndexError(f"there are {len(rows)} {split} drawings; given index {index}")
        return rows[index]

    def _caption(self, index: int, split: Split, draw: int) -> str:
        texts = drawings.captions(self.drawing(index, split))
        key = (self.seed, index) if split == "train" else ()
        return texts[turn(len(texts), draw, *key)]

    @functools.cached_property
    def content(self) -> Content:
        """All drawings, decoded."""
        entries = archives.names(self.archives)
        rows: list[Drawing] = []
        pixels: list[NDArray[np.uint8]] = []
        duplicates: dict[str, str] = {}
        for vendor in self.vendors:
            files = archives.drawings(self.archives, vendor)
            known: dict[bytes, str] = {}  # content of a drawing -> label
            for drawing in drawings.listed(entries, vendor, files):
                image = decoded(files[drawing.code], self.size, BACKGROUNDS[self.background])
                label = known.setdefault(image.tobytes(), drawing.label)
                if label == drawing.label:
                    rows.append(drawing)
                    pixels.append(image)
                else:
                    duplicates[f"{drawing.label}, {vendor}"] = label
        train, val = self._split(rows)
        return Content(rows, np.stack(pixels), train, val, duplicates)

    def _split(self, rows: Sequence[Drawing]) -> tuple[list[int], list[int]]:
        """(training, held-out) indices into the drawings."""
        index = {(row.label, row.vendor): i for i, row in enumerate(rows)}
        excluded = [row for row in rows if drawings.is_held_out(row, self.by, self.held_out)]
        val = [index[row.label, row.vendor] for row in drawings.shuffled(excluded)]
        kept = sorted(set(range(len(rows))) - set(val))
        variants = Counter((rows[i].base, rows[i].vendor) for i in kept)
        times = [max(1, round(self.repeats / variants[rows[i].base, rows[i].vendor])) for i in kept]
        return [i for i, n in zip(kept, times, strict=True) for _ in range(n)], val


def decoded(png: bytes, size: int, background: int) -> NDArray[np.uint8]:
    """(3, size, size) of a PNG file on a grey of that value, 0 to 255."""
    image = Image.open(io.BytesIO(png), formats=["PNG"]).convert("RGBA")
    canvas = Image.new("RGBA", image.size, (background, background, background, 255))
    flat = Image.alpha_composite(canvas, image).convert("RGB")
    if flat.size != (size, size):
        flat = flat.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(flat).transpose(2, 0, 1)
