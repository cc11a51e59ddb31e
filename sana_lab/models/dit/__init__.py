"""Interface of the denoisers: (x_t, t, text) -> velocity."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_lab.types import Text

Quantize = Literal["none", "int8", "w8a8"]


class Modulation(NamedTuple):
    """AdaLN vectors of times; of one time they may be one row for the whole batch."""

    blocks: Sequence[Tensor]  # per block (B or 1, 6, C): shift, scale, gate of attention, then of the feed-forward
    head: Tensor  # (B or 1, C): the time's embedding itself


class Schedule(NamedTuple):
    """The modulation of M times that are known before sampling begins."""

    rows: Mapping[float, int]  # time -> row
    blocks: Tensor  # (M, depth, 1, 6, C)
    head: Tensor  # (M, 1, C)

    def at(self, t: Tensor) -> Modulation | None:
        """Of times (B,) on the host that are all the same known one, else None: nothing waits for a device."""
        if t.device.type != "cpu" or bool((t != t[0]).any()):
            return None
        row = self.rows.get(t[0].item())
        return None if row is None else Modulation(self.blocks[row].unbind(), self.head[row])


class Prepared(NamedTuple):
    """What depends on the prompt alone, computed once per prompt and reused over all sampling steps.

    `constant` is for rows of the batch that follow those of `keys`: captions of one token, which says the same to every
    query, so that there is nothing to attend to. `now` is the modulation of the next forward where `schedule` does not
    have it.
    """

    keys: Sequence[Tensor]  # per block (B, heads, L, D)
    values: Sequence[Tensor]  # per block (B, heads, L, D)
    mask: Tensor | None  # (B, L) bool; None where every token counts
    constant: Sequence[Tensor] | None = None  # per block (B', C): what cross-attention adds to B' more rows
    schedule: Schedule | None = None
    now: Modulation | None = None

    def repeat(self, times: int) -> "Prepared":
        """Each row so many times in succession."""
        keys, values = ([x.repeat_interleave(times, 0) for x in part] for part in (self.keys, self.values))
        mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        return self._replace(keys=keys, values=values, mask=mask)

    @property
    def size(self) -> tuple[int, int]:
        """(B, L)."""
        return self.keys[0].shape[0], self.keys[0].shape[2]

    def beside(self, other: "Prepared") -> "Prepared":
        """The other's rows (one for all, or as many) after these; both are padded to one length."""
        (rows, length), longest = self.size, max(self.size[1], other.size[1])
        keys, values = (
            [torch.cat([_padded(x, rows, longest) for x in layer]) for layer in zip(*both, strict=True)]
            for both in ((self.keys, other.keys), (self.values, other.values))
        )
        if self.mask is None and other.mask is None and length == other.size[1]:
            return self._replace(keys=keys, values=values)
        masks = [F.pad(p._mask(rows), (0, longest - p.size[1])) for p in (self, other)]
        return self._replace(keys=keys, values=values, mask=torch.cat(masks))

    def modulation(self, t: Tensor) -> Modulation | None:
        """What was prepared for times (B,), if anything was."""
        return self.now if self.now is not None or self.schedule is None else self.schedule.at(t)

    def padded(self, length: int) -> "Prepared":
        """Right-padded with positions that do not count."""
        (rows, now) = self.size
        if now == length:
            return self
        keys, values = ([_padded(x, rows, length) for x in part] for part in (self.keys, self.values))
        return self._replace(keys=keys, values=values, mask=F.pad(self._mask(rows), (0, length - now)))

    def _mask(self, rows: int) -> Tensor:
        mask = self.keys[0].new_ones(self.size, dtype=torch.bool) if self.mask is None else self.mask
        return mask.expand(rows, -1)


class Dit(nn.Module, ABC):
    """A diffusion transformer on latents (B, channels, h, w), of whole patches, and text (B, L, text_dim)."""

    channels: int
    text_dim: int
    patch: int
    quantized: Quantize = "none"  # how the products of its blocks are stored and worked out
    spec: dict[str, Any]  # what it was built from, resolved

    @abstractmethod
    def prepare(self, text: Text) -> Prepared:
        """Projected caption and each block's cross-attention keys and values."""

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, text: Text | Prepared, guidance: Tensor | None = None) -> Tensor:
        """Noisy latents (B, C, h, w) at times t (B,) in [0, 1] (1 is noise) -> velocity (B, C, h, w).

        Times may lie on the host, latents on a device. `guidance` (B,), such as 4.5, is for models that were distilled
        with it, and for no other.
        """

    def constant(self, prepared: Prepared) -> Sequence[Tensor] | None:
        """`Prepared.constant` of captions of one token each, where a model can do with that."""
        return None

    def schedule(self, times: Tensor) -> Schedule | None:
        """The modulation of times (M,) that sampling will ask for, where a model can prepare it."""
        return None


def _padded(x: Tensor, rows: int, length: int) -> Tensor:
    """Keys or values (1 or `rows`, H, L, D) as (rows, H, length, D), with zeros."""
    return F.pad(x.expand(rows, -1, -1, -1), (0, 0, 0, length - x.shape[2]))
