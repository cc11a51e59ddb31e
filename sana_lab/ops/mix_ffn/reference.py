"""Inner part of SANA's Mix-FFN (GLUMBConv), between its linear layers: SiLU, 3 x 3 depthwise, SiLU gate."""

import torch
from torch import Tensor

from sana_lab.ops.backend import Backend, check_launchable, choose, is_direct
from sana_lab.ops.mix_ffn.closed_form import definition

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNEL_SIZE = (3, 3)


def mix_ffn(x: Tensor, weight: Tensor, bias: Tensor, *, backend: Backend = "auto", overwrite: bool = False) -> Tensor:
    """Gated depthwise convolution of activated tokens: (B, h, w, 2M) -> (B, h, w, M), in x's dtype.

    `weight` (2M, 1, k, k) and `bias` (2M,) are those of a depthwise `Conv2d`. x may have any strides: images
    (B, 2M, h, w) that are channels last in memory need no copy in
    `mix_ffn(x.permute(0, 2, 3, 1), ...).permute(0, 3, 1, 2)`, and the result is channels last too. `overwrite` lets the
    reference reuse x's memory if no gradient is needed.

    With (a, g) the convolution of silu(x), the result is a silu(g). The Triton kernel supports 3 x 3 convolutions. It
    computes in float32 and rounds the result once; its backward saves only x, and rounds the gradient of (a, g) to x's
    dtype. ValueError for invalid shapes or dtypes, or an unsupported backend.
    """
    check(x, weight, bias)
    if choose(backend, x.device, unsupported(x, weight)) == "torch":
        return definition(x, weight, bias, overwrite and not torch.is_grad_enabled())
    from sana_lab.ops.mix_ffn import kernels as kernel

    check_launchable(x.device, kernel.interpreted())
    return (kernel.forward if is_direct(x) else kernel.mix_ffn)(x, weight, bias)


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Requirement of the kernel that the tensors do not meet, for an error message; None if supported."""
    wrong = [t.dtype for t in (x, weight) if t.dtype not in KERNEL_DTYPES]
    if wrong:
        return f"float16, bfloat16 or float32 tensors, not {wrong[0]}"
    if weight.shape[2:] != KERNEL_SIZE:
        return f"a depthwise kernel of 3 x 3, not {' x '.join(map(str, weight.shape[2:]))}"
    return None if x.numel() else "at least one token"


def check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """ValueError unless x is (B, h, w, 2M), weight (2M, 1, k, k), bias (2M,), floating and on one device."""
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(f"x must be (B, h, w, 2M), values and then gates; got {tuple(x.shape)}")
    c, k = x.shape[-1], weight.shape[-1]
    if weight.shape != (c, 1, k, k) or bias.shape != (c,):
        expected = f"({c}, 1, k, k) and bias ({c},), one for each of x's channels"
        raise ValueError(f"weight must be {expected}; got {tuple(weight.shape)} and {tuple(bias.shape)}")
    if not all(t.dtype.is_floating_point for t in (x, weight, bias)) or weight.dtype != bias.dtype:
        kinds = ", ".join(str(t.dtype) for t in (x, weight, bias))
        raise ValueError(f"x, weight and bias must be floating, weight and bias alike; got {kinds}")
    if not x.device == weight.device == bias.device:
        raise ValueError(f"x, weight and bias must be on one device; got {x.device}, {weight.device}, {bias.device}")
