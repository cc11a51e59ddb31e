"""2x nearest-neighbour upsampling and a 3x3 convolution: the reference, and a form with 4/9 of its multiplications.

Each output depends on 2 x 2 inputs. Adding the taps that read copies of the same input gives a 4 x 4 transposed
convolution of stride 2. Shapes: B batch, C and O channels in and out, h x w grid.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from sana_lab.ops.inference_backend import Fast, uses_fast

LEAST_CELLS = 900  # on smaller grids folding the kernel costs more than it saves


def upsample_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, backend: Fast = "auto") -> Tensor:
    """(B, C, h, w) -> (B, O, 2 h, 2 w), zero padding of the upsampled grid; weight (O, C, 3, 3).

    The fast form differs by rounding only and does not support autograd. ValueError for an unsupported backend.
    """
    if uses_fast(backend, x, weight, bias, pays=pays(x)):
        return operator(x, weight, bias)
    return F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)


def pays(x: Tensor) -> bool:
    """Whether the folded kernel is expected to be faster."""
    return x.device.type != "meta" and len(x) * x.shape[2] * x.shape[3] >= LEAST_CELLS


def folded(weight: Tensor) -> Tensor:
    """Kernel (C, O, 4, 4) of the equivalent transposed convolution."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return _summed(_summed(wide, 2), 3).transpose(0, 1).to(weight.dtype)


def _summed(weight: Tensor, axis: int) -> Tensor:
    """Four taps of three along an axis: those that read one cell of the grid before upsampling are added.

    Sums of slices, since a table of taps would be copied to the device at each call, and the host would wait.
    """
    first, middle, last = weight.unbind(axis)
    return torch.stack([last, middle + last, first + middle, first], axis)


@torch.library.custom_op("sana_lab::upsample_conv3x3", mutates_args=())
def operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Fast form of `upsample_conv3x3`, as a custom operator for torch.compile and FLOP counters."""
    return F.conv_transpose2d(x, folded(weight), bias, stride=2, padding=1)


@operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv_transpose2d(x, folded(weight), bias, stride=2, padding=1)


@register_flop_formula(torch.ops.sana_lab.upsample_conv3x3)
def _flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    """FLOPs of the reference."""
    return conv_flop_count(list(x_shape), list(weight_shape), list(out_shape))
