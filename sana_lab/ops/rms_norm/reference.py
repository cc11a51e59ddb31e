"""RMSNorm over the channels of a feature map plus an optional residual: the reference and fast forms."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sana_lab.ops.backend import missing_triton
from sana_lab.ops.inference_backend import Fast, uses_fast
from sana_lab.ops.threads import share

CELLS = 1 << 18  # elements of a piece that fits in a core's cache

DTYPES = {"cpu": (torch.float32, torch.float64), "cuda": (torch.float32, torch.float16, torch.bfloat16)}
"""Dtypes that the fast forms support, by device type."""


def rms_norm_2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None = None,
    backend: Fast = "auto",
) -> Tensor:
    """x / sqrt(mean over channels of x^2 + eps) * weight + bias + residual: (B, C, h, w) -> same, in x's dtype.

    Statistics are in float32 or wider. The fast forms do not support autograd, round once, at the end, and are
    efficient for channels-last memory: float32 and float64 on the CPU, in cache-sized pieces; a Triton kernel on CUDA.
    ValueError for an unsupported backend.
    """
    if uses_fast(backend, x, weight, bias, residual, pays=unsupported(x) is None):
        if backend == "fast" and (missing := unsupported(x)):
            raise ValueError(f"backend 'fast' of RMSNorm needs {missing}; backend 'torch' does not")
        return operator(x, weight, bias, eps, residual)
    return definition(x, weight, bias, eps, residual)


def definition(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """`rms_norm_2d` in plain torch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)
    y = (x * scale).to(x.dtype) * weight[:, None, None] + bias[:, None, None]
    return y if residual is None else residual + y


def unsupported(x: Tensor) -> str | None:
    """Requirement of the fast form that x does not meet, for an error message; None if supported."""
    if x.device.type not in DTYPES:
        return f"tensors on the CPU or on CUDA, not on {x.device.type}"
    if x.dtype not in DTYPES[x.device.type]:
        return f"{', '.join(map(str, DTYPES[x.device.type]))} on {x.device.type}, not {x.dtype}"
    return missing_triton() if x.device.type == "cuda" else None


@torch.library.custom_op("sana_lab::rms_norm_2d", mutates_args=(), device_types="cpu")
def operator(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    """Fast form of `rms_norm_2d`, as a custom operator for torch.compile."""
    cells = torch.empty_like(x, memory_format=torch.channels_last).permute(0, 2, 3, 1)
    source = x.permute(0, 2, 3, 1)
    added = None if residual is None else residual.permute(0, 2, 3, 1)

    def work(pieces: Iterator[tuple[int, slice]]) -> None:
        for piece in pieces:
            values = source[piece].clone()
            rows(values, weight, bias, eps, None if added is None else added[piece], cells[piece])

    share(pieces_of(source), work)
    return cells.permute(0, 3, 1, 2)


@operator.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    from sana_lab.ops.rms_norm import kernels as kernel

    return kernel.forward(x, weight, bias, eps, residual)


@operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def pieces_of(x: Tensor) -> list[tuple[int, slice]]:
    """Image and rows of each piece of x (B, h, w, C)."""
    images, height, *row = x.shape
    step = max(1, CELLS // max(1, row[0] * row[1]))
    return [(image, slice(top, top + step)) for image in range(images) for top in range(0, height, step)]


def rows(y: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None, out: Tensor) -> None:
    """Write the norm of y (..., C), which is overwritten, plus the residual to `out`."""
    scale = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(y.shape[-1]).add_(eps).rsqrt_()
    torch.addcmul(bias, y.mul_(scale), weight, out=out)
    if residual is not None:
        out.add_(residual)
