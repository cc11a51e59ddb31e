"""SANA's denoiser for sampling, with captions and known times precomputed."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sana_lab.models.dit import Blockwise, Mixing, Reading
from sana_lab.models.layers import unpatch
from sana_lab.ops.modulate import modulate
from sana_lab.types import Text, Time, as_time

MAX_TIMES = 128
"""Most times with precomputed modulation (100 MB for SANA-0.6B in float32); later times are computed in their steps."""


class Schedule(NamedTuple):
    """Modulation of M times or intervals known before sampling begins."""

    rows: Mapping[Time, int]  # time -> row
    blocks: Tensor  # (M, depth, 1, 6, C): shift, scale, gate of attention, then of the feed-forward
    head: Tensor  # (M, 1, C): time embedding

    def at(self, t: Tensor) -> list[Tensor] | None:
        """(depth, 1, 6, C) and (1, C) if all times (B,) or (B, 2), on the CPU, are the same known time; else None."""
        if t.device.type != "cpu" or bool((t != t[0]).any()):
            return None
        row = self.rows.get(as_time(t[0].tolist()))
        return None if row is None else [self.blocks[row], self.head[row]]


@dataclass(frozen=True, eq=False)
class AlsoReading:
    """Cross-attention in which some rows also read another caption, at some of their tokens."""

    keys: Tensor  # (K, heads, L, D)
    values: Tensor  # (K, heads, L, D)
    mask: Tensor | None  # (K, L)
    rows: Tensor  # (K,) of the batch
    weights: Tensor  # (K, h, w, 1) of this caption beside the row's own

    def __call__(self, cross: Any, x: Tensor, *caption: Tensor | None) -> Tensor:
        read = cross(x, *caption)
        other = cross(x[self.rows], self.keys, self.values, self.mask)
        return read.index_add(0, self.rows, self.weights * (other - read[self.rows]))


@dataclass(frozen=True, eq=False)
class SamplingSana(Blockwise):
    """`Sana` with the cross-attention keys and values of captions and the AdaLN modulation of known times.

    `constants` belong to further rows of the batch, after those of `keys`, whose captions have one token: softmax over
    one key is 1, so that cross-attention adds the same vector to every image token.
    """

    dit: Any  # Sana
    keys: list[Tensor]  # per block (B, heads, L, D)
    values: list[Tensor]  # per block (B, heads, L, D)
    mask: Tensor | None  # (B, L) bool; None if every token is valid
    schedule: Schedule | None = None
    constants: list[Tensor] | None = None  # per block (B', C)
    guidance: float | None = None  # scale that a distilled model reads
    copies: int = 1
    mixing: Mapping[int, Mixing] = field(default_factory=dict)  # block -> in place of its self-attention
    reading: Sequence[Reading] | None = None  # per block, in place of its cross-attention

    def step_inputs(self, t: Tensor) -> Sequence[Tensor]:
        """Modulation (depth, B, 6, C) and time embedding (B, C); one row instead of B if all share a known time."""
        scheduled = None if self.schedule is None else self.schedule.at(t)
        return modulation(self.dit, t, self.guidance) if scheduled is None else scheduled

    def step(self, x: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        return self.project(self.run(self.embed(x), inputs), inputs).to(x.dtype)

    def embed(self, x: Tensor) -> Tensor:
        return self.dit.embed(x)

    def modulated(self, tokens: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        shift, scale = inputs[0][0, :, :2].expand(len(tokens), -1, -1).unbind(1)
        return modulate(tokens, shift, scale, backend=self.dit.blocks[0].backend)

    def run(self, tokens: Tensor, inputs: Sequence[Tensor], start: int = 0, stop: int | None = None) -> Tensor:
        rows, dit = len(tokens), self.dit
        constants: Sequence[Tensor | None] = self.constants or [None] * len(dit.blocks)
        layers = zip(dit.blocks, inputs[0], self.keys, self.values, constants, strict=True)
        for i, (block, modulation, k, v, constant) in islice(enumerate(layers), start, stop):
            arguments = tokens, modulation.expand(rows, -1, -1), k, v, self.mask, constant
            others = self._others(i, rows // self.copies)
            tokens = dit.run(partial(block, **others), *arguments) if others else dit.call(block, *arguments)
        return tokens

    def _others(self, block: int, rows: int) -> dict[str, Callable[..., Tensor]]:
        """What runs in place of a block's attentions, on so many rows of each copy."""
        others: dict[str, Callable[..., Tensor]] = {}
        if block in self.mixing:
            mix = self.mixing[block]
            others["mixing"] = lambda attention, x: mix(attention, x, rows)
        return others if self.reading is None else {**others, "reading": self.reading[block]}

    def project(self, tokens: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        return unpatch(self.dit.head(tokens, inputs[1].expand(len(tokens), -1)), self.dit.patch)

    def select(self, rows: Tensor) -> "SamplingSana":
        keyed = len(self.keys[0])  # constants belong to the rows after these
        inside, after = rows[rows < keyed], rows[rows >= keyed] - keyed
        chosen = self.map(lambda x: x[inside])
        constants = None if self.constants is None else [c[after] for c in self.constants]
        return replace(chosen, constants=constants)

    def selected_inputs(self, inputs: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        six, time = inputs
        return [six if six.shape[1] == 1 else six[:, rows], time if len(time) == 1 else time[rows]]

    @property
    def tensors(self) -> list[Tensor]:
        mask = [] if self.mask is None else [self.mask]
        return [*self.keys, *self.values, *mask, *(self.constants or ())]

    @property
    def length(self) -> int:
        return self.keys[0].shape[2]

    @property
    def variant(self) -> Hashable:
        return (self.copies, *self.mixing.items()) if self.mixing else None

    def twice(self) -> "SamplingSana":
        return replace(self.map(lambda x: torch.cat([x, x])), copies=2 * self.copies)

    def replacing(self, mixing: Mapping[int, Mixing]) -> "SamplingSana":
        return replace(self, mixing={**self.mixing, **mixing})

    def also_reading(self, other: "SamplingSana", owners: Sequence[int], weights: Tensor) -> "SamplingSana":
        images, keys = len(self.keys[0]) // self.copies, self.keys[0]
        rows = torch.tensor([copy * images + i for copy in range(self.copies) for i in owners], device=keys.device)
        weights, every = weights.to(keys).repeat(self.copies, 1, 1, 1), [*range(len(owners))] * self.copies
        mask = None if other.mask is None else other.mask[every]
        pairs = zip(other.keys, other.values, strict=True)
        return replace(self, reading=[AlsoReading(k[every], v[every], mask, rows, weights) for k, v in pairs])

    def map(self, function: Callable[[Tensor], Tensor]) -> "SamplingSana":
        return replace(
            self,
            keys=[*map(function, self.keys)],
            values=[*map(function, self.values)],
            mask=None if self.mask is None else function(self.mask),
            constants=None if self.constants is None else [*map(function, self.constants)],
        )

    def padded(self, length: int) -> "SamplingSana":
        if length == self.length:
            return self
        keys, values = ([_pad(x, length) for x in layers] for layers in (self.keys, self.values))
        return replace(self, keys=keys, values=values, mask=self._padded_mask(length))

    def beside(self, other: "SamplingSana") -> "SamplingSana":
        """Concatenate the other's captions (one for all rows, or as many); one-token captions become constants."""
        rows, length = len(self.keys[0]) // self.copies, max(self.length, other.length)
        if other.mask is None and other.length == 1:
            constants = [b.cross.constant(v) for b, v in zip(self.dit.blocks, other.values, strict=True)]
            return replace(self, constants=[c.expand(rows, -1) for c in constants], copies=self.copies + 1)
        keys, values = (
            [torch.cat([_pad(x, length), _pad(y, length).expand(rows, -1, -1, -1)]) for x, y in zip(*pair, strict=True)]
            for pair in ((self.keys, other.keys), (self.values, other.values))
        )
        unmasked = self.mask is None and other.mask is None and self.length == other.length
        masks = [self._padded_mask(length), other._padded_mask(length).expand(rows, -1)]
        mask = None if unmasked else torch.cat(masks)
        return replace(self, keys=keys, values=values, mask=mask, copies=self.copies + 1)

    def _padded_mask(self, length: int) -> Tensor:
        full = self.keys[0].new_ones(len(self.keys[0]), self.length, dtype=torch.bool)
        return F.pad(full if self.mask is None else self.mask, (0, length - self.length))


def prepare(dit: Any, text: Text, times: Tensor | None, masked: bool, guidance: float | None = None) -> SamplingSana:
    """Implementation of `Sana.prepare`: project captions once and embed known times in one call."""
    caption = dit.caption_embed(text.tokens)
    keys, values = zip(*(block.cross.keys_values(caption) for block in dit.blocks), strict=True)
    modulations = None if times is None else schedule(dit, times, guidance)
    return SamplingSana(dit, [*keys], [*values], text.mask if masked else None, modulations, guidance=guidance)


def schedule(dit: Any, times: Tensor, guidance: float | None = None) -> Schedule:
    """Modulation of the first distinct times of (M,) or intervals (M, 2), at most the limit above."""
    distinct = [*dict.fromkeys(map(as_time, times.tolist()))][:MAX_TIMES]
    six, time = modulation(dit, times.new_tensor(distinct), guidance)
    return Schedule({t: i for i, t in enumerate(distinct)}, six.transpose(0, 1)[:, :, None], time[:, None])


def modulation(dit: Any, t: Tensor, guidance: float | None = None) -> tuple[Tensor, Tensor]:
    """AdaLN vectors (depth, B, 6, C) of all blocks and the time embedding (B, C) of times (B,)."""
    scale = None if guidance is None else torch.full((len(t),), guidance, device=dit.head.table.device)
    time, six = dit.modulation(t, scale)
    return torch.stack([block.table + six for block in dit.blocks]), time


def _pad(x: Tensor, length: int) -> Tensor:
    """Keys or values (B, H, L, D) right-padded with zeros to (B, H, length, D)."""
    return F.pad(x, (0, 0, 0, length - x.shape[2]))
