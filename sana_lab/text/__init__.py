"""Interface of the text encoders: prompts to token features."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import nn

from sana_lab.types import Text


class TextEncoder(nn.Module, ABC):
    """Prompts -> Text(tokens (B, L, dim), mask (B, L)); the null condition is `forward([""])`.

    A subclass gives `dim` (feature width) and `max_tokens` (the longest L).
    """

    dim: int
    max_tokens: int

    @abstractmethod
    def forward(self, prompts: Sequence[str]) -> Text:
        """Features of each prompt, right-padded to the longest of the batch (at most `max_tokens`)."""
