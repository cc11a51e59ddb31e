"""Interface of the denoisers: (x_t, t, text) -> velocity."""

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from sana_lab.types import Text

Quantize = Literal["none", "int8", "w8a8"]


class Prepared(NamedTuple):
    """What depends on the prompt alone, computed once per prompt and reused over all sampling steps."""

    keys: list[Tensor]  # per block (B, heads, L, D)
    values: list[Tensor]  # per block (B, heads, L, D)
    mask: Tensor  # (B, L) bool

    def repeat(self, times: int) -> "Prepared":
        """Each row so many times in succession."""
        keys, values = ([x.repeat_interleave(times, 0) for x in part] for part in (self.keys, self.values))
        return Prepared(keys, values, self.mask.repeat_interleave(times, 0))


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

        `guidance` (B,), such as 4.5, is for models that were distilled with it, and for no other.
        """
