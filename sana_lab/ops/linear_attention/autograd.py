"""Linear attention as custom operators for torch.compile, torch.export, autograd, checkpointing and FLOP counters.

`sana_lab::linear_attention` takes q, k, v; `sana_lab::qkv_linear_attention` takes a fused projection, with or without
norms of q and k, and returns its gradient as one tensor. CUDA tensors use the kernels, as do CPU tensors under
Triton's interpreter; other CPU tensors use the closed form. States and statistics needed by the backward are outputs
without gradients; all shapes are functions of the inputs' shapes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sana_lab.ops.linear_attention import closed_form as closed

Grads = tuple[Tensor, Tensor, Tensor]


def formulas(x: Tensor) -> Any:
    """Implementation module for x's device: the kernels, or the closed form where kernels cannot run."""
    try:
        from sana_lab.ops.linear_attention import launch as kernels
    except ImportError:
        return closed
    return kernels if x.is_cuda or kernels.INTERPRETED else closed


@torch.library.custom_op("sana_lab::linear_attention", mutates_args=(), device_types=("cuda", "cpu"))
def linear_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """q, k, v (B, N, H, D) of any strides, mask (B, N) bool -> (out (B, N, H, D), state (B, H, D + 1, D) float32)."""
    return formulas(q).forward(q, k, v, mask, eps)


@torch.library.custom_op("sana_lab::linear_attention_backward", mutates_args=(), device_types=("cuda", "cpu"))
def linear_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Tensor, eps: float
) -> Grads:
    """(dq, dk, dv); no second derivative."""
    return formulas(q).backward(dout, q, k, v, mask, state, eps)


@torch.library.custom_op("sana_lab::qkv_linear_attention", mutates_args=(), device_types=("cuda", "cpu"))
def qkv_linear_attention(
    qkv: Tensor, norm_q: Tensor | None, norm_k: Tensor | None, norm_eps: float, mask: Tensor | None, eps: float
) -> Grads:
    """qkv (B, N, 3, H, D) of any strides, weights of norms (H D,) or None for both -> (out, state, statistics of k).

    The statistics are 1 / root mean square of each token's k, (B, N), or (0,) without norms.
    """
    return formulas(qkv).qkv_forward(qkv, norm_q, norm_k, norm_eps, mask, eps)


@torch.library.custom_op("sana_lab::qkv_linear_attention_backward", mutates_args=(), device_types=("cuda", "cpu"))
def qkv_linear_attention_backward(
    dout: Tensor,
    qkv: Tensor,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    mask: Tensor | None,
    state: Tensor,
    rstd: Tensor,
    eps: float,
) -> Grads:
    """(dqkv (B, N, 3, H, D), gradients of the norms' weights (H D,) or (0,)); no second derivative."""
    return formulas(qkv).qkv_backward(dout, qkv, norm_q, norm_k, mask, state, rstd, eps)


def _state(batch: int, heads: int, d: int, like: Tensor) -> Tensor:
    return like.new_empty((batch, heads, d + 1, d), dtype=torch.promote_types(like.dtype, torch.float32))


@linear_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    batch, _, heads, d = q.shape
    return q.new_empty(q.shape), _state(batch, heads, d, q)


@linear_attention_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Tensor, eps: float) -> Grads:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


@qkv_linear_attention.register_fake
def _(
    qkv: Tensor, norm_q: Tensor | None, norm_k: Tensor | None, norm_eps: float, mask: Tensor | None, eps: float
) -> Grads:
    batch, n, _, heads, d = qkv.shape
    state = _state(batch, heads, d, qkv)
    rstd = closed.nothing(qkv) if norm_q is None else state.new_empty((batch, n))
    return qkv.new_empty((batch, n, heads, d)), state, rstd


@qkv_linear_attention_backward.register_fake
def _(
    dout: Tensor,
    qkv: Tensor,
    norm_q: Tensor | None,
    norm_k: Tensor | None,
    mask: Tensor | None,
    state: Tensor,
    rstd: Tensor,
    eps: float,
) -> Grads:
    dq, dk = (closed.nothing(qkv) if norm is None else norm.new_empty(norm.shape) for norm in (norm_q, norm_k))
    return qkv.new_empty(qkv.shape), dq, dk


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.eps = inputs
    ctx.save_for_backward(q, k, v, mask, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *linear_attention_backward(dout, *ctx.saved_tensors, ctx.eps), None, None


def _save_fused(ctx: Any, inputs: tuple[Any, ...], output: Grads) -> None:
    qkv, norm_q, norm_k, _, mask, ctx.eps = inputs
    ctx.save_for_backward(qkv, norm_q, norm_k, mask, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate_fused(ctx: Any, dout: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: activation checkpointing raises on a second access
    dqkv, *dnorms = qkv_linear_attention_backward(dout, *saved, ctx.eps)
    return dqkv, *(dnorms if saved[1] is not None else (None, None)), None, None, None


linear_attention.register_autograd(_differentiate, setup_context=_save)
qkv_linear_attention.register_autograd(_differentiate_fused, setup_context=_save_fused)


@register_flop_formula(torch.ops.sana_lab.linear_attention)
def _flops(q_shape: torch.Size, *others: Any, out_shape: Any = None) -> int:
    """FLOPs of the reference: k^T v and q S are 2 B H N D^2 each, q z is 2 B H N D; norms are not counted."""
    batch, n, heads, d = q_shape
    return 2 * batch * n * heads * d * (2 * d + 1)


@register_flop_formula(torch.ops.sana_lab.qkv_linear_attention)
def _flops_fused(qkv_shape: torch.Size, *others: Any, out_shape: Any = None) -> int:
    return _flops(qkv_shape[:2] + qkv_shape[3:])


@register_flop_formula([torch.ops.sana_lab.linear_attention_backward, torch.ops.sana_lab.qkv_linear_attention_backward])
def _flops_backward(dout_shape: torch.Size, *others: Any, out_shape: Any = None) -> int:
    return 2 * _flops(dout_shape)
