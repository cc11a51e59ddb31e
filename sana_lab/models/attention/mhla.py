"""Linear attention with heads of tokens (MHLA, arXiv 2601.07832): each block of the grid reads its own sum of states.

Legend: B batch, H heads, D head width, M blocks of n tokens. For block b:  S_b = sum relu(k)^T v,  z_b = sum relu(k);
out_i = relu(q_i) sum_b m[a(i), b] S_b / (relu(q_i) sum_b m[a(i), b] z_b + eps), a(i) the block of token i.
"""

from collections.abc import Callable
from typing import Annotated, final

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn import functional as F

from sana_lab.config.ranges import Positive, Width
from sana_lab.models.attention import Attention
from sana_lab.ops.backend import no_autocast


@final
class Mhla(Attention):
    """ReLU linear attention whose sums over keys are taken per block of tokens and mixed by learned weights m > 0.

    m = exp(mixing), which begins as minus the distance between blocks, in blocks; if all of m are equal it is `linear`.
    The rank of the attention matrix is at most M D in place of D. Plain torch on every device.
    """

    def __init__(
        self,
        head_dim: Width = 32,  # width of a head; divides the model's width
        qk_norm: bool = False,  # RMSNorm of q and k over the full width
        blocks: Annotated[int, Ge(1), Le(32)] = 4,  # blocks on each side of the grid
        eps: Positive = 1e-8,  # added to the normaliser; above 0
        *,
        dim: int,
    ) -> None:
        super().__init__(dim, head_dim, qk_norm)
        self.blocks, self.eps = blocks, eps
        at = torch.cartesian_prod(torch.arange(blocks), torch.arange(blocks)).view(-1, 2).float()
        self.mixing = nn.Parameter(-(at[:, None] - at).square().sum(-1).sqrt())  # (M, M)

    def forward(self, x: Tensor, values: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Attention of the tokens in the order of their blocks; tokens of zeros fill blocks at the edge."""
        h, w = x.shape[1:3]
        high, wide = -(-h // self.blocks), -(-w // self.blocks)  # sides of a block
        x = F.pad(x, (0, 0, 0, self.blocks * wide - w, 0, self.blocks * high - h))
        x = x.unflatten(2, (-1, wide)).unflatten(1, (-1, high))  # (B, blocks, high, blocks, wide, C)
        out = super().forward(x.transpose(2, 3).flatten(3, 4).flatten(1, 2), values)  # (B, M, n, C)
        out = out.unflatten(2, (high, wide)).unflatten(1, (self.blocks, self.blocks)).transpose(2, 3)
        return out.flatten(3, 4).flatten(1, 2)[:, :h, :w]

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dtype, d = v.dtype, v.shape[-1]
        wide = torch.promote_types(dtype, torch.float32)
        with no_autocast(v.device):
            q, k, v = (t.to(wide).unflatten(1, (len(self.mixing), -1)).permute(0, 3, 1, 2, 4) for t in (q, k, v))
            states = k.relu().mT @ F.pad(v, (0, 1), value=1.0)  # (B, H, M, D, D + 1): S and z of each block
            mixed = (self.mixing.to(wide).exp() @ states.flatten(3)).unflatten(3, (d, d + 1))
            out = q.relu() @ mixed  # (B, H, M, n, D + 1): numerator and normaliser
            out = out[..., :d] / (out[..., d:] + self.eps)
            return out.permute(0, 2, 3, 1, 4).flatten(1, 2).to(dtype)
