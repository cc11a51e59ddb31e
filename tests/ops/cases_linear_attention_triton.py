"""Cases for the Triton kernel; test_linear_attention_triton.py runs this file in processes of its own.

Triton decides when it is imported whether it interprets, so one process cannot do both. Here the device follows from
that: the CPU under the interpreter, else CUDA. Errors are relative L2 against the definition in float64.
"""

from collections.abc import Iterator

import pytest
import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sana_lab.ops import linear_attention_triton as kernel
from sana_lab.ops.backend import Backend
from sana_lab.ops.linear_attention import definition, linear_attention

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cpu" if INTERPRETED else "cuda"
EPS = 1e-8
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32

# (output, gradients). Rounding the result alone costs 2.1e-4 in float16 and 1.7e-3 in bfloat16. The interpreter
# truncates to bfloat16 where a GPU rounds, and multiplies it in float32, so it is allowed two units in the last place.
BOUNDS = {FULL: (1e-6, 1e-6), HALF: (4e-4, 4e-4), BRAIN: (8e-3, 8e-3) if INTERPRETED else (2.5e-3, 4e-3)}

SMALL = [
    (FULL, (2, 45, 3, 32)),
    (FULL, (1, 141, 1, 16)),
    (FULL, (1, 5, 2, 8)),
    (FULL, (1, 33, 2, 24)),
    (FULL, (1, 40, 1, 64)),
    (FULL, (1, 17, 1, 128)),
    (HALF, (2, 45, 2, 32)),
    (HALF, (1, 33, 1, 64)),
    (HALF, (1, 17, 1, 128)),
    (BRAIN, (1, 20, 1, 16)),
]
LARGE = [
    (dtype, shape)
    for dtype in (FULL, HALF, BRAIN)
    for shape in [(2, 333, 3, 32), (2, 1000, 5, 64), (1, 777, 2, 128), (1, 500, 3, 24), (2, 16384, 4, 32)]
]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """NaN in whatever `empty` returns, so that an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1, device=DEVICE).new_empty(99).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def qkv(dtype: torch.dtype, shape: tuple[int, int, int, int], seed: int = 0) -> Tensor:
    """A fused projection (B, N, 3, H, D)."""
    b, n, h, d = shape
    return torch.randn(b, n, 3, h, d, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def keep(shape: tuple[int, int, int, int]) -> Tensor:
    return torch.rand(shape[:2], generator=torch.Generator().manual_seed(9)).to(DEVICE) < 0.7


def error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def compare(projected: Tensor, mask: Tensor | None) -> None:
    """Output and the three gradients, against the definition in float64."""
    x, y = projected.detach().requires_grad_(), projected.detach().double().requires_grad_()
    b, n, _, h, d = x.shape
    dout = qkv(x.dtype, (b, n, h, d), seed=1)[:, :, 0]
    out = linear_attention(*x.unbind(2), eps=EPS, backend="triton", mask=mask)
    want = definition(*y.unbind(2), mask, EPS)
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    (dx,), (dy,) = torch.autograd.grad(out, x, dout), torch.autograd.grad(want, y, dout.double())
    bound, bound_gradient = BOUNDS[x.dtype]
    assert error(out, want) <= bound
    errors = [error(dx[:, :, i], dy[:, :, i]) for i in range(3)]
    assert max(errors) <= bound_gradient, errors


@pytest.mark.parametrize(("dtype", "shape"), SMALL)
@pytest.mark.parametrize("masked", [False, True])
def test_agrees_with_the_definition(dtype: torch.dtype, shape: tuple[int, int, int, int], masked: bool) -> None:
    compare(qkv(dtype, shape), keep(shape) if masked else None)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "shape"), LARGE)
@pytest.mark.parametrize("masked", [False, True])
def test_agrees_at_size(dtype: torch.dtype, shape: tuple[int, int, int, int], masked: bool) -> None:
    compare(qkv(dtype, shape), keep(shape) if masked else None)


@pytest.mark.parametrize("loops", [2, 4])
def test_runs_of_several_tiles(loops: int) -> None:
    """The cut of the tokens changes the order of sums and nothing else; 4 tiles of 32 make one run that ends past N."""
    q, k, v = qkv(FULL, (1, 101, 2, 16)).unbind(2)
    mask, dout = keep((1, 101, 2, 16)), qkv(FULL, (1, 101, 2, 16), seed=1)[:, :, 0]
    cuts = [kernel.plan(q)._replace(loops=n) for n in (1, loops)]
    outs = [kernel.forward(q, k, v, mask, EPS, cut) for cut in cuts]
    grads = [kernel.backward(dout, q, k, v, mask, outs[0][1], EPS, cut) for cut in cuts]
    for one, many in zip((*outs[0], *grads[0]), (*outs[1], *grads[1]), strict=True):
        assert error(many, one) < 1e-6


def test_layouts() -> None:
    """Channels before tokens, a broadcast key, heads outermost, and a gradient with strides of zero."""
    shape = (2, 37, 2, 16)
    wide = qkv(FULL, shape)
    q = wide[:, :, 0].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).requires_grad_()
    k = wide[:, :, 1, :1].expand(shape)
    v = wide[:, :, 2].transpose(1, 2).contiguous().transpose(1, 2)
    out = linear_attention(q, k, v, backend="triton")
    want = definition(*(x.double() for x in (q, k, v)), None, EPS)
    assert q.stride(-1) == 37
    assert error(out, want) <= 1e-6
    (grad,), (want_grad,) = torch.autograd.grad(out.sum(), q), torch.autograd.grad(want.sum(), q)
    assert error(grad, want_grad) <= 1e-6


def test_nothing_to_attend_gives_zero() -> None:
    projected = qkv(HALF, (1, 40, 2, 16))
    projected[:, 3, 0] = -projected[:, 3, 0].abs()
    x = projected.requires_grad_()
    out = linear_attention(*x.unbind(2), backend="triton")
    assert (out[:, 3] == 0).all()
    assert (out[:, :3] != 0).any()
    assert (torch.autograd.grad(out.sum(), x)[0][:, 3, 0] == 0).all()
    nothing = torch.zeros(1, 40, dtype=torch.bool, device=DEVICE)
    out = linear_attention(*x.unbind(2), backend="triton", mask=nothing)
    assert (out == 0).all()
    assert (torch.autograd.grad(out.sum(), x)[0] == 0).all()


def test_float16_sums_do_not_overflow() -> None:
    x = torch.full((1, 70, 1, 16), 600.0, dtype=HALF, device=DEVICE)  # S = 2.5e7
    torch.testing.assert_close(linear_attention(x, x, x, backend="triton"), x)


def test_nan_is_not_hidden() -> None:
    """A NaN in one query is its own; one in a key is everybody's. relu must not turn either into zero."""
    q, k, v = (x.clone() for x in qkv(FULL, (1, 40, 1, 16)).unbind(2))
    q[0, 7, 0, 2] = torch.nan
    out = linear_attention(q, k, v, backend="triton")
    assert out[0, 7].isnan().all()
    assert out.isnan().sum() == 16
    k[0, 3, 0, 5] = torch.nan
    assert linear_attention(q, k, v, backend="triton").isnan().all()


def test_repeats_to_the_last_bit() -> None:
    shape = (2, 70, 2, 16)
    runs = []
    for _ in range(2):
        x = qkv(FULL, shape).requires_grad_()
        out = linear_attention(*x.unbind(2), backend="triton", mask=keep(shape))
        runs.append((out, torch.autograd.grad(out.square().sum(), x)[0]))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by opcheck itself
@pytest.mark.parametrize("masked", [False, True])
def test_operator_contract(masked: bool) -> None:
    """Schema, fake tensors, autograd registration and tracing, as torch itself checks them."""
    torch.use_deterministic_algorithms(False)  # opcheck compares a fake's strides with real memory, poison or not
    shape = (1, 9, 2, 8)
    q, k, v = (x.detach().requires_grad_() for x in qkv(FULL, shape).unbind(2))
    mask = keep(shape) if masked else None
    torch.library.opcheck(kernel.linear_attention, (q, k, v, mask, EPS))
    out, state = kernel.linear_attention(q, k, v, mask, EPS)
    assert out.requires_grad
    assert not state.requires_grad
    q, k, v = (x.detach() for x in (q, k, v))
    torch.library.opcheck(kernel.linear_attention_backward, (q, q, k, v, mask, state, EPS))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow])])
def test_compiles_in_one_graph(compiler: str) -> None:
    shape = (1, 40, 2, 16)
    mask, weight = keep(shape), qkv(FULL, shape, seed=3)[:, :, 0]

    def loss(x: Tensor) -> Tensor:
        return (linear_attention(*x.unbind(2), backend="triton", mask=mask) * weight).sum()

    x = qkv(FULL, shape).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(x), loss(x))
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x))


def test_flops_are_those_of_the_definition() -> None:
    counts = []
    for backend in ("torch", "triton"):
        x = qkv(FULL, (1, 9, 2, 8)).requires_grad_()
        with FlopCounterMode(display=False) as counter:
            out = linear_attention(*x.unbind(2), backend=backend)
            forward = counter.get_total_flops()
            out.sum().backward()
        counts.append((forward, counter.get_total_flops()))
    assert counts[0] == counts[1]


def test_autocast_and_meta_keep_the_dtype() -> None:
    q, k, v = qkv(HALF, (1, 20, 1, 16)).unbind(2)
    with torch.autocast(DEVICE, dtype=BRAIN):
        inside = linear_attention(q, k, v, backend="triton")
    assert torch.equal(inside, linear_attention(q, k, v, backend="triton"))
    meta = linear_attention(*(x.to("meta") for x in (q, k, v)), backend="triton")
    assert (meta.shape, meta.dtype, meta.device.type) == (q.shape, HALF, "meta")


@pytest.mark.gpu
def test_offsets_beyond_two_billion() -> None:
    """Rows of a batch that lie 2^30 elements apart: the third starts where 32-bit offsets end (4.3 GB)."""
    shape = (3, 65, 2, 32)
    storage = torch.empty(2 * 2**30 + 65 * 192, dtype=BRAIN, device=DEVICE)
    projected = storage.as_strided((3, 65, 3, 2, 32), (2**30, 192, 64, 32, 1))
    projected.copy_(qkv(BRAIN, shape))
    compare(projected, keep(shape))


@pytest.mark.gpu
def test_compiles_in_one_graph_under_autocast_of_a_projection() -> None:
    """As in training: float32 weights, a bfloat16 projection, gradients to the weights."""
    project = torch.nn.Linear(64, 192, bias=False, device=DEVICE)
    tokens = torch.randn(2, 333, 64, device=DEVICE)

    def loss(x: Tensor, backend: Backend) -> Tensor:
        with torch.autocast(DEVICE, dtype=BRAIN):
            return (
                linear_attention(*project(x).unflatten(-1, (3, 2, 32)).unbind(2), backend=backend)
                .float()
                .square()
                .sum()
            )

    compiled = torch.compile(loss, fullgraph=True)
    (got,) = torch.autograd.grad(compiled(tokens, "auto"), project.weight)
    (want,) = torch.autograd.grad(loss(tokens, "torch"), project.weight)
    assert error(got, want) < 1e-2
