"""RMSNorm over channels plus residual (`reference.definition`) in Triton; each tensor is read or written once.

A program handles a few cells of a channels-last grid with all their channels. All arithmetic is float32, and the result
is rounded once. Letters: P cells, C channels, W = C rounded up to a power of two, ROWS cells in a program.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_lab.ops.backend import on_device


@triton.jit
def _kernel(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, residual: tl.tensor, out: tl.tensor, P: int, C: int, eps: float,
    W: tl.constexpr, ROWS: tl.constexpr, ADDED: tl.constexpr,
) -> None:  # fmt: skip
    p = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, W)
    inside = (p < P)[:, None] & (c < C)[None, :]
    places = p[:, None] * C + c[None, :]
    row = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    rate = 1.0 / tl.sqrt(tl.sum(row * row, 1) / C + eps)
    weights = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    y = row * rate[:, None] * weights[None, :] + shift[None, :]
    if ADDED:
        y += tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + places, y.to(out.dtype.element_ty), mask=inside)


class CellTiling(NamedTuple):
    """Tiling: W and ROWS as above, and warps per program."""

    width: int
    rows: int
    warps: int


def plan(channels: int) -> CellTiling:
    """About 4,096 elements per program, 32 per thread."""
    width = max(16, triton.next_power_of_2(channels))
    rows = max(1, 4096 // width)
    return CellTiling(width, rows, max(1, min(16, width * rows // 1024)))


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None) -> Tensor:
    """x (B, C, h, w) -> same shape, channels last; other memory formats are copied first."""
    x = _ordered(x)
    added = x if residual is None else _ordered(residual)
    out = torch.empty_like(x)
    cells, cut = x.numel() // x.shape[1], plan(x.shape[1])
    _launch(cells, cut, x, weight.contiguous(), bias.contiguous(), added, out, eps, residual is not None)
    return out


def _launch(cells: int, cut: CellTiling, x: Tensor, *arguments: Any) -> None:
    *tensors, eps, added = arguments
    with on_device(x):
        _kernel[(triton.cdiv(cells, cut.rows),)](
            x, *tensors, cells, x.shape[1], eps, W=cut.width, ROWS=cut.rows, ADDED=added, num_warps=cut.warps
        )


def _ordered(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
