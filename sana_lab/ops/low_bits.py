"""Numbers of 8 and 4 bits for matrix products: their definitions in plain torch, and the e4m3 product of a GPU.

`e4m3_rows` with `e4m3_product` are products in FP8 with a scale for each token and each output channel; `int4` and
`nvfp4` give the rounded values themselves, for simulations.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0
"""Largest magnitude of torch.float8_e4m3fn."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of a 4-bit float with two exponent bits and one of mantissa."""

TINY = 2.0**-100
"""Least scale, so that rows of zeros stay zeros."""


def e4m3_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., K) -> e4m3 values and float32 scales (..., 1), such that each row's largest magnitude is 448."""
    scale = (x.float().abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=TINY)
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def e4m3_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The definition: (M, K) and (N, K) in e4m3 with scales (M, 1) and (N, 1) -> (M, N) in float32."""
    out = (a.float() @ b.float().t()) * a_scale * b_scale.t()
    return out if bias is None else out + bias.float()


def e4m3_matmul(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The same in one kernel (`torch._scaled_mm`): bias and result in bfloat16. K and N are multiples of 16."""
    half = None if bias is None else bias.to(torch.bfloat16)
    return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale.t(), bias=half, out_dtype=torch.bfloat16)


def int4(x: Tensor, group: int = 64) -> Tensor:
    """Values rounded to integers from -7 to 7 times a scale for each `group` along the last axis (..., K)."""
    return _by_group(x, group, _int4)


def nvfp4(x: Tensor) -> Tensor:
    """Values rounded to e2m1 times an e4m3 scale for each 16 along the last axis, times one float32 scale."""
    whole = (x.float().abs().amax() / (E2M1[-1] * E4M3_MAX)).clamp(min=TINY)
    return _by_group(x, 16, lambda g: _e2m1(g, whole))


def _by_group(x: Tensor, group: int, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Round the last axis in groups; one that is not full is padded with zeros."""
    width = x.shape[-1]
    padded = F.pad(x.float(), (0, -width % group)).unflatten(-1, (-1, group))
    return rounded(padded).flatten(-2)[..., :width].to(x.dtype)


def _int4(x: Tensor) -> Tensor:
    scale = (x.abs().amax(-1, keepdim=True) / 7).clamp(min=TINY)
    return (x / scale).round().clamp(-7, 7) * scale


def _e2m1(x: Tensor, whole: Tensor) -> Tensor:
    """Groups (..., 16) rounded to the nearest magnitude, ties to the smaller."""
    share = x.abs().amax(-1, keepdim=True) / E2M1[-1] / whole
    scale = share.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float() * whole
    grid = x.new_tensor(E2M1)
    middles = (grid[1:] + grid[:-1]) / 2
    magnitude = grid[torch.bucketize((x / scale.clamp(min=TINY)).abs(), middles)]
    return magnitude * x.sign() * scale
