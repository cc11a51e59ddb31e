"""Interface of the denoisers: (x_t, t, text) -> velocity."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor, nn

from sana_lab.types import Text


class Prepared(NamedTuple):
    """What depends on the prompt alone, computed once per prompt and reused over all sampling steps."""

    keys: list[Tensor]  # per block (B, heads, L, D)
    values: list[Tensor]  # per block (B, heads, L, D)
    mask: Tensor  # (B, L) bool


class Dit(nn.Module, ABC):
    """A diffusion transformer on latents (B, channels, h, w); h and w are multiples of `patch`."""

    channels: int
    patch: int

    @abstractmethod
    def prepare(self, text: Text) -> Prepared:
        """Projected caption and each block's cross-attention keys and values."""

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, text: Text | Prepared) -> Tensor:
        """Noisy latents (B, C, h, w) at times t (B,) in [0, 1] (1 is noise) -> velocity (B, C, h, w)."""
