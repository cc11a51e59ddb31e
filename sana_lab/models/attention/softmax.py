"""Softmax attention (Vaswani et al., 2017), quadratic in the number of tokens."""

from typing import final

from torch import Tensor

from sana_lab.config.ranges import Width
from sana_lab.models.attention import Attention
from sana_lab.ops.softmax_attention import softmax_attention


@final
class SoftmaxAttention(Attention):
    """softmax(q k^T / sqrt(D)) v with PyTorch's fused kernels: products in the input's dtype, sums in float32."""

    def __init__(
        self,
        head_dim: Width = 32,  # width of a head; divides the model's width
        qk_norm: bool = False,  # RMSNorm of q and k over the full width (SANA-1.5)
        *,
        dim: int,
    ) -> None:
        super().__init__(dim, head_dim, qk_norm)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = softmax_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)
