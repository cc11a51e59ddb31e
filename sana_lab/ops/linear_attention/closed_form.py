"""Linear attention and its closed-form gradients in plain torch: the operators' CPU implementation.

Formulas and letters are those of `kernels`; sums are in float32 or wider. All results are new contiguous tensors.
"""

import torch
from torch import Tensor

from sana_lab.ops.backend import no_autocast

Grads = tuple[Tensor, Tensor, Tensor]


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(out (B, N, H, D) in v's dtype, state (B, H, D + 1, D): S with z as the last row)."""
    queries, keys, values = wide(q).relu(), counted(wide(k).relu(), mask), wide(v)
    with no_autocast(q.device):
        s, z = keys.mT @ values, keys.sum(2, keepdim=True)
        return narrow(queries @ s / (queries @ z.mT + eps), v.dtype), torch.cat([s, z], 2)


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Tensor, eps: float) -> Grads:
    """(dq, dk, dv), each (B, N, H, D)."""
    queries, keys, values, grad = wide(q).relu(), counted(wide(k).relu(), mask), wide(v), wide(dout)
    with no_autocast(q.device):
        s, z = state[:, :, :-1], state[:, :, -1:]
        a = 1 / (queries @ z.mT + eps)
        t, r = grad @ s.mT, queries * a
        g = (r * t).sum(-1, keepdim=True)
        dq = torch.where(queries == 0, 0, a * (t - g * z))
        ds, dz = r.mT @ grad, -(r * g).sum(2, keepdim=True)
        dk = torch.where(keys == 0, 0, values @ ds.mT + dz)
        return narrow(dq, q.dtype), narrow(dk, k.dtype), narrow(keys @ ds, v.dtype)


def qkv_forward(
    qkv: Tensor, norm_q: Tensor | None, norm_k: Tensor | None, norm_eps: float, mask: Tensor | None, eps: float
) -> Grads:
    """(out, state, 1 / root mean square of k (B, N)) of qkv (B, N, 3, H, D); q is only scaled by its norm weight."""
    q, k, v = qkv.unbind(2)
    if norm_q is None or norm_k is None:
        return *forward(q, k, v, mask, eps), nothing(qkv)
    q, k, v = (widened(x) for x in (q, k, v))
    rstd = torch.rsqrt(k.square().mean((2, 3)) + norm_eps)
    out, state = forward(q * by_head(norm_q, q), k * rstd[..., None, None] * by_head(norm_k, k), v, mask, eps)
    return out.to(qkv.dtype), state, rstd


def qkv_backward(
    dout: Tensor,
    qkv: Tensor,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    mask: Tensor | None,
    state: Tensor,
    rstd: Tensor,
    eps: float,
) -> Grads:
    """(dqkv, gradients of the norm weights of q and k (H D,)); (0,) without norms."""
    q, k, v = (widened(x) for x in qkv.unbind(2))
    if norm_q is None or norm_k is None:
        dqkv = torch.stack(backward(widened(dout), q, k, v, mask, state, eps), 2).to(qkv.dtype)
        return dqkv, nothing(qkv), nothing(qkv)
    k, scale, weight_q, weight_k = (
        k * rstd[..., None, None],
        rstd[..., None, None],
        by_head(norm_q, q),
        by_head(norm_k, k),
    )
    dq, dk, dv = backward(widened(dout), q * weight_q, k * weight_k, v, mask, state, eps)
    dweight_q, dweight_k = (q * dq).sum((0, 1)).flatten(), (k * dk).sum((0, 1)).flatten()
    dk = dk * weight_k
    dk = scale * (dk - k * (k * dk).mean((2, 3), keepdim=True))
    dqkv = torch.stack([dq * weight_q, dk, dv], 2).to(qkv.dtype)
    return dqkv, dweight_q.to(norm_q.dtype), dweight_k.to(norm_k.dtype)


def nothing(x: Tensor) -> Tensor:
    """Placeholder (0,) for statistics or gradients without norms."""
    return x.new_empty(0, dtype=torch.float32)


def widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def wide(x: Tensor) -> Tensor:
    """(B, N, H, D) -> (B, H, N, D), float32 or wider."""
    return widened(x).transpose(1, 2)


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H, N, D) -> (B, N, H, D), contiguous."""
    return x.transpose(1, 2).to(dtype).contiguous()


def counted(keys: Tensor, mask: Tensor | None) -> Tensor:
    return keys if mask is None else keys.masked_fill(~mask[:, None, :, None], 0)


def by_head(weight: Tensor, x: Tensor) -> Tensor:
    """(C,) -> (H, D) of x (B, N, H, D), in x's dtype."""
    return weight.to(x.dtype).view(x.shape[2:])
