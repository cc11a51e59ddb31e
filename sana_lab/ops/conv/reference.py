"""3x3 convolution fused with activation, norm and residual: the reference, and a Winograd form on the CPU.

Shapes: B batch, C and O channels in and out, h x w grid.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from sana_lab.ops.conv import winograd
from sana_lab.ops.inference_backend import Fast, uses_fast
from sana_lab.ops.rms_norm.reference import rms_norm_2d, rows

Activation = Literal["none", "relu", "silu"]

LEAST_TILES, LEAST_CHANNELS = 256, 32  # thresholds above which Winograd is faster


class Norm(NamedTuple):
    """RMSNorm over the channels: weight and bias (O,)."""

    weight: Tensor
    bias: Tensor
    eps: float


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "none",
    norm: Norm | None = None,
    residual: Tensor | None = None,
    backend: Fast = "auto",
) -> Tensor:
    """residual + norm(activation(conv(x, weight) + bias)) with zero padding: (B, C, h, w) -> (B, O, h, w).

    The fast form is Winograd's F(4x4, 3x3) on the CPU, with relative L2 error about 2e-6 in float32; it does not
    support autograd. `auto` selects it for float32 inputs large enough to gain from it; the norm selects its own
    backend. ValueError for an unsupported backend.
    """
    tensors = (x, weight, bias, residual, *(norm[:2] if norm else ()))
    if uses_fast(backend, *tensors, pays=pays(x, weight)) and x.device.type == "cpu":
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"backend 'fast' on the CPU needs float32 or float64, not {x.dtype}; 'auto' does not")
        norm_arguments = norm or (None, None, 0.0)
        return operator(x, weight, bias, activation, *norm_arguments, residual)
    y = activate(F.conv2d(x, weight, bias, padding=1), activation, not uses_fast("auto", *tensors))
    if norm is not None:
        return rms_norm_2d(y, *norm, residual, backend)
    return y if residual is None else residual + y


def activate(y: Tensor, activation: str, keep: bool = True) -> Tensor:
    """Apply an activation by name; y may be overwritten if `keep` is False."""
    if activation == "none":
        return y
    return {"relu": F.relu, "silu": F.silu}[activation](y, inplace=not keep)


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether Winograd is expected to be faster than torch's convolution: large grids with many channels."""
    tiles = len(x) * -(-x.shape[2] // 4) * -(-x.shape[3] // 4)
    enough = tiles >= LEAST_TILES and min(weight.shape[:2]) >= LEAST_CHANNELS
    return x.device.type == "cpu" and x.dtype == torch.float32 and enough


@torch.library.custom_op("sana_lab::conv3x3", mutates_args=(), device_types="cpu")
def operator(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> Tensor:
    """`conv3x3` by Winograd, as a custom operator for torch.compile and FLOP counters."""
    added = None if residual is None else residual.permute(0, 2, 3, 1)

    def finish(values: Tensor, place: Tensor, block: winograd.Block) -> None:
        around = None if added is None else block.cells(added)
        if norm_weight is not None and norm_bias is not None:
            rows(activate(values, activation, keep=False), norm_weight, norm_bias, eps, around, place)
        elif around is not None:
            torch.add(activate(values, activation, keep=False), around, out=place)
        else:
            place.copy_(activate(values, activation, keep=False))

    return winograd.conv3x3(x, weight, bias, finish)


@operator.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    shape = (len(x), len(weight), *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@register_flop_formula(torch.ops.sana_lab.conv3x3)
def _flops(x_shape: torch.Size, weight_shape: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    """FLOPs of the reference."""
    return conv_flop_count(list(x_shape), list(weight_shape), list(out_shape))
