"""A text encoder: prompts to token features and their mask."""

from collections.abc import Sequence

import torch
from torch import nn

from sana_lab.models.text import TextEncoder
from sana_lab.types import Text


class Letters(TextEncoder):
    """One learned vector for each byte of a prompt."""

    def __init__(
        self,
        dim: int = 32,  # width of the features
        max_tokens: int = 48,  # bytes that are read; longer prompts are truncated
    ) -> None:
        super().__init__()
        self.dim, self.max_tokens = dim, max_tokens
        self.bytes = nn.Embedding(257, dim)  # 256 is the end of a prompt

    def forward(self, prompts: Sequence[str]) -> Text:
        """Tokens (B, L, dim) and their mask (B, L); the empty prompt is the null condition of guidance."""
        rows = [[*prompt.encode()[: self.max_tokens - 1], 256] for prompt in prompts]
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=self.bytes.weight.device)
        mask = torch.tensor([[i < len(row) for i in range(length)] for row in rows], device=ids.device)
        return Text(self.bytes(ids), mask)
