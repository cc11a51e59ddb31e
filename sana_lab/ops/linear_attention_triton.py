"""ReLU linear attention in Triton: what `linear_attention.definition` computes, in two passes over the tokens each way.

Forward:  state  k, v -> S, z              apply        q -> out
Backward: query  q, dout -> dq, dS, dz     key_value    k, v -> dk, dv
A program owns one (batch, head) and a run of tokens. Sums over tokens leave as one partial per run and are added in a
fixed order, without atomics, so results repeat to the last bit. Only q, k, v and the state are kept for the backward,
which recomputes the rest and touches each tensor of N tokens once. With r = relu(q), a = 1 / (r z + eps),
t = dout S^T and g = a (r . t) = dout . out:
    dq = a (t - g z) where q > 0     dS = sum (a r)^T dout     dz = -sum a g r
    dk = v dS^T + dz where k > 0     dv = relu(k) dS
Every accumulator is float32. k^T v multiplies in the dtype that came in. Products with S, dS and a r, all float32, are
float32 for float32 ("ieee"), good to about 2^-21 for float16 ("tf32x3"), and to 2^-10 for bfloat16 ("tf32"), whose
results are rounded to 2^-9 anyway.

Letters: N tokens, D head width, W the power of two that holds D (16 or more), T tokens in a tile, LOOPS tiles in a run.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

Grads = tuple[Tensor, Tensor, Tensor]


@triton.jit
def _program(H: int, RUN: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """This program's batch index, head and first token, in int64 as all offsets are."""
    head = tl.program_id(0).to(tl.int64)
    return head // H, head % H, tl.program_id(1).to(tl.int64) * RUN


@triton.jit
def _rows(base: tl.tensor, strides: tl.tuple, b: int, h: int, n: tl.tensor, d: tl.tensor) -> tl.tensor:
    """Pointers (T, W) to tokens n of head h, in a (B, N, H, D) tensor of any strides."""
    return base + b * strides[0] + n[:, None] * strides[1] + h * strides[2] + d[None, :].to(tl.int64) * strides[3]


@triton.jit
def _load(rows: tl.tensor, inside: tl.tensor) -> tl.tensor:
    return tl.load(rows, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(rows: tl.tensor, tile: tl.tensor, inside: tl.tensor) -> None:
    tl.store(rows, tile.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def _relu(x: tl.tensor) -> tl.tensor:
    """max(x, 0) that lets NaN through, as torch does."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def _counted(keep: tl.tensor, b: int, n: tl.tensor, N: int, MASKED: tl.constexpr) -> tl.tensor:
    """(T,) True at keys that exist and that the mask (B, N) keeps."""
    inside = n < N
    if MASKED:
        inside = inside & (tl.load(keep + b * N + n, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _load_state(state: tl.tensor, part: int, D: tl.constexpr, W: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """S (W, W) and z (W,) of one head from (..., D + 1, D), whose last row is z."""
    d = tl.arange(0, W)
    base = state + part * (D + 1) * D
    inside = (d < D)[:, None] & (d < D)[None, :]
    s = tl.load(base + d[:, None] * D + d[None, :], mask=inside, other=0.0)
    return s, tl.load(base + D * D + d, mask=d < D, other=0.0)


@triton.jit
def _store_state(state: tl.tensor, s: tl.tensor, z: tl.tensor, D: tl.constexpr, W: tl.constexpr) -> None:
    """Write this program's partial into (runs, B * H, D + 1, D)."""
    d = tl.arange(0, W)
    base = state + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (D + 1) * D
    tl.store(base + d[:, None] * D + d[None, :], s, mask=(d < D)[:, None] & (d < D)[None, :])
    tl.store(base + D * D + d, z, mask=d < D)


@triton.jit
def _state_kernel(
    k: tl.tensor, v: tl.tensor, keep: tl.tensor, state: tl.tensor, k_strides: tl.tuple, v_strides: tl.tuple,
    N: int, H: int, D: tl.constexpr, W: tl.constexpr, T: tl.constexpr, LOOPS: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, PRODUCT: tl.constexpr,
) -> None:  # fmt: skip
    b, h, first = _program(H, LOOPS * T)
    d = tl.arange(0, W)
    s = tl.zeros((W, W), tl.float32)
    z = tl.zeros((T, W), tl.float32)
    for i in range(LOOPS):
        n = first + i * T + tl.arange(0, T)
        inside = _counted(keep, b, n, N, MASKED)[:, None] & (d < D)[None, :]
        key = _relu(_load(_rows(k, k_strides, b, h, n, d), inside))
        value = _load(_rows(v, v_strides, b, h, n, d), inside)
        s = tl.dot(tl.trans(key).to(PRODUCT), value.to(PRODUCT), s, input_precision=PRECISION)
        z += key
    _store_state(state, s, tl.sum(z, 0), D, W)


@triton.jit
def _apply_kernel(
    q: tl.tensor, state: tl.tensor, out: tl.tensor, q_strides: tl.tuple, out_strides: tl.tuple,
    N: int, H: int, eps: float,
    D: tl.constexpr, W: tl.constexpr, T: tl.constexpr, LOOPS: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    b, h, first = _program(H, LOOPS * T)
    d = tl.arange(0, W)
    s, z = _load_state(state, b * H + h, D, W)
    for i in range(LOOPS):
        n = first + i * T + tl.arange(0, T)
        inside = (n < N)[:, None] & (d < D)[None, :]
        query = _relu(_load(_rows(q, q_strides, b, h, n, d), inside))
        normaliser = tl.sum(query * z[None, :], 1) + eps
        tile = tl.dot(query, s, input_precision=PRECISION) / normaliser[:, None]
        _store(_rows(out, out_strides, b, h, n, d), tile, inside)


@triton.jit
def _query_kernel(
    q: tl.tensor, dout: tl.tensor, state: tl.tensor, dq: tl.tensor, dstate: tl.tensor,
    q_strides: tl.tuple, dout_strides: tl.tuple, dq_strides: tl.tuple, N: int, H: int, eps: float,
    D: tl.constexpr, W: tl.constexpr, T: tl.constexpr, LOOPS: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    b, h, first = _program(H, LOOPS * T)
    d = tl.arange(0, W)
    s, z = _load_state(state, b * H + h, D, W)
    ds = tl.zeros((W, W), tl.float32)
    dz = tl.zeros((T, W), tl.float32)
    for i in range(LOOPS):
        n = first + i * T + tl.arange(0, T)
        inside = (n < N)[:, None] & (d < D)[None, :]
        query = _relu(_load(_rows(q, q_strides, b, h, n, d), inside))
        grad = _load(_rows(dout, dout_strides, b, h, n, d), inside)
        a = 1.0 / (tl.sum(query * z[None, :], 1) + eps)
        t = tl.dot(grad, tl.trans(s), input_precision=PRECISION)
        scaled = query * a[:, None]
        g = tl.sum(scaled * t, 1)
        tile = tl.where(query == 0, 0.0, a[:, None] * (t - g[:, None] * z[None, :]))
        _store(_rows(dq, dq_strides, b, h, n, d), tile, inside)
        ds = tl.dot(tl.trans(scaled), grad, ds, input_precision=PRECISION)
        dz -= scaled * g[:, None]
    _store_state(dstate, ds, tl.sum(dz, 0), D, W)


@triton.jit
def _key_value_kernel(
    k: tl.tensor, v: tl.tensor, keep: tl.tensor, dstate: tl.tensor, dk: tl.tensor, dv: tl.tensor,
    k_strides: tl.tuple, v_strides: tl.tuple, dk_strides: tl.tuple, dv_strides: tl.tuple, N: int, H: int,
    D: tl.constexpr, W: tl.constexpr, T: tl.constexpr, LOOPS: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
) -> None:  # fmt: skip
    b, h, first = _program(H, LOOPS * T)
    d = tl.arange(0, W)
    ds, dz = _load_state(dstate, b * H + h, D, W)
    for i in range(LOOPS):
        n = first + i * T + tl.arange(0, T)
        inside = (n < N)[:, None] & (d < D)[None, :]
        counted = _counted(keep, b, n, N, MASKED)[:, None] & (d < D)[None, :]
        key = _relu(_load(_rows(k, k_strides, b, h, n, d), counted))
        value = _load(_rows(v, v_strides, b, h, n, d), counted)
        key_grad = tl.dot(value, tl.trans(ds), input_precision=PRECISION) + dz[None, :]
        _store(_rows(dk, dk_strides, b, h, n, d), tl.where(key == 0, 0.0, key_grad), inside)
        _store(_rows(dv, dv_strides, b, h, n, d), tl.dot(key, ds, input_precision=PRECISION), inside)


class Plan(NamedTuple):
    """How a shape is cut (W, T and LOOPS above, warps in a program) and how it is multiplied."""

    width: int
    tile: int
    loops: int
    warps: int
    precision: str

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Programs for x (B, N, H, D): (B * H, runs)."""
        return x.shape[0] * x.shape[2], triton.cdiv(x.shape[1], self.tile * self.loops)


def plan(x: Tensor, programs: int = 4 * 132) -> Plan:
    """A cut for x (B, N, H, D) that depends on shape and dtype alone.

    At least `programs` programs (4 for each processor of an H200) where N allows it; runs of at most 64 tiles, in
    powers of two so that few kernels are compiled. Tiles and warps are the largest that spill next to no registers,
    and fit the shared memory, of sm_90 (Hopper).
    """
    batch, n, heads, d = x.shape
    width = max(16, triton.next_power_of_2(d))
    tile = (64 if width < 128 else 32) // (1 if x.dtype == torch.bfloat16 else 2)
    loops = batch * heads * n // (programs * tile)
    loops = min(64, 1 << max(0, loops.bit_length() - 1))
    return Plan(width, tile, loops, 4 if width < 64 else 8, precision(x.dtype, width))


def precision(dtype: torch.dtype, width: int) -> str:
    """How Triton multiplies with S or dS: exactly enough for results to be rounded once, in `dtype`."""
    if dtype == torch.bfloat16:
        return "tf32"
    return "tf32x3" if dtype == torch.float16 and width < 128 else "ieee"


def product(dtype: torch.dtype) -> tl.dtype:
    """In what k^T v is multiplied: the dtype that came in, save bfloat16 in Triton's interpreter, which cannot."""
    if dtype == torch.bfloat16 and not isinstance(_state_kernel, triton.JITFunction):
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


def launch(kernel: Any, cut: Plan, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run a kernel over the heads and runs of x (B, N, H, D). ValueError on a device that Triton has no way to."""
    if x.device.type != "cuda" and isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f"backend 'triton' needs CUDA tensors, or TRITON_INTERPRET=1 in the environment before triton is imported; "
            f"these tensors are on {x.device.type}, which backend 'torch' takes"
        )
    constants |= {"D": x.shape[-1], "W": cut.width, "T": cut.tile, "LOOPS": cut.loops, "PRECISION": cut.precision}
    with torch.cuda.device_of(x):
        kernel[cut.grid(x)](*arguments, **constants, num_warps=cut.warps)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, eps: float, cut: Plan | None = None
) -> tuple[Tensor, Tensor]:
    """(out (B, N, H, D), state (B, H, D + 1, D) float32: S, and z in the last row)."""
    cut, n, heads = cut or plan(q), q.shape[1], q.shape[2]
    partials, masked, keep = new_partials(q, cut), mask is not None, k if mask is None else mask.contiguous()
    options = {"MASKED": masked, "PRODUCT": product(q.dtype)}
    launch(_state_kernel, cut, q, k, v, keep, partials, k.stride(), v.stride(), n, heads, **options)
    state, out = add(partials), q.new_empty(q.shape)
    launch(_apply_kernel, cut, q, q, state, out, q.stride(), out.stride(), n, heads, eps)
    return out, state


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    state: Tensor,
    eps: float,
    cut: Plan | None = None,
) -> Grads:
    """(dq, dk, dv), each (B, N, H, D) in the input dtype."""
    cut, n, heads = cut or plan(q), q.shape[1], q.shape[2]
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    partials, masked, keep = new_partials(q, cut), mask is not None, k if mask is None else mask.contiguous()
    to_query = q.stride(), dout.stride(), dq.stride()
    launch(_query_kernel, cut, q, q, dout, state, dq, partials, *to_query, n, heads, eps)
    to_keys = k.stride(), v.stride(), dk.stride(), dv.stride()
    launch(_key_value_kernel, cut, q, k, v, keep, add(partials), dk, dv, *to_keys, n, heads, MASKED=masked)
    return dq, dk, dv


def new_partials(q: Tensor, cut: Plan) -> Tensor:
    """Room for one state of each run: (runs, B, H, D + 1, D)."""
    batch, _, heads, d = q.shape
    return q.new_empty((cut.grid(q)[1], batch, heads, d + 1, d), dtype=torch.float32)


def add(partials: Tensor) -> Tensor:
    """The sum over runs, in a fixed order."""
    return partials[0] if len(partials) == 1 else partials.sum(0)


@torch.library.custom_op("sana_lab::linear_attention", mutates_args=())
def linear_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """`forward` as an operator that torch.compile, autograd and FLOP counters know; the state has no gradient."""
    return forward(q, k, v, mask, eps)


@torch.library.custom_op("sana_lab::linear_attention_backward", mutates_args=())
def linear_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Tensor, eps: float
) -> Grads:
    """`backward` as an operator; it has no derivative of its own."""
    return backward(dout, q, k, v, mask, state, eps)


@linear_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    batch, _, heads, d = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, d + 1, d), dtype=torch.float32)


@linear_attention_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Tensor, eps: float) -> Grads:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.eps = inputs
    ctx.save_for_backward(q, k, v, mask, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *linear_attention_backward(dout, *ctx.saved_tensors, ctx.eps), None, None


linear_attention.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.sana_lab.linear_attention)
def _flops(q_shape: torch.Size, *_: Any, out_shape: Any = None) -> int:
    """As counted in the definition: k^T v and q S are 2 B H N D^2 each, q z is 2 B H N D."""
    batch, n, heads, d = q_shape
    return 2 * batch * n * heads * d * (2 * d + 1)


@register_flop_formula(torch.ops.sana_lab.linear_attention_backward)
def _flops_backward(dout_shape: torch.Size, *_: Any, out_shape: Any = None) -> int:
    return 2 * _flops(dout_shape)
