"""Interface of self-attention: shared projections; subclasses differ in how they mix q, k and v.

Softmax and linear attention have the same parameters, state-dict keys, heads, biases and norms; they differ only in the
mixing of tokens (in the released code the option also changes head width, bias and norm).
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from sana_lab.config.specs import SpecError
from sana_lab.models.layers import RmsNorm, saturated
from sana_lab.ops.cpu_linear import product


class Attention(nn.Module, ABC):
    """Self-attention over a grid of tokens; a subclass implements `mix`.

    As in SANA: qkv without bias, optional RMSNorm of q and k over the full width, output projection with bias.
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
        qkv = product(self.qkv, x).flatten(1, 2).unflatten(-1, (3, self.heads, -1))
        return saturated(self.proj(self.mix_fused(qkv).flatten(2))).view_as(x)

    def mix_fused(self, qkv: Tensor) -> Tensor:
        """Norms and `mix` of the projection (B, N, 3, H, D) -> (B, N, H, D); to override where a kernel fuses them."""
        q, k, v = qkv.unbind(2)
        q, k = self.norm_q(q.flatten(2)).view_as(q), self.norm_k(k.flatten(2)).view_as(k)
        return self.mix(q, k, v)
