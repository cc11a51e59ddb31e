"""Nearest neighbours twice as large and a 3x3 convolution: the definition, and the same in 4/9 of the products.

Each output sees 2 x 2 inputs, the kernel's taps on the copies of one input being added beforehand: a transposed
convolution of 4 x 4 and stride 2. Shapes: B batch, C and O channels in and out, h x w grid.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from sana_lab.ops.inference_backend import Fast, uses_fast

TAPS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))
"""Which of the 3 rows of the kernel meet in each of the 4 rows of the transposed one."""

LEAST_CELLS = 900  # on smaller grids the kernel costs more to fold than it saves


def upsample_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, backend: Fast = "auto") -> Tensor:
    """(B, C, h, w) -> (B, O, 2 h, 2 w), zeros around the enlarged grid; weight (O, C, 3, 3).

    The fast form differs by rounding alone and records no gradient. ValueError for a backend that cannot be.
    """
    if uses_fast(backend, x, weight, bias, pays=pays(x)):
        return operator(x, weight, bias)
    return F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)


def pays(x: Tensor) -> bool:
    """Whether folding is expected to pay."""
    return x.device.type != "meta" and len(x) * x.shape[2] * x.shape[3] >= LEAST_CELLS


def folded(weight: Tensor) -> Tensor:
    """The kernel (C, O, 4, 4) of the transposed convolution."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    taps = torch.tensor(TAPS, dtype=wide.dtype, device=weight.device)
    return torch.einsum("ocyx,iy,jx->coij", wide, taps, taps).to(weight.dtype)


@torch.library.custom_op("sana_lab::upsample_conv3x3", mutates_args=())
def operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`upsample_conv3x3` in its fast form, as an operator that torch.compile and FLOP counters know."""
    return F.conv_transpose2d(x, folded(weight), bias, stride=2, padding=1)


@operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv_transpose2d(x, folded(weight), bias, stride=2, padding=1)


@register_flop_formula(torch.ops.sana_lab.upsample_conv3x3)
def _flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    """As of the definition."""
    return conv_flop_count(list(x_shape), list(weight_shape), list(out_shape))
