"""Interface of self-attention: the projections are shared, only the mixing differs.

Softmax and linear have the same parameters, the same state-dict keys, the same heads, biases and norms, so a
comparison is of the mixing alone (in the released code the switch also changes head width, bias and norm).
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from sana_lab.layers import RmsNorm, saturated
from sana_lab.parts import SpecError


class Attention(nn.Module, ABC):
    """Self-attention over a grid of tokens; a subclass says how q, k, v are mixed.

    SANA: qkv without bias, heads of width 32, optional RMSNorm of q and k over the full width, output with bias.
    """

    def __init__(self, dim: int, head_dim: int, qk_norm: bool) -> None:
        super().__init__()
        if dim % head_dim:
            raise SpecError(f"width {dim} is not a multiple of the attention's head_dim {head_dim}")
        self.heads = dim // head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.norm_q = RmsNorm(dim) if qk_norm else nn.Identity()
        self.norm_k = RmsNorm(dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    @abstractmethod
    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v (B, N, H, D), views of the fused projection -> (B, N, H, D)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        q, k, v = self.qkv(x).flatten(1, 2).chunk(3, -1)  # (B, N, C) each
        heads = [a.unflatten(-1, (self.heads, -1)) for a in (self.norm_q(q), self.norm_k(k), v)]
        return saturated(self.proj(self.mix(*heads).flatten(2))).view_as(x)
