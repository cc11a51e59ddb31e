"""ReLU linear attention (Katharopoulos et al., 2020; SANA, section 2.2), linear in the number of tokens."""

from typing import Annotated, Literal, final

from torch import Tensor

from sana_lab.attention import Attention
from sana_lab.ops.linear_attention import linear_attention
from sana_lab.parts import RUNTIME


@final
class LinearAttention(Attention):
    """relu(q) (relu(k)^T v) / (relu(q) sum relu(k) + eps); `backend` chooses the kernel and changes no result."""

    def __init__(
        self,
        head_dim: int = 32,
        qk_norm: bool = False,
        eps: float = 1e-8,
        backend: Annotated[Literal["auto", "torch", "triton"], RUNTIME] = "auto",
        *,
        dim: int,
    ) -> None:
        super().__init__(dim, head_dim, qk_norm)
        self.eps = eps
        self.backend: Literal["auto", "torch", "triton"] = backend

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, eps=self.eps, backend=self.backend)
