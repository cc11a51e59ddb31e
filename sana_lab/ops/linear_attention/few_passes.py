"""Linear attention on the CPU in few passes over memory, for inference.

relu is one pass over q and one over k, in the same buffer; S and z are one matrix, so that one product gives numerator
and normaliser; the division writes the tokens' layout. The buffer is laid out by heads, as batched products want it,
unless q is one picture that fits in the cache: there the products read the tokens' layout and nothing is transposed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sana_lab.ops.backend import is_direct, no_autocast

CACHED = 2**19
"""Elements of q up to which strided products of one picture are the faster ones, measured on two cores of an EPYC."""


def applies(q: Tensor) -> bool:
    """Whether q is on the CPU, and nothing records a gradient, traces or counts operators."""
    return q.device.type == "cpu" and is_direct(q)


def few_passes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, eps: float) -> Tensor:
    """`definition` of q, k, v (B, N, H, D) of any strides: (B, N, H, D), contiguous, in v's dtype."""
    if torch.is_autocast_enabled("cpu"):
        with no_autocast(v.device):
            return few_passes(q, k, v, mask, eps)
    d, dtype = v.shape[-1], torch.promote_types(v.dtype, torch.float32)
    out = torch.empty(v.shape, dtype=v.dtype)
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))  # (B, H, N, D)
    product: Callable[[Tensor, Tensor], Tensor]
    if q.shape[0] == 1 and q.numel() <= CACHED:
        rows, product = torch.empty_like(out, dtype=dtype)[0].transpose(0, 1), torch.bmm
        q, k, v, written = q[0], k[0], v[0], out[0].transpose(0, 1)  # (H, N, D)
    else:
        rows, product = torch.empty(q.shape, dtype=dtype), torch.matmul
        written = out.transpose(1, 2)
    torch.clamp_min(k, 0, out=rows)
    if mask is not None:
        rows.masked_fill_(~mask[:, None, :, None] if rows.ndim == 4 else ~mask[0, :, None], 0)
    state = torch.cat([product(rows.mT, v), rows.sum(-2, keepdim=True).mT], -1)  # (..., D, D + 1): S and z
    read = product(torch.clamp_min(q, 0, out=rows), state)
    torch.div(read[..., :d], read[..., d:].add_(eps), out=written)
    return out
