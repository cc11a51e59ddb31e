"""Gated residual, LayerNorm and modulation (`closed_form`) in Triton: one pass forward, one backward.

A program handles a run of tokens of one image, one token with all its channels at a time. Sums over tokens, for the
gradients of gate, shift and scale, are written as one partial per program and added in a fixed order, without atomics,
so results are bitwise reproducible. The sum, which the block needs anyway, is saved for the backward, and y if there is
a gate. All arithmetic is float32.

Letters: N tokens, w per row, C channels, W = C rounded up to a power of two, LOOPS tokens in a run. Flags: RESIDUAL if
y is given, GATED if gate is given, NORMED if shift and scale are given.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sana_lab.ops.backend import on_device
from sana_lab.ops.modulate import closed_form as closed

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@triton.jit
def _token(base: tl.tensor, strides: tl.tuple, b: tl.tensor, n: tl.tensor, w: int, c: tl.tensor) -> tl.tensor:
    """Pointers (W,) to token n of image b in a (B, h, w, C) tensor of any strides; all in int64."""
    start = base + b * strides[0] + (n // w) * strides[1] + (n % w) * strides[2]
    return start + c.to(tl.int64) * strides[3]


@triton.jit
def _vector(base: tl.tensor, strides: tl.tuple, b: tl.tensor, c: tl.tensor, C: int) -> tl.tensor:
    """Vector (W,) of image b from (B, C), as float32."""
    return tl.load(base + b * strides[0] + c.to(tl.int64) * strides[1], mask=c < C, other=0.0).to(tl.float32)


@triton.jit
def _load(row: tl.tensor, inside: tl.tensor) -> tl.tensor:
    return tl.load(row, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _normalise(x: tl.tensor, c: tl.tensor, C: int, eps: float) -> tuple[tl.tensor, tl.tensor]:
    """x with mean 0 and variance 1, and the factor 1 / sqrt(variance + eps)."""
    centred = tl.where(c < C, x - tl.sum(x, 0) / C, 0.0)
    rate = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / C + eps)
    return centred * rate, rate


@triton.jit
def _forward_kernel(
    x: tl.tensor, y: tl.tensor, gate: tl.tensor, shift: tl.tensor, scale: tl.tensor, total: tl.tensor, out: tl.tensor,
    x_strides: tl.tuple, y_strides: tl.tuple, total_strides: tl.tuple, out_strides: tl.tuple,
    gate_strides: tl.tuple, shift_strides: tl.tuple, scale_strides: tl.tuple, N: int, w: int, C: int, eps: float,
    W: tl.constexpr, LOOPS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, NORMED: tl.constexpr,
) -> None:  # fmt: skip
    b, c = tl.program_id(1).to(tl.int64), tl.arange(0, W)
    if GATED:
        gates = _vector(gate, gate_strides, b, c, C)
    if NORMED:
        shifts, scales = _vector(shift, shift_strides, b, c, C), _vector(scale, scale_strides, b, c, C)
    for i in range(LOOPS):
        n = tl.program_id(0).to(tl.int64) * LOOPS + i
        inside = (c < C) & (n < N)
        row = _load(_token(x, x_strides, b, n, w, c), inside)
        if RESIDUAL:
            added = _load(_token(y, y_strides, b, n, w, c), inside)
            if GATED:
                added = added * gates
            rounded = (row + added).to(total.dtype.element_ty)
            tl.store(_token(total, total_strides, b, n, w, c), rounded, mask=inside)
            row = rounded.to(tl.float32)
        if NORMED:
            normed, _ = _normalise(row, c, C, eps)
            tile = normed * (1.0 + scales) + shifts
            tl.store(_token(out, out_strides, b, n, w, c), tile.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    dsum: tl.tensor, dout: tl.tensor, total: tl.tensor, y: tl.tensor, gate: tl.tensor, scale: tl.tensor,
    dx: tl.tensor, dy: tl.tensor, sums: tl.tensor,
    dsum_strides: tl.tuple, dout_strides: tl.tuple, total_strides: tl.tuple, y_strides: tl.tuple,
    dx_strides: tl.tuple, dy_strides: tl.tuple, gate_strides: tl.tuple, scale_strides: tl.tuple,
    N: int, w: int, C: int, eps: float,
    W: tl.constexpr, LOOPS: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr, NORMED: tl.constexpr,
) -> None:  # fmt: skip
    """`sums` (runs, 1 to 3, B, C) float32: dgate if GATED, then dshift and dscale if NORMED."""
    b, c = tl.program_id(1).to(tl.int64), tl.arange(0, W)
    dgate, dshift, dscale = tl.zeros((W,), tl.float32), tl.zeros((W,), tl.float32), tl.zeros((W,), tl.float32)
    if GATED:
        gates = _vector(gate, gate_strides, b, c, C)
    if NORMED:
        scales = _vector(scale, scale_strides, b, c, C)
    for i in range(LOOPS):
        n = tl.program_id(0).to(tl.int64) * LOOPS + i
        inside = (c < C) & (n < N)
        grad = tl.zeros((W,), tl.float32)
        if RESIDUAL:
            grad = _load(_token(dsum, dsum_strides, b, n, w, c), inside)
        if NORMED:
            normed, rate = _normalise(_load(_token(total, total_strides, b, n, w, c), inside), c, C, eps)
            upstream = _load(_token(dout, dout_strides, b, n, w, c), inside)
            dn = upstream * (1.0 + scales)
            grad += rate * (dn - tl.sum(dn, 0) / C - normed * (tl.sum(dn * normed, 0) / C))
            dshift += upstream
            dscale += upstream * normed
            tl.store(_token(dx, dx_strides, b, n, w, c), grad.to(dx.dtype.element_ty), mask=inside)
        if GATED:
            dgate += grad * _load(_token(y, y_strides, b, n, w, c), inside)
            tl.store(_token(dy, dy_strides, b, n, w, c), (gates * grad).to(dy.dtype.element_ty), mask=inside)
    size = tl.num_programs(1).to(tl.int64) * C
    to = sums + tl.program_id(0).to(tl.int64) * (GATED + 2 * NORMED) * size + b * C + c
    if GATED:
        tl.store(to, dgate, mask=c < C)
    if NORMED:
        tl.store(to + GATED * size, dshift, mask=c < C)
        tl.store(to + (GATED + 1) * size, dscale, mask=c < C)


class TokenTiling(NamedTuple):
    """Tiling: W and LOOPS as above, and warps per program."""

    width: int
    loops: int
    warps: int

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Launch grid for x (B, h, w, C): (runs, B)."""
        return triton.cdiv(x.shape[1] * x.shape[2], self.loops), x.shape[0]


def plan(x: Tensor, least: int, most: int, programs: int = 4 * 132) -> TokenTiling:
    """Tiling of x (B, h, w, C), as a function of its shape only.

    Sixteen channels per thread if C is large enough. Runs of `least` to `most` tokens, a power of two, for `programs`
    programs (4 per multiprocessor of an H200) if possible: each program reads the vectors once and, in the backward,
    writes sums of the same size once.
    """
    width = max(16, triton.next_power_of_2(x.shape[-1]))
    loops = x.shape[0] * x.shape[1] * x.shape[2] // programs
    loops = min(most, max(least, 1 << max(0, loops.bit_length() - 1)))
    return TokenTiling(width, loops, min(16, max(1, width // 512)))


def interpreted() -> bool:
    return not isinstance(_forward_kernel, triton.JITFunction)


def launch(
    kernel: Any, cut: TokenTiling, x: Tensor, tensors: tuple[Tensor | None, ...], *arguments: Any, **flags: bool
) -> None:
    """Launch a kernel over the tokens of x. Unused pointers are set to x's."""
    _, h, w, c = x.shape
    with on_device(x):
        kernel[cut.grid(x)](
            *(x if t is None else t for t in tensors), *arguments, h * w, w, c, closed.EPS,
            W=cut.width, LOOPS=cut.loops, num_warps=cut.warps, **flags,
        )  # fmt: skip


def strides(like: Tensor, *tensors: Tensor | None) -> tuple[tuple[int, ...], ...]:
    """Strides of each tensor; those of `like` for None."""
    return tuple((like if t is None else t).stride() for t in tensors)


def flags(y: Tensor | None, gate: Tensor | None, scale: Tensor | None) -> dict[str, bool]:
    return {"RESIDUAL": y is not None, "GATED": gate is not None, "NORMED": scale is not None}


def forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    narrow: torch.dtype | None, cut: TokenTiling | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(sum, out), each (B, h, w, C); the sum is (0,) without y, out is (0,) without shift and scale; out in `narrow` if
    given."""
    total, out = outputs(x, y, gate, shift, scale, narrow)
    places = strides(x, x, y, total, out, gate, shift, scale)
    tensors = x, y, gate, shift, scale, total, out
    launch(_forward_kernel, cut or plan(x, 1, 8), x, tensors, *places, **flags(y, gate, scale))
    return total, out


def outputs(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    narrow: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Uninitialised results of `forward`, in torch's promoted dtypes."""
    wide = promoted(x, y, gate)
    out = narrow or torch.promote_types(wide, promoted(scale, shift, x)) if scale is not None else wide
    return (
        x.new_empty(x.shape if y is not None else 0, dtype=wide),
        x.new_empty(x.shape if scale is not None else 0, dtype=out),
    )


def promoted(*tensors: Tensor | None) -> torch.dtype:
    """Common dtype by torch's promotion rules."""
    dtypes = [t.dtype for t in tensors if t is not None]
    return functools.reduce(torch.promote_types, dtypes)


def backward(
    dsum: Tensor | None, dout: Tensor | None, total: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, dtype: torch.dtype, cut: TokenTiling | None = None,
) -> Grads:  # fmt: skip
    """(dx, dy, dgate, dshift, dscale), arguments as in `closed_form.gradients`; (0,) for arguments that are None."""
    like = next(t for t in (dout, dsum) if t is not None)
    cut, options = cut or plan(like, 4, 64), flags(dsum, gate, scale)
    dx, dy, *_ = gradient_outputs(like, y, gate, scale, dtype)
    count = options["GATED"] + 2 * options["NORMED"]
    runs, batch = cut.grid(like)
    sums = like.new_empty((runs, count, batch, like.shape[-1]), dtype=torch.float32)
    places = strides(like, dsum, dout, total, y, dx, dy, gate, scale)
    launch(_backward_kernel, cut, like, (dsum, dout, total, y, gate, scale, dx, dy, sums), *places, **options)
    return dx, dy, *vectors(sums.sum(0), gate, scale)


def gradient_outputs(
    like: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor | None, dtype: torch.dtype
) -> Grads:
    """Uninitialised results of `backward`."""
    dx = like.new_empty(like.shape if scale is not None else 0, dtype=dtype)
    dy = like.new_empty(0) if y is None or gate is None else y.new_empty(y.shape)
    dgate, dshift, dscale = (like.new_empty(0) if v is None else v.new_empty(v.shape) for v in (gate, scale, scale))
    return dx, dy, dgate, dshift, dscale


def vectors(sums: Tensor, gate: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Split sums (1 to 3, B, C) into dgate, dshift and dscale."""
    dgate = sums.new_empty(0) if gate is None else sums[0].to(gate.dtype, copy=True)
    if scale is None:
        return dgate, sums.new_empty(0), sums.new_empty(0)
    return dgate, sums[-2].to(scale.dtype, copy=True), sums[-1].to(scale.dtype, copy=True)


@torch.library.custom_op("sana_lab::modulate", mutates_args=())
def modulate(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None,
    narrow: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`forward` as a custom operator for torch.compile and autograd; the reference on the CPU."""
    if x.is_cuda or interpreted():
        return forward(x, y, gate, shift, scale, narrow)
    places = outputs(x, y, gate, shift, scale, narrow)
    for place, result in zip(places, closed.definition(x, y, gate, shift, scale), strict=True):
        if place.numel():
            place.copy_(result)
    return places


@torch.library.custom_op("sana_lab::modulate_backward", mutates_args=())
def modulate_backward(
    dsum: Tensor | None, dout: Tensor | None, total: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, dtype: torch.dtype,
) -> Grads:  # fmt: skip
    """`backward` as a custom operator; no second derivative."""
    like = next(t for t in (dout, dsum) if t is not None)
    if like.is_cuda or interpreted():
        return backward(dsum, dout, total, y, gate, scale, dtype)
    places = gradient_outputs(like, y, gate, scale, dtype)
    for place, result in zip(places, closed.gradients(dsum, dout, total, y, gate, scale), strict=True):
        if place.numel() and result is not None:
            place.copy_(result)
    return places


modulate.register_fake(outputs)


@modulate_backward.register_fake
def _(
    dsum: Tensor | None, dout: Tensor | None, total: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, dtype: torch.dtype,
) -> Grads:  # fmt: skip
    return gradient_outputs(next(t for t in (dout, dsum) if t is not None), y, gate, scale, dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, gate, _, scale, _ = inputs
    ctx.residual, ctx.gated, ctx.normed = y is not None, gate is not None, scale is not None
    ctx.x, ctx.y = x.dtype, None if y is None else y.dtype
    total = output[0] if ctx.residual else x
    ctx.save_for_backward(total if ctx.normed else None, y if ctx.gated else None, gate, scale)


def _differentiate(ctx: Any, dsum: Tensor, dout: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    upstream = dsum if ctx.residual else None, dout if ctx.normed else None
    dx, dy, dgate, dshift, dscale = modulate_backward(*upstream, *saved, ctx.x)
    dx = dx if ctx.normed else dsum.to(ctx.x)
    if ctx.residual and not ctx.gated:
        dy = dx.to(ctx.y)
    grads = (dx, True), (dy, ctx.residual), (dgate, ctx.gated), (dshift, ctx.normed), (dscale, ctx.normed)
    return *(grad if present else None for grad, present in grads), None


modulate.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula([torch.ops.sana_lab.modulate, torch.ops.sana_lab.modulate_backward])
def _flops(*_: Any, out_shape: Any = None) -> int:
    """Zero FLOPs: elementwise operations and norms are not counted."""
    return 0
