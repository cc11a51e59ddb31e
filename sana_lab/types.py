"""Records that packages exchange."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t) -> dx/dt; x_t is (B, C, h, w), t is (B,) in [0, 1] and 1 is noise; a solver's t is on the host. Of a
network of mean velocities, t may be (B, 2), intervals from the first time down to the second."""

Time = float | tuple[float, float]
"""A time, or an interval from the first down to the second."""


def as_time(value: float | list[float]) -> Time:
    """A row of times (B,) or of intervals (B, 2), from `tolist`, as one that is hashable."""
    return (value[0], value[1]) if isinstance(value, list) else value


class Text(NamedTuple):
    """Encoded prompts."""

    tokens: Tensor  # (B, L, D)
    mask: Tensor  # (B, L) bool, True at real tokens

    def trimmed(self) -> "Text":
        """Without the positions that are padding in every row."""
        used = self.mask.any(0)
        return self if bool(used.all()) else Text(self.tokens[:, used], self.mask[:, used])

    def padded(self, length: int) -> "Text":
        """Right-padded with zeros to `length` tokens."""
        extra = length - self.tokens.shape[1]
        return Text(F.pad(self.tokens, (0, 0, 0, extra)), F.pad(self.mask, (0, extra)))

    def beside(self, other: "Text") -> "Text":
        """One batch: the other's rows (one for all, or as many) after these, both padded to one length."""
        rows, length = len(self.tokens), max(self.tokens.shape[1], other.tokens.shape[1])
        other = Text(other.tokens.expand(rows, -1, -1), other.mask.expand(rows, -1))
        both = zip(self.padded(length), other.padded(length), strict=True)
        return Text(*(torch.cat(parts) for parts in both))


class Batch(NamedTuple):
    """One batch of a data module: images or their latents, with one caption each."""

    images: Tensor | None  # (B, 3, H, W) in [-1, 1]
    prompts: list[str]  # B captions
    latents: Tensor | None = None  # (B, C, h, w), normalised
    text: Text | None = None  # cached features, when the text encoder is frozen
    null: Text | None = None  # with them, those of the empty prompt (1, L, D), for text dropout


class Part(NamedTuple):
    """The share of every batch that one of several processes trains on: rows in the order of ranks."""

    rank: int = 0
    ranks: int = 1

    @classmethod
    def of_trainer(cls, trainer: Any) -> "Part":
        """The share of this process, under a Lightning Trainer or None."""
        return WHOLE if trainer is None else cls(trainer.global_rank, trainer.world_size)

    def of(self, positions: range) -> range:
        """This rank's positions of a batch, whose size the ranks divide."""
        rows = len(positions) // self.ranks
        return positions[self.rank * rows : (self.rank + 1) * rows]

    def draw(self, draw: Callable[[int], Tensor], rows: int) -> Tensor:
        """This rank's `rows` random numbers of those that `draw(n)` makes for the n rows of all ranks."""
        return draw(rows * self.ranks)[self.rank * rows : (self.rank + 1) * rows]


WHOLE = Part()
"""All of a batch, for a process that trains alone."""


class Object(NamedTuple):
    """One object in an image, detected or drawn in a scene; the unit that GenEval counts."""

    label: str  # class name: "circle", or a COCO class
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels
    score: float = 1.0  # confidence; higher is considered first
    color: str | None = None  # one of the ten GenEval colours, or None if it was not classified
    mask: Tensor | None = None  # (H, W) bool, True inside the object; None if only the box is known


Json = dict[str, Any]
"""Plain data: what YAML and JSON can hold."""
