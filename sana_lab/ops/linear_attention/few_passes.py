"""Linear attention on the CPU in few passes over memory, for inference.

relu and the layout of the products are one pass over q and one over k, in the same buffer; S and z are one matrix, so
that one product gives numerator and normaliser; the division writes the tokens' layout.
"""

import torch
from torch import Tensor

from sana_lab.ops.backend import is_direct, no_autocast


def applies(q: Tensor) -> bool:
    """Whether q is on the CPU, and nothing records a gradient, traces or counts operators."""
    return q.device.type == "cpu" and is_direct(q)


def few_passes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, eps: float) -> Tensor:
    """`definition` of q, k, v (B, N, H, D) of any strides: (B, N, H, D), contiguous, in v's dtype."""
    d, dtype = v.shape[-1], torch.promote_types(v.dtype, torch.float32)
    with no_autocast(v.device):
        out = torch.empty(v.shape, dtype=v.dtype)
        q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # (B, H, N, D)
        rows = torch.clamp_min(k, 0, out=torch.empty(k.shape, dtype=dtype))
        if mask is not None:
            rows.masked_fill_(~mask[:, None, :, None], 0)
        state = torch.cat([rows.mT @ v, rows.sum(2)[..., None]], 3)  # (B, H, D, D + 1): S and z
        read = torch.clamp_min(q, 0, out=rows) @ state
        torch.div(read[..., :d], read[..., d:] + eps, out=out.transpose(1, 2))
        return out
