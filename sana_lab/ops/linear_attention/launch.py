"""Launches of the Triton kernels of linear attention (`kernels`): shapes, memory, grids.

All memory comes from torch's allocator and nothing synchronises with the device, so CUDA graphs can capture the calls.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_lab.ops.backend import on_device
from sana_lab.ops.linear_attention import kernels
from sana_lab.ops.linear_attention.closed_form import nothing
from sana_lab.ops.linear_attention.tiling import SUMMED_IN_PLACE, Tiling, plan, power_of_two

Grads = tuple[Tensor, Tensor, Tensor]
Norm = tuple[Tensor, Tensor, Tensor]

INTERPRETED = not isinstance(kernels.state_kernel, triton.JITFunction)
"""Whether Triton interprets kernels on the CPU: TRITON_INTERPRET=1 was set when triton was imported."""


def launch(kernel: Any, cut: Tiling, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel over the heads and runs of x (B, N, H, D)."""
    constants |= {"D": x.shape[-1], "W": cut.width, "GROUP": cut.group, "T": cut.tile, "LOOPS": cut.loops}
    start(kernel, x, cut.grid(x), *arguments, **constants, PRECISION=cut.precision, num_warps=cut.warps)


def start(kernel: Any, x: Tensor, grid: tuple[int, int], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on x's device, unless the grid is empty."""
    if grid[0]:
        with on_device(x):
            kernel[grid](*arguments, **constants)


def product(dtype: torch.dtype, normed: bool) -> tl.dtype:
    """Dtype of the product k^T v: the input's, or float32 for bfloat16 in Triton's interpreter.

    A normalised k is float32.
    """
    if normed or (dtype == torch.bfloat16 and INTERPRETED):
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """(out (B, N, H, D) in the input dtype, state (B, H, D + 1, D) float32: S with z as the last row)."""
    out = q.new_empty(q.shape)
    return out, forward_into(out, q, k, v, mask, eps)


def forward_into(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    eps: float,
    norm: Norm | None = None,
    cut: Tiling | None = None,
) -> Tensor:
    """Write `out`, of any strides and float dtype, and return the state.

    `norm`: norm weights of q and k (H D,) and 1 / root mean square of k (B, N).
    """
    cut, n, heads = cut or plan(q), q.shape[1], q.shape[2]
    keep = k if mask is None else mask.contiguous()
    weight_q, weight_k, rstd = norm or (q, q, q)
    options = {"MASKED": mask is not None, "NORMED": norm is not None, "PRODUCT": product(q.dtype, norm is not None)}
    partials = new_states(q, cut.runs(q))
    to_sum = k.stride(), v.stride()
    if cut.single:
        inputs = q, k, v, keep, weight_q, weight_k, rstd, partials, out
        launch(kernels.forward_kernel, cut, q, *inputs, q.stride(), *to_sum, out.stride(), n, heads, eps, **options)
        return partials[0]
    launch(kernels.state_kernel, cut, q, k, v, keep, weight_k, rstd, partials, *to_sum, n, heads, **options)
    partials, parts = add_many(partials)
    state = partials[0] if parts == 1 else new_states(q, 1)[0]
    to_apply = q, weight_q, partials, state, out, q.stride(), out.stride(), n, heads, eps
    launch(kernels.apply_kernel, cut, q, *to_apply, NORMED=norm is not None, PARTS=parts)
    return state


def backward_into(
    grads: Grads,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    state: Tensor,
    eps: float,
    norm: Norm | None = None,
    cut: Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """Write dq, dk and dv, of any strides and float dtypes.

    Returns the gradients of the norms' weights (H D,), or (0,) without norms.
    """
    cut, (dq, dk, dv) = cut or plan(q), grads
    if cut.single and norm is None:
        keep, to_kv = k if mask is None else mask.contiguous(), (k.stride(), v.stride())
        strides = q.stride(), *to_kv, dout.stride(), dq.stride(), dk.stride(), dv.stride()
        everything = q, k, v, keep, dout, state, dq, dk, dv, *strides, *q.shape[1:3], eps
        launch(kernels.backward_kernel, cut, q, *everything, MASKED=mask is not None)
        return nothing(q), nothing(q)
    dstates, dnorm_q = query_pass(dq, dout, q, state, eps, norm, cut)
    return dnorm_q, key_pass(dk, dv, k, v, mask, *add_many(dstates), norm, cut)


def query_pass(
    dq: Tensor, dout: Tensor, q: Tensor, state: Tensor, eps: float, norm: Norm | None, cut: Tiling
) -> tuple[Tensor, Tensor]:
    """Write dq; return (partials of dS and dz, gradient of q's norm weight)."""
    weight, partials = q if norm is None else norm[0], new_states(q, cut.runs(q))
    dnorm = new_weights(q, cut, norm)
    strides = q.stride(), dout.stride(), dq.stride()
    arguments = q, dout, weight, state, dq, partials, dnorm, *strides, *q.shape[1:3], eps
    launch(kernels.query_kernel, cut, q, *arguments, NORMED=norm is not None)
    return partials, dnorm if norm is None else dnorm.sum(0).to(weight.dtype)


def key_pass(
    dk: Tensor,
    dv: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dstates: Tensor,
    parts: int,
    norm: Norm | None,
    cut: Tiling,
) -> Tensor:
    """Write dk and dv; return the gradient of k's norm weight. The norm's mean over all heads needs a separate pass."""
    keep, (_, weight, rstd) = k if mask is None else mask.contiguous(), norm or (k, k, k)
    dnorm, options = new_weights(k, cut, norm), {"MASKED": mask is not None, "PARTS": parts}
    reading, sizes, means = (k.stride(), v.stride()), k.shape[1:3], rstd
    if norm is not None:
        products = k.new_empty(k.shape[:3], dtype=torch.float32)
        arguments = k, v, keep, weight, rstd, dstates, products, *reading, *sizes
        launch(kernels.key_products_kernel, cut, k, *arguments, **options)
        means = products.sum(2) / (k.shape[2] * k.shape[3])
    writing = dk, dv, dnorm, *reading, dk.stride(), dv.stride(), *sizes
    launch(kernels.key_value_kernel, cut, k, k, v, keep, weight, rstd, means, dstates, *writing, **options,
           NORMED=norm is not None)  # fmt: skip
    return dnorm if norm is None else dnorm.sum(0).to(weight.dtype)


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Tensor, eps: float) -> Grads:
    """(dq, dk, dv), each (B, N, H, D) in the input dtype."""
    grads = q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)
    backward_into(grads, dout, q, k, v, mask, state, eps)
    return grads


def qkv_forward(
    qkv: Tensor, norm_q: Tensor | None, norm_k: Tensor | None, norm_eps: float, mask: Tensor | None, eps: float
) -> Grads:
    """(out, state, 1 / root mean square of k (B, N), or (0,) without norms) of qkv (B, N, 3, H, D)."""
    q, k, v = qkv.unbind(2)
    if norm_q is None or norm_k is None:
        return *forward(q, k, v, mask, eps), nothing(qkv)
    out, rstd = q.new_empty(q.shape), inverse_rms(k, norm_eps)
    return out, forward_into(out, q, k, v, mask, eps, (norm_q, norm_k, rstd)), rstd


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
    """(dqkv (B, N, 3, H, D), gradients of the norms' weights)."""
    dqkv = qkv.new_empty(qkv.shape)
    norm = None if norm_q is None or norm_k is None else (norm_q, norm_k, rstd)
    dq, dk, dv = dqkv.unbind(2)
    q, k, v = qkv.unbind(2)
    return dqkv, *backward_into((dq, dk, dv), dout, q, k, v, mask, state, eps, norm)


def inverse_rms(k: Tensor, eps: float) -> Tensor:
    """1 / root mean square of each token's k over all heads: (B, N, H, D) -> (B, N) float32."""
    batch, n, heads, d = k.shape
    rstd = k.new_empty((batch, n), dtype=torch.float32)
    sizes = {"D": d, "C": heads * d, "T": 4, "W": min(1024, power_of_two(heads * d))}
    start(kernels.inverse_rms_kernel, k, (batch, -(-n // 4)), k, rstd, k.stride(), n, eps, **sizes, num_warps=4)
    return rstd


def new_states(q: Tensor, runs: int) -> Tensor:
    """Uninitialised partial states, one per run: (runs, B, H, D + 1, D)."""
    batch, _, heads, d = q.shape
    return q.new_empty((runs, batch, heads, d + 1, d), dtype=torch.float32)


def new_weights(q: Tensor, cut: Tiling, norm: Norm | None) -> Tensor:
    """Uninitialised partial gradients of a norm weight: (runs * B, H * D), or (0,) without a norm."""
    batch, _, heads, d = q.shape
    return nothing(q) if norm is None else q.new_empty((cut.runs(q) * batch, heads * d), dtype=torch.float32)


def add_many(partials: Tensor) -> tuple[Tensor, int]:
    """Partials for a kernel to sum, and their number rounded up to a power of two; many are first summed in order."""
    if len(partials) > SUMMED_IN_PLACE:
        return partials.sum(0, keepdim=True), 1
    return partials, power_of_two(len(partials))
