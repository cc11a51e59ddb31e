"""Peer: re-implementation of the ALGORITHM of the Triton linear attention in NVlabs/Sana ("fastlinear").

It contains none of NVlabs' code, which was not run because it needs an older Triton. Properties kept from the original:
- V^T K by one program for each image and head, serially over all tokens, with a row of ones under V for the normaliser;
- products in float32 with TF32, Triton's default; V's columns padded to a power of two;
- the forward always writes numerators and normaliser, float32 (B, N, H, D + 1), also without gradients;
- the backward reads them, writes their gradient of the same size, and makes two more serial passes over the tokens,
  with one program for each image and head.
Faster than the original: relu and its mask are computed from q and k on load, while the original writes a mask of all
3 C in the projection. Slower: the division's backward is a separate kernel, while the original fuses it into the output
projection's backward. No mask and no norms, as in the original. Tile and warps are autotuned (`fastest`), likewise.

Letters: N tokens, D head width, P the power of two that holds D + 1, T tokens in a tile, LOOPS tiles in a run.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NAME = "NVlabs' algorithm (re-implemented)"
EPS = 1e-8


class Config(NamedTuple):
    """Tokens in a tile and warps in a program."""

    tile: int = 64
    warps: int = 4


CONFIGS = [Config(tile, warps) for tile in (32, 64, 128) for warps in (4, 8)]


@triton.jit
def _rows(base: tl.tensor, strides: tl.tuple, program: int, H: int, n: tl.tensor, d: tl.tensor) -> tl.tensor:
    """Pointers to tokens n of one image and head, in (B, N, H, D) of any strides."""
    image, head = (program // H).to(tl.int64), program % H
    return (
        base + image * strides[0] + n[:, None].to(tl.int64) * strides[1] + head * strides[2] + d[None, :] * strides[3]
    )


@triton.jit
def _relu_rows(
    base: tl.tensor, strides: tl.tuple, program: int, H: int, n: tl.tensor, d: tl.tensor, N: int, D: tl.constexpr
) -> tl.tensor:
    x = tl.load(_rows(base, strides, program, H, n, d), mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
    return tl.maximum(x.to(tl.float32), 0.0)


@triton.jit
def _padded_rows(
    v: tl.tensor, strides: tl.tuple, program: int, H: int, n: tl.tensor, p: tl.tensor, N: int, D: tl.constexpr
) -> tl.tensor:
    """(T, P): V and a column of ones."""
    inside = (n < N)[:, None] & (p < D)[None, :]
    x = tl.load(_rows(v, strides, program, H, n, p), mask=inside, other=0.0).to(tl.float32)
    return tl.where((n < N)[:, None] & (p == D)[None, :], 1.0, x)


@triton.jit
def _vk_kernel(
    k: tl.tensor, v: tl.tensor, vk: tl.tensor, k_strides: tl.tuple, v_strides: tl.tuple, N: int, H: int,
    D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, T: tl.constexpr, LOOPS: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    d, p = tl.arange(0, W), tl.arange(0, P)
    total = tl.zeros((P, W), tl.float32)
    for i in range(LOOPS):
        n = i * T + tl.arange(0, T)
        key = _relu_rows(k, k_strides, program, H, n, d, N, D)
        total = tl.dot(tl.trans(_padded_rows(v, v_strides, program, H, n, p, N, D)), key, total)
    to = vk + program.to(tl.int64) * (D + 1) * D + p[:, None] * D + d[None, :]
    tl.store(to, total, mask=(p <= D)[:, None] & (d < D)[None, :])


@triton.jit
def _load_vk(vk: tl.tensor, program: int, D: tl.constexpr, W: tl.constexpr, P: tl.constexpr) -> tl.tensor:
    d, p = tl.arange(0, W), tl.arange(0, P)
    rows = vk + program.to(tl.int64) * (D + 1) * D + p[:, None] * D + d[None, :]
    return tl.load(rows, mask=(p <= D)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _divide_kernel(
    q: tl.tensor, vk: tl.tensor, out: tl.tensor, middle: tl.tensor, q_strides: tl.tuple, out_strides: tl.tuple,
    middle_strides: tl.tuple, N: int, H: int, eps: float,
    D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, T: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    n, d, p = tl.program_id(1) * T + tl.arange(0, T), tl.arange(0, W), tl.arange(0, P)
    c = tl.dot(_relu_rows(q, q_strides, program, H, n, d, N, D), tl.trans(_load_vk(vk, program, D, W, P)))
    tl.store(_rows(middle, middle_strides, program, H, n, p), c, mask=(n < N)[:, None] & (p <= D)[None, :])
    tile = c / (tl.sum(tl.where((p == D)[None, :], c, 0.0), 1)[:, None] + eps)
    to = _rows(out, out_strides, program, H, n, p)
    tl.store(to, tile.to(to.dtype.element_ty), mask=(n < N)[:, None] & (p < D)[None, :])


@triton.jit
def _divide_backward_kernel(
    dout: tl.tensor, middle: tl.tensor, dmiddle: tl.tensor, dout_strides: tl.tuple, middle_strides: tl.tuple,
    N: int, H: int, eps: float, D: tl.constexpr, P: tl.constexpr, T: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    n, p = tl.program_id(1) * T + tl.arange(0, T), tl.arange(0, P)
    inside = (n < N)[:, None] & (p <= D)[None, :]
    c = tl.load(_rows(middle, middle_strides, program, H, n, p), mask=inside, other=0.0)
    grad = tl.load(_rows(dout, dout_strides, program, H, n, p), mask=inside & (p < D)[None, :], other=0.0)
    grad = grad.to(tl.float32)
    normaliser = tl.sum(tl.where((p == D)[None, :], c, 0.0), 1)[:, None] + eps
    last = -tl.sum(grad * c, 1)[:, None] / (normaliser * normaliser)
    tl.store(
        _rows(dmiddle, middle_strides, program, H, n, p),
        tl.where((p == D)[None, :], last, grad / normaliser),
        mask=inside,
    )


@triton.jit
def _query_backward_kernel(
    q: tl.tensor, vk: tl.tensor, dmiddle: tl.tensor, dq: tl.tensor, dvk: tl.tensor, q_strides: tl.tuple,
    middle_strides: tl.tuple, dq_strides: tl.tuple, N: int, H: int,
    D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, T: tl.constexpr, LOOPS: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    d, p = tl.arange(0, W), tl.arange(0, P)
    state = _load_vk(vk, program, D, W, P)
    total = tl.zeros((P, W), tl.float32)
    for i in range(LOOPS):
        n = i * T + tl.arange(0, T)
        grad = tl.load(
            _rows(dmiddle, middle_strides, program, H, n, p), mask=(n < N)[:, None] & (p <= D)[None, :], other=0.0
        )
        query = _relu_rows(q, q_strides, program, H, n, d, N, D)
        tile = tl.where(query > 0, tl.dot(grad, state), 0.0)
        to = _rows(dq, dq_strides, program, H, n, d)
        tl.store(to, tile.to(to.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :])
        total = tl.dot(tl.trans(grad), query, total)
    to = dvk + program.to(tl.int64) * (D + 1) * D + p[:, None] * D + d[None, :]
    tl.store(to, total, mask=(p <= D)[:, None] & (d < D)[None, :])


@triton.jit
def _key_backward_kernel(
    k: tl.tensor, v: tl.tensor, dvk: tl.tensor, dk: tl.tensor, dv: tl.tensor, k_strides: tl.tuple,
    v_strides: tl.tuple, dk_strides: tl.tuple, dv_strides: tl.tuple, N: int, H: int,
    D: tl.constexpr, W: tl.constexpr, P: tl.constexpr, T: tl.constexpr, LOOPS: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    d, p = tl.arange(0, W), tl.arange(0, P)
    dstate = _load_vk(dvk, program, D, W, P)
    for i in range(LOOPS):
        n = i * T + tl.arange(0, T)
        key = _relu_rows(k, k_strides, program, H, n, d, N, D)
        value = _padded_rows(v, v_strides, program, H, n, p, N, D)
        to_k, to_v = _rows(dk, dk_strides, program, H, n, d), _rows(dv, dv_strides, program, H, n, p)
        key_grad = tl.where(key > 0, tl.dot(value, dstate), 0.0)
        tl.store(to_k, key_grad.to(to_k.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :])
        value_grad = tl.dot(key, tl.trans(dstate))
        tl.store(to_v, value_grad.to(to_v.dtype.element_ty), mask=(n < N)[:, None] & (p < D)[None, :])


def sizes(q: Tensor, config: Config) -> tuple[dict[str, int], int]:
    """Compile-time constants of the kernels, and the number of tiles."""
    d = q.shape[3]
    return {
        "D": d,
        "W": max(16, triton.next_power_of_2(d)),
        "P": max(16, triton.next_power_of_2(d + 1)),
        "T": config.tile,
    }, triton.cdiv(q.shape[1], config.tile)


def forward(qkv: Tensor, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """(out (B, N, H, D), V^T K (B, H, D + 1, D) float32, numerators and normalisers (B, N, H, D + 1) float32)."""
    q, k, v = qkv.unbind(2)
    batch, n, heads, d = q.shape
    constants, loops = sizes(q, config)
    vk = q.new_empty((batch, heads, d + 1, d), dtype=torch.float32)
    out, middle = q.new_empty(q.shape), q.new_empty((batch, n, heads, d + 1), dtype=torch.float32)
    options = {**constants, "num_warps": config.warps}
    _vk_kernel[(batch * heads,)](k, v, vk, k.stride(), v.stride(), n, heads, **options, LOOPS=loops)
    strides = q.stride(), out.stride(), middle.stride()
    _divide_kernel[(batch * heads, loops)](q, vk, out, middle, *strides, n, heads, EPS, **options)
    return out, vk, middle


def backward(dout: Tensor, qkv: Tensor, vk: Tensor, middle: Tensor, config: Config) -> Tensor:
    """The gradient of qkv (B, N, 3, H, D)."""
    dqkv = qkv.new_empty(qkv.shape)
    (q, k, v), (dq, dk, dv) = qkv.unbind(2), dqkv.unbind(2)
    batch, n, heads, _ = q.shape
    constants, loops = sizes(q, config)
    options = {**constants, "num_warps": config.warps}
    dmiddle, dvk = torch.empty_like(middle), torch.empty_like(vk)
    narrow = {name: value for name, value in options.items() if name != "W"}
    strides = dout.stride(), middle.stride()
    _divide_backward_kernel[(batch * heads, loops)](dout, middle, dmiddle, *strides, n, heads, EPS, **narrow)
    strides = q.stride(), middle.stride(), dq.stride()
    _query_backward_kernel[(batch * heads,)](q, vk, dmiddle, dq, dvk, *strides, n, heads, **options, LOOPS=loops)
    strides = k.stride(), v.stride(), dk.stride(), dv.stride()
    _key_backward_kernel[(batch * heads,)](k, v, dvk, dk, dv, *strides, n, heads, **options, LOOPS=loops)
    return dqkv


class _Core(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, config: Config) -> Tensor:
        out, vk, middle = forward(qkv, config)
        ctx.save_for_backward(qkv, vk, middle)
        ctx.config = config
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return backward(dout, *ctx.saved_tensors, ctx.config), None


def core(qkv: Tensor, heads: int, config: Config | None = None) -> Tensor:
    """Linear attention of a fused projection (B, N, 3 C) -> (B, N, C), with gradients; on CUDA, or interpreted."""
    return _Core.apply(qkv.unflatten(-1, (3, heads, -1)), config or Config()).flatten(2)


def fastest(qkv: Tensor, heads: int, gradients: bool = False) -> Config:
    """Fastest configuration on this GPU, for the forward or for forward and backward."""
    x = qkv.detach().requires_grad_(gradients)

    def run(config: Config) -> None:
        out = core(x, heads, config)
        if gradients:
            torch.autograd.grad(out, x, out.detach())

    return min(CONFIGS, key=lambda config: triton.testing.do_bench(lambda: run(config), return_mode="median"))
