"""Gated residual, LayerNorm and modulation in plain torch: reference and closed-form gradients.

B batch, h, w token grid, C width; gate, scale and shift are per image and broadcast over its tokens:
    sum = x + gate y        n = (sum - mean) / sqrt(variance + eps)        out = n (1 + scale) + shift
With dn = dout (1 + scale), means over C, and sums over tokens:
    dx = dsum + (dn - mean dn - n mean(dn n)) / sqrt(variance + eps)        dy = gate dx
    dgate = sum of dx y        dshift = sum of dout        dscale = sum of dout n
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6


def definition(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(sum, out) in plain torch; the sum is x if y is None, and out is the sum if shift and scale are None.

    Without autograd, intermediate results are overwritten in place; the result is bitwise identical.
    """
    if y is not None:
        x = x + y if gate is None else _apply("add", gate[:, None, None] * y, x)
    if shift is None or scale is None:
        return x, x
    out = _apply("mul", F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale[:, None, None])
    return x, _apply("add", out, shift[:, None, None])


def _apply(operation: Literal["add", "mul"], x: Tensor, other: Tensor) -> Tensor:
    """Sum or product, in the memory of x if its dtype and autograd allow."""
    in_place = not torch.is_grad_enabled() and torch.promote_types(x.dtype, other.dtype) == x.dtype
    return getattr(x, operation + "_" * in_place)(other)


def gradients(
    dsum: Tensor | None,
    dout: Tensor | None,
    total: Tensor | None,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of `definition`: (dx, dy, dgate, dshift, dscale), float32 or wider; None for arguments that are None.

    `total` is the sum; `dout` and `scale` are both given or both None, as are y and gate (without a gate, dy is dx).
    """
    dx, dshift, dscale = dsum, None, None
    if total is not None and dout is not None and scale is not None:
        normed, rate = normalised(wide(total))
        dout = wide(dout)
        dn = dout * (1 + wide(scale)[:, None, None])
        dx = rate * (dn - dn.mean(-1, keepdim=True) - normed * (dn * normed).mean(-1, keepdim=True))
        dx = dx if dsum is None else dx + wide(dsum)
        dshift, dscale = dout.sum((1, 2)), (dout * normed).sum((1, 2))
    if dx is None or y is None or gate is None:
        return dx, None, None, dshift, dscale
    return dx, wide(gate)[:, None, None] * wide(dx), (wide(dx) * wide(y)).sum((1, 2)), dshift, dscale


def normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """x with mean 0 and variance 1 over its last axis, and the factor 1 / sqrt(variance + eps)."""
    rate = (x.var(-1, correction=0, keepdim=True) + EPS).rsqrt()
    return (x - x.mean(-1, keepdim=True)) * rate, rate


def wide(x: Tensor) -> Tensor:
    """x in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
