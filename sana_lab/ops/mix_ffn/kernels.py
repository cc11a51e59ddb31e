"""Inner part of Mix-FFN (`closed_form`) in Triton: forward in one pass, backward in two.

Forward:  gate    x -> out
Backward: gate    x, dout -> dy, the gradient of y = (a, g)      input   x, dy -> dx, dweight, dbias
A program handles CHANNELS channels, ROWS rows and GROUPS x COLUMNS columns of one image. Each thread holds all columns
of a group and so activates COLUMNS + 2 tokens for COLUMNS results. The program iterates down the rows and adds each
input row to the three output rows that depend on it. Sums over tokens are written as one partial per program and added
in a fixed order, without atomics, so results are bitwise reproducible. Only x is saved for the backward. All arithmetic
is float32.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sana_lab.ops.backend import on_device
from sana_lab.ops.mix_ffn import closed_form as closed
from sana_lab.ops.mix_ffn.closed_form import Grads


@triton.jit
def _tanh(x: tl.tensor) -> tl.tensor:
    """tanh in one special function, accurate to 2^-11, for results rounded to 2^-9."""
    instruction: tl.constexpr = "tanh.approx.f32 $0, $1;"
    return tl.inline_asm_elementwise(instruction, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _sigmoid(x: tl.tensor, FAST: tl.constexpr) -> tl.tensor:
    """1 / (1 + exp(-x)); FAST uses half as many special functions."""
    if FAST:
        return 0.5 + 0.5 * _tanh(0.5 * x)
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _place(
    h: int, w: int, C: int, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Index of this program's partial sums, its image, first row, columns (GROUPS, 1) and channels (1, CHANNELS).

    Consecutive programs read neighbouring channels.
    """
    blocks = tl.cdiv(C, CHANNELS)
    part = tl.program_id(0) // blocks
    channel = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    across = tl.cdiv(w, GROUPS * COLUMNS)
    down = tl.cdiv(h, ROWS)
    column = ((part % across) * GROUPS + tl.arange(0, GROUPS)[:, None]) * COLUMNS
    return part.to(tl.int64), (part // (across * down)).to(tl.int64), (part // across) % down * ROWS, column, channel


@triton.jit
def _row(
    base: tl.tensor, strides: tl.tuple, b: tl.tensor, row: tl.tensor, column: tl.tensor, channel: tl.tensor
) -> tl.tensor:
    """Pointers (GROUPS, CHANNELS) to one row of a (B, h, w, C) tensor of any strides, from `column` on."""
    start = base + b * strides[0] + row.to(tl.int64) * strides[1]
    return start + column.to(tl.int64) * strides[2] + channel.to(tl.int64) * strides[3]


@triton.jit
def _load(row: tl.tensor, stride: int, column: tl.tensor, w: int, inside: tl.tensor, WIDTH: tl.constexpr) -> tl.tuple:
    """WIDTH columns from `column` on, as float32; zero outside the image and where not `inside`."""
    tiles = ()
    for j in tl.static_range(WIDTH):
        here = inside & (column + j >= 0) & (column + j < w)
        step = tl.full((), j, tl.int64) * stride
        tiles += (tl.load(row + step, mask=here, other=0.0).to(tl.float32),)  # type: ignore[assignment]
    return tiles


@triton.jit
def _store(row: tl.tensor, stride: int, column: tl.tensor, w: int, inside: tl.tensor, tiles: tl.tuple) -> None:
    for j in tl.static_range(len(tiles)):
        step = tl.full((), j, tl.int64) * stride
        tl.store(row + step, tiles[j].to(row.dtype.element_ty), mask=inside & (column + j < w))


@triton.jit
def _silu(tiles: tl.tuple, FAST: tl.constexpr) -> tl.tuple:
    active = ()
    for j in tl.static_range(len(tiles)):
        if FAST:  # x sigmoid(x) = u + u tanh(u) with u = x / 2: one product less
            half = 0.5 * tiles[j]
            active += (half + half * _tanh(half),)  # type: ignore[assignment]
        else:
            active += (tiles[j] * _sigmoid(tiles[j], FAST),)  # type: ignore[assignment]
    return active


@triton.jit
def _slope(tiles: tl.tuple, FAST: tl.constexpr) -> tl.tuple:
    """silu' of each tile."""
    slopes = ()
    for j in tl.static_range(len(tiles)):
        sigmoid = _sigmoid(tiles[j], FAST)
        slopes += (sigmoid * (1.0 + tiles[j] * (1.0 - sigmoid)),)  # type: ignore[assignment]
    return slopes


@triton.jit
def _times(a: tl.tuple, b: tl.tuple) -> tl.tuple:
    products = ()
    for j in tl.static_range(len(a)):
        products += (a[j] * b[j],)  # type: ignore[assignment]
    return products


@triton.jit
def _filled(value: tl.tensor, COUNT: tl.constexpr) -> tl.tuple:
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles += (value,)  # type: ignore[assignment]
    return tiles


@triton.jit
def _taps(weight: tl.tensor, channel: tl.tensor, inside: tl.tensor, FLIPPED: tl.constexpr) -> tl.tuple:
    """The nine weights (1, CHANNELS) of each channel from (C, 9), in row-major order."""
    taps = ()
    for k in tl.static_range(9):
        tap = weight + channel * 9 + (8 - k if FLIPPED else k)
        taps += (tl.load(tap, mask=inside, other=0.0).to(tl.float32),)  # type: ignore[assignment]
    return taps


@triton.jit
def _spread(out: tl.tuple, row: tl.tuple, taps: tl.tuple, FIRST: tl.constexpr) -> tl.tuple:
    """An output row plus an input row's contribution through the three taps from FIRST on."""
    sums = ()
    for j in tl.static_range(len(out)):
        added = out[j] + row[j] * taps[FIRST]
        added += row[j + 1] * taps[FIRST + 1]
        sums += (added + row[j + 2] * taps[FIRST + 2],)  # type: ignore[assignment]
    return sums


@triton.jit
def _gate_kernel(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, dout: tl.tensor, out: tl.tensor,
    x_strides: tl.tuple, dout_strides: tl.tuple, out_strides: tl.tuple, h: int, w: int, M: int,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, FAST: tl.constexpr,
    STEP: tl.constexpr, OUT_STEP: tl.constexpr, BACKWARD: tl.constexpr,
) -> None:  # fmt: skip
    """`out` is a silu(g), or dy in the backward. STEP and OUT_STEP are the strides of x and out from column to column:
    as constants they become offsets of loads and stores, in place of an addition of 64 bits for each."""
    _, b, first, column, channel = _place(h, w, M, ROWS, COLUMNS, GROUPS, CHANNELS)
    real = channel < M
    value_taps, gate_taps = _taps(weight, channel, real, False), _taps(weight, channel + M, real, False)
    zero = tl.zeros((GROUPS, CHANNELS), tl.float32)
    value_bias = zero + tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    gate_bias = zero + tl.load(bias + channel + M, mask=real, other=0.0).to(tl.float32)
    value_above, value_here = _filled(zero, COLUMNS), _filled(value_bias, COLUMNS)
    gate_above, gate_here = _filled(zero, COLUMNS), _filled(gate_bias, COLUMNS)
    for i in range(ROWS + 2):
        row = first - 1 + i
        inside = real & (row >= 0) & (row < h)
        pointers = _row(x, x_strides, b, row, column - 1, channel)
        value = _load(pointers, STEP, column - 1, w, inside, COLUMNS + 2)
        pointers = _row(x, x_strides, b, row, column - 1, channel + M)
        gate = _load(pointers, STEP, column - 1, w, inside, COLUMNS + 2)
        s = _silu(value, FAST)
        a = _spread(value_above, s, value_taps, 6)  # the row above is now complete
        value_above = _spread(value_here, s, value_taps, 3)
        value_here = _spread(_filled(value_bias, COLUMNS), s, value_taps, 0)
        s = _silu(gate, FAST)
        g = _spread(gate_above, s, gate_taps, 6)
        gate_above = _spread(gate_here, s, gate_taps, 3)
        gate_here = _spread(_filled(gate_bias, COLUMNS), s, gate_taps, 0)
        written = real & (i >= 2) & (row <= h)
        to = _row(out, out_strides, b, row - 1, column, channel)
        if BACKWARD:
            pointers = _row(dout, dout_strides, b, row - 1, column, channel)
            grad = _load(pointers, dout_strides[2], column, w, written, COLUMNS)
            _store(to, OUT_STEP, column, w, written, _times(grad, _silu(g, FAST)))
            to = _row(out, out_strides, b, row - 1, column, channel + M)
            _store(to, OUT_STEP, column, w, written, _times(_times(grad, a), _slope(g, FAST)))
        else:
            _store(to, OUT_STEP, column, w, written, _times(a, _silu(g, FAST)))


@triton.jit
def _weigh(sums: tl.tuple, dy: tl.tuple, above: tl.tuple, here: tl.tuple, below: tl.tuple) -> tl.tuple:
    """Add to each channel's nine sums a row of dy times its neighbouring activated tokens."""
    new = ()
    for k in tl.static_range(9):
        s = above if k < 3 else here if k < 6 else below
        added = sums[k]
        for j in tl.static_range(len(s)):
            added += s[j] * dy[j + 2 - k % 3]
        new += (added,)  # type: ignore[assignment]
    return new


@triton.jit
def _input_kernel(
    x: tl.tensor, weight: tl.tensor, dy: tl.tensor, dx: tl.tensor, sums: tl.tensor,
    x_strides: tl.tuple, dy_strides: tl.tuple, dx_strides: tl.tuple, h: int, w: int, C: int,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, FAST: tl.constexpr,
) -> None:  # fmt: skip
    """`sums` (parts, 10, C) float32: nine for dweight, one for dbias."""
    part, b, first, column, channel = _place(h, w, C, ROWS, COLUMNS, GROUPS, CHANNELS)
    real = channel < C
    taps = _taps(weight, channel, real, True)
    zero = tl.zeros((GROUPS, CHANNELS), tl.float32)
    none = _filled(zero, COLUMNS)
    ds_above, ds_here, s_above, s_here, slope_above, slope_here = none, none, none, none, none, none
    weighed, total = _filled(zero, 9), zero
    for i in range(ROWS + 2):
        row = first - 1 + i
        own = real & (row + 1 < h) & (i < ROWS)  # rows that this program sums over; the last two are its neighbour's
        tile = _load(_row(x, x_strides, b, row + 1, column, channel), x_strides[2], column, w, own, COLUMNS)
        s_below, slope_below = _silu(tile, FAST), _slope(tile, FAST)
        pointers = _row(dy, dy_strides, b, row, column - 1, channel)
        inside = real & (row >= 0) & (row < h)
        grad = _load(pointers, dy_strides[2], column - 1, w, inside, COLUMNS + 2)
        ds = _spread(ds_above, grad, taps, 6)
        ds_above, ds_here = _spread(ds_here, grad, taps, 3), _spread(none, grad, taps, 0)
        written = real & (i >= 2) & (row <= h)
        to = _row(dx, dx_strides, b, row - 1, column, channel)
        _store(to, dx_strides[2], column, w, written, _times(ds, slope_above))
        weighed = _weigh(weighed, grad, s_above, s_here, s_below)
        for j in tl.static_range(COLUMNS):
            total += tl.where((i >= 1) & (i <= ROWS), grad[j + 1], 0.0)
        s_above, s_here, slope_above, slope_here = s_here, s_below, slope_here, slope_below
    to = sums + part * 10 * C + channel
    for k in tl.static_range(9):
        tl.store(to + k * C, tl.sum(weighed[k], 0, keep_dims=True), mask=real)
    tl.store(to + 9 * C, tl.sum(total, 0, keep_dims=True), mask=real)


class GridTiling(NamedTuple):
    """Tiling in the letters above, and warps per program."""

    rows: int
    columns: int
    groups: int
    channels: int
    warps: int

    def parts(self, x: Tensor) -> int:
        """Number of programs per block of channels of x (B, h, w, C)."""
        b, h, w, _ = x.shape
        return b * triton.cdiv(h, self.rows) * triton.cdiv(w, self.groups * self.columns)

    def grid(self, x: Tensor, channels: int) -> tuple[int]:
        return (self.parts(x) * triton.cdiv(channels, self.channels),)


def plan(x: Tensor, channels: int, programs: int = 4 * 132) -> GridTiling:
    """Tiling of x (B, h, w, C) for programs over `channels` channels; one of twelve, as a function of shapes only.

    Two channels per thread, so that a warp reads full 128-byte lines in half precision. Programs have as many rows as
    leave `programs` programs (4 per multiprocessor of an H200), because each reads two more rows than it writes.
    """
    columns, size = 4, 256
    groups = min(4, triton.next_power_of_2(triton.cdiv(x.shape[2], columns)))
    cut = GridTiling(32, columns, groups, size // groups, 4)
    while cut.rows > 4 and cut.grid(x, channels)[0] < programs:
        cut = cut._replace(rows=cut.rows // 2)
    return cut


def fast(x: Tensor) -> bool:
    """Whether to use NVIDIA's approximate tanh: for bfloat16, on GPUs that have it."""
    return x.dtype == torch.bfloat16 and not interpreted() and torch.version.cuda is not None


def interpreted() -> bool:
    return not isinstance(_gate_kernel, triton.JITFunction)


def launch(kernel: Any, cut: GridTiling, x: Tensor, channels: int, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel over the tokens of x (B, h, w, C) and `channels` channels."""
    constants |= cut._asdict() | {"fast": fast(x)}
    warps = constants.pop("warps")
    options = {name.upper(): value for name, value in constants.items()}
    with on_device(x):
        kernel[cut.grid(x, channels)](*arguments, *x.shape[1:3], channels, **options, num_warps=warps)


def forward(x: Tensor, weight: Tensor, bias: Tensor, cut: GridTiling | None = None) -> Tensor:
    """(B, h, w, 2M) -> (B, h, w, M)."""
    m = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:3], m))
    tensors = x, weight.contiguous(), bias.contiguous(), x, out
    strides = x.stride(), x.stride(), out.stride()
    steps = {"STEP": x.stride(2), "OUT_STEP": out.stride(2)}
    launch(_gate_kernel, cut or plan(x, m), x, m, *tensors, *strides, **steps, BACKWARD=False)
    return out


def backward(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, cut: GridTiling | None = None) -> Grads:
    """(dx, dweight, dbias), each in its own dtype and contiguous."""
    m, c = dout.shape[-1], x.shape[-1]
    weight, bias = weight.contiguous(), bias.contiguous()
    dy, dx = x.new_empty(x.shape), x.new_empty(x.shape)
    strides = x.stride(), dout.stride(), dy.stride()
    steps = {"STEP": x.stride(2), "OUT_STEP": dy.stride(2)}
    launch(_gate_kernel, cut or plan(x, m), x, m, x, weight, bias, dout, dy, *strides, **steps, BACKWARD=True)
    cut = cut or plan(x, c)
    sums = x.new_empty((cut.parts(x), 10, c), dtype=torch.float32)
    launch(_input_kernel, cut, x, c, x, weight, dy, dx, sums, x.stride(), dy.stride(), dx.stride())
    sums = sums.sum(0)
    dweight = sums[:9].t().to(weight.dtype).contiguous().view_as(weight)
    return dx, dweight, sums[9].to(bias.dtype, copy=True)


@torch.library.custom_op("sana_lab::mix_ffn", mutates_args=())
def mix_ffn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`forward` as a custom operator for torch.compile, autograd and FLOP counters; the reference on the CPU."""
    if x.device.type == "cpu" and not interpreted():
        return closed.definition(x, weight, bias).contiguous()
    return forward(x, weight, bias)


@torch.library.custom_op("sana_lab::mix_ffn_backward", mutates_args=())
def mix_ffn_backward(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Grads:
    """`backward` as a custom operator; no second derivative."""
    if x.device.type == "cpu" and not interpreted():
        dx, dweight, dbias = closed.gradients(dout, x, weight, bias)
        return dx.contiguous(), dweight.contiguous(), dbias
    return backward(dout, x, weight, bias)


@mix_ffn.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:3], x.shape[-1] // 2))


@mix_ffn_backward.register_fake
def _(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Grads:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dout: Tensor) -> Grads:
    return mix_ffn_backward(dout, *ctx.saved_tensors)


mix_ffn.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.sana_lab.mix_ffn)
def _flops(x_shape: torch.Size, *_: Any, out_shape: Any = None) -> int:
    """FLOPs of the reference, which pads grids below 3 x 3: 2 x 9 per element of x."""
    b, h, w, c = x_shape
    return 2 * 9 * b * max(3, h) * max(3, w) * c


@register_flop_formula(torch.ops.sana_lab.mix_ffn_backward)
def _flops_backward(dout_shape: torch.Size, x_shape: torch.Size, *_: Any, out_shape: Any = None) -> int:
    return 2 * _flops(x_shape)
