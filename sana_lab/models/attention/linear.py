"""ReLU linear attention (Katharopoulos et al., 2020; SANA, section 2.2), linear in the number of tokens."""

from typing import Annotated, Literal, final

from torch import Tensor, nn

from sana_lab.config.ranges import Positive, Width
from sana_lab.config.specs import RUNTIME, SpecError
from sana_lab.models.attention import Attention
from sana_lab.models.layers import RmsNorm
from sana_lab.ops.linear_attention import Norms, linear_attention, qkv_linear_attention
from sana_lab.ops.linear_attention.reference import unsupported_width


@final
class LinearAttention(Attention):
    """relu(q) (relu(k)^T v) / (relu(q) sum relu(k) + eps)."""

    def __init__(
        self,
        head_dim: Width = 32,  # width of a head; divides the model's width
        qk_norm: bool = False,  # RMSNorm of q and k over the full width (SANA-1.5)
        eps: Positive = 1e-8,  # added to the normaliser; above 0
        # Implementation; does not change results. auto is the fused Triton kernel on CUDA, plain torch elsewhere.
        backend: Annotated[Literal["auto", "torch", "triton"], RUNTIME] = "auto",
        *,
        dim: int,
    ) -> None:
        super().__init__(dim, head_dim, qk_norm)
        if backend == "triton" and (needed := unsupported_width(head_dim)):
            raise SpecError(f"attention 'linear' with backend 'triton' needs {needed}; backend 'torch' does not")
        self.eps = eps
        self.backend: Literal["auto", "torch", "triton"] = backend

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, eps=self.eps, backend=self.backend)

    def mix_fused(self, qkv: Tensor) -> Tensor:
        match self.norm_q, self.norm_k:
            case nn.Identity(), nn.Identity():
                norms = None
            case RmsNorm() as q, RmsNorm() as k if q.eps == k.eps:
                norms = Norms(q.weight, k.weight, k.eps)
            case _:
                return super().mix_fused(qkv)
        return qkv_linear_attention(qkv, norms, eps=self.eps, backend=self.backend)
