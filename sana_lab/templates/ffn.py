"""A feed-forward layer: tokens (B, h, w, C) to tokens."""

import torch.nn.functional as F
from torch import Tensor, nn


class GatedMlp(nn.Module):
    """GEGLU (arXiv 2002.05202): one half of the hidden features gates the other."""

    def __init__(
        self,
        ratio: float = 2.5,  # hidden width over the width of the tokens
        *,
        dim: int,  # width of the tokens, supplied by the DiT
    ) -> None:
        super().__init__()
        hidden = round(ratio * dim)
        self.open = nn.Linear(dim, 2 * hidden)
        self.close = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        value, gate = self.open(x).chunk(2, -1)
        return self.close(value * F.gelu(gate))
