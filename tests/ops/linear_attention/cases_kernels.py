"""Cases for the Triton kernel, run by `kernel_cases`.

Errors are against the definition in float64. The interpreter multiplies bfloat16 in float32;
`test_bfloat16_before_it_is_rounded` holds a GPU's bars to what it has before it truncates the result.
"""

from collections.abc import Callable

import pytest
import torch
from kernel_comparison import BARS, BOUNDS, BRAIN, DEVICE, FULL, HALF, error
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sana_lab.config.specs import build
from sana_lab.ops.linear_attention import Norms, linear_attention, qkv_linear_attention
from sana_lab.ops.linear_attention import autograd as op
from sana_lab.ops.linear_attention import launch as kernel
from sana_lab.ops.linear_attention.reference import definition, normed_definition
from sana_lab.ops.linear_attention.tiling import Tiling, forms, group, plan, split

pytestmark = pytest.mark.usefixtures("poison")
EPS = 1e-8


SMALL = [
    (FULL, (2, 45, 3, 32)),
    (FULL, (1, 141, 1, 16)),
    (FULL, (1, 5, 2, 8)),
    (FULL, (1, 33, 2, 24)),
    (FULL, (1, 40, 1, 64)),
    (FULL, (1, 17, 1, 128)),
    (FULL, (1, 9, 2, 72)),
    (HALF, (2, 45, 2, 32)),
    (HALF, (1, 33, 1, 64)),
    (HALF, (1, 17, 1, 128)),
    (BRAIN, (1, 20, 1, 16)),
]
LARGE = [
    (dtype, shape)
    for dtype in (FULL, HALF, BRAIN)
    for shape in [
        (2, 333, 3, 32),
        (2, 1000, 36, 32),
        (2, 1000, 5, 64),
        (1, 777, 2, 128),
        (1, 500, 3, 24),
        (2, 700, 3, 112),
        (3, 900, 4, 16),
        (2, 16384, 4, 32),
        (1, 65536, 2, 32),
    ]
]


def qkv(dtype: torch.dtype, shape: tuple[int, int, int, int], seed: int = 0) -> Tensor:
    """A fused projection (B, N, 3, H, D)."""
    b, n, h, d = shape
    return torch.randn(b, n, 3, h, d, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def keep(shape: tuple[int, int, int, int]) -> Tensor:
    return torch.rand(shape[:2], generator=torch.Generator().manual_seed(9)).to(DEVICE) < 0.7


def both(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dout: Tensor,
    norms: Norms | None = None,
    cut: Tiling | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """(out, state, dq, dk, dv) by one cut, and with norms the gradients of their weights; results in `dtype`."""
    norm = None if norms is None else (norms.q, norms.k, kernel.inverse_rms(k, norms.eps))
    out, dq, dk, dv = (q.new_empty(q.shape, dtype=dtype or q.dtype) for _ in range(4))
    state = kernel.forward_into(out, q, k, v, mask, EPS, norm, cut)
    dnorms = kernel.backward_into((dq, dk, dv), dout, q, k, v, mask, state, EPS, norm, cut)
    return out, state, dq, dk, dv, *(dnorms if norms else ())


def truth(projected: Tensor, mask: Tensor | None, dout: Tensor, norms: Norms | None = None) -> tuple[Tensor, ...]:
    """(out, dq, dk, dv), and with norms the gradients of their weights, by the definition in float64."""
    x = projected.detach().double().requires_grad_()
    weights = [] if norms is None else [w.detach().double().requires_grad_() for w in norms[:2]]
    out = normed_definition(x, Norms(*weights, norms.eps) if norms else None, mask, EPS)
    dx, *dweights = torch.autograd.grad(out, (x, *weights), dout.double())
    return out, *dx.unbind(2), *dweights


def norms_of(shape: tuple[int, int, int, int], dtype: torch.dtype = FULL) -> Norms:
    """Weights about 1 and, for k, of both signs."""
    c, generator = shape[2] * shape[3], torch.Generator().manual_seed(5)
    q, k = 1 + 0.3 * torch.randn(c, generator=generator), torch.randn(c, generator=generator)
    return Norms(q.to(DEVICE, dtype), k.to(DEVICE, dtype))


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
    one, many = (both(q, k, v, mask, dout, cut=plan(q)._replace(loops=n)) for n in (1, loops))
    for x, y in zip(one, many, strict=True):
        assert error(y, x) < 1e-6


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
    x, mask, norms = qkv(FULL, shape), keep(shape) if masked else None, norms_of(shape) if masked else None
    q, k, v = (y.detach().requires_grad_() for y in x.unbind(2))
    torch.library.opcheck(op.linear_attention, (q, k, v, mask, EPS))
    weights = [None, None] if norms is None else [w.requires_grad_() for w in norms[:2]]
    torch.library.opcheck(op.qkv_linear_attention, (x.requires_grad_(), *weights, 1e-5, mask, EPS))


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


@pytest.mark.parametrize("normed", [False, True])
@torch.no_grad()
def test_without_the_operator(normed: bool) -> None:
    """In inference the kernels are launched alone: the same to the last bit."""
    shape = (2, 21, 3, 8)
    projected, norms = qkv(FULL, shape), norms_of(shape) if normed else None
    q, k, v = projected.unbind(2)
    fused = op.qkv_linear_attention(projected, *(norms or (None, None, 1.0)), None, 1e-8)[0]
    assert torch.equal(qkv_linear_attention(projected, norms, backend="triton"), fused)
    assert torch.equal(linear_attention(q, k, v, backend="triton"), op.linear_attention(q, k, v, None, 1e-8)[0])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "shape"), [(FULL, (2, 45, 3, 32)), (HALF, (1, 45, 2, 32)), (FULL, (1, 9, 2, 24)), (BRAIN, (1, 20, 2, 16))]
)
def test_fused_projection(dtype: torch.dtype, shape: tuple[int, int, int, int], normed: bool) -> None:
    """One gradient for the whole projection, with and without norms of q and k, and their weights' gradients."""
    mask, dout, norms = keep(shape), qkv(dtype, shape, seed=1)[:, :, 0], norms_of(shape) if normed else None
    x = qkv(dtype, shape).requires_grad_()
    weights = [w.requires_grad_() for w in norms[:2]] if norms else []
    out = qkv_linear_attention(x, norms, eps=EPS, backend="triton", mask=mask)
    dx, *dweights = torch.autograd.grad(out, (x, *weights), dout)
    want, *grads = truth(x, mask, dout, norms)
    assert dx.is_contiguous()
    bound, bound_gradient = BOUNDS[dtype]
    assert error(out, want) <= bound
    assert max(error(dx[:, :, i], grads[i]) for i in range(3)) <= bound_gradient
    assert all(error(w, g) <= bound_gradient for w, g in zip(dweights, grads[3:], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "shape"), LARGE)
def test_fused_projection_at_size(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    test_fused_projection(dtype, shape, True)


@pytest.mark.parametrize(("shape", "normed"), [((1, 37, 3, 16), False), ((1, 37, 3, 16), True), ((2, 9, 3, 32), True)])
def test_every_plan_agrees(shape: tuple[int, int, int, int], normed: bool) -> None:
    """Heads side by side (their number no multiple of the group), runs, one launch: orders of sums, nothing else."""
    x, mask, dout, norms = qkv(FULL, shape), keep(shape), qkv(FULL, shape, 1)[:, :, 0], norms_of(shape)
    q, k, v = x.unbind(2)
    want = truth(x, mask, dout, norms if normed else None)
    assert plan(q) in forms(q).values()
    groups = [split(q, group(q, row), 264) for row in (64, 128, 256)]
    cuts = {cut._replace(warps=4) for cut in (*groups, *forms(q).values())}
    assert {cut.group for cut in cuts} >= {1, 2}
    assert {cut.single for cut in cuts} == {False, True}
    for cut in cuts:
        out, _, *grads = both(q, k, v, mask, dout, norms if normed else None, cut)
        assert max(error(a, b) for a, b in zip((out, *grads), want, strict=True)) <= 1e-6


def test_many_runs_are_added_before_they_are_read() -> None:
    shape = (1, 257, 1, 8)
    x, dout = qkv(FULL, shape), qkv(FULL, shape, 1)[:, :, 0]
    q, k, v = x.unbind(2)
    cut = split(q, 1)._replace(tile=16)
    assert cut.runs(q) == 17
    out, _, *grads = both(q, k, v, None, dout, cut=cut)
    assert max(error(a, b) for a, b in zip((out, *grads), truth(x, None, dout), strict=True)) <= 1e-6


@pytest.mark.parametrize("normed", [False, True])
def test_bfloat16_before_it_is_rounded(normed: bool) -> None:
    """bfloat16 in, float32 out, rounded by torch to the nearest as a GPU does: the bars of a GPU.

    The products of its tensor cores (bfloat16 with float32 sums, and TF32) are not those of the interpreter.
    """
    shape = (2, 45, 2, 32)
    x, dout, norms = qkv(BRAIN, shape), qkv(BRAIN, shape, 1)[:, :, 0], norms_of(shape) if normed else None
    out, _, *grads = both(*x.unbind(2), None, dout, norms, dtype=FULL)
    want, *want_grads = truth(x, None, dout, norms)
    assert error(out.to(BRAIN), want) <= BARS[BRAIN][0]
    assert max(error(g.to(BRAIN), w) for g, w in zip(grads, want_grads, strict=True)) <= BARS[BRAIN][1]


def test_a_vanishing_query_under_a_norm() -> None:
    """What is left out of q's norm matters only in eps: as though it were at most 1 / sqrt(norm eps) larger."""
    shape = (1, 40, 2, 16)
    x, norms = qkv(FULL, shape), norms_of(shape)
    x[:, 3, 0] *= 1e-6
    x[:, 5, 0] = 0
    out = qkv_linear_attention(x, norms, eps=EPS, backend="triton")
    exact, larger = (normed_definition(x.double(), norms, None, eps) for eps in (0 * EPS + 1e-30, EPS / 1e-5**0.5))
    rows = [i for i in range(40) if i not in (3, 5)]
    assert error(out[:, rows], exact[:, rows]) <= 1e-6
    assert error(out[:, 3], exact[:, 3]) <= 1.01 * error(larger[:, 3], exact[:, 3])
    assert (out[:, 5] == 0).all()


def test_a_checkpoint_changes_no_bit() -> None:
    shape = (1, 40, 2, 16)
    x, norms = qkv(FULL, shape).requires_grad_(), norms_of(shape)

    def loss(x: Tensor) -> Tensor:
        y = qkv_linear_attention(x, norms, backend="triton")
        return linear_attention(y, y.square(), y, backend="triton").square().sum()

    again = checkpoint(loss, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, x)[0], torch.autograd.grad(loss(x), x)[0])


def test_exports_for_any_number_of_tokens() -> None:
    class Core(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return qkv_linear_attention(x, eps=EPS, backend="triton")

    shapes = {"x": {1: torch.export.Dim("tokens", min=2, max=65536)}}
    program = torch.export.export(Core(), (qkv(FULL, (1, 40, 2, 16)),), dynamic_shapes=shapes)
    assert "sana_lab.qkv_linear_attention" in program.graph_module.code
    longer = qkv(FULL, (1, 77, 2, 16))
    assert torch.equal(program.module()(longer), Core()(longer))


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16), (2, 5, 0, 16)])
def test_nothing_at_all(shape: tuple[int, int, int, int]) -> None:
    x = qkv(FULL, shape).requires_grad_()
    out = qkv_linear_attention(x, backend="triton")
    assert out.shape == shape
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("stride", [0, 1])
def test_offsets_are_wide(stride: int) -> None:
    """Images, or tokens, that lie 2^30 elements apart: the third is where 32 bits end. The system gives out memory only
    where it is used."""
    torch.use_deterministic_algorithms(False)  # no filling of 4 GiB
    shape = (3, 2, 1, 16) if stride == 0 else (1, 3, 1, 16)
    strides = [48, 48, 16, 16, 1]
    strides[stride] = 2**30
    storage = torch.empty(2**31 + 96, dtype=HALF, device=DEVICE)
    projected = storage.as_strided((shape[0], shape[1], 3, 1, 16), strides)
    projected.copy_(qkv(HALF, shape))
    dout, norms = qkv(HALF, shape, seed=1)[:, :, 0], norms_of(shape)
    grads = torch.empty(2**31 + 96, dtype=HALF, device=DEVICE).as_strided(projected.shape, strides)
    norm = norms.q, norms.k, kernel.inverse_rms(projected[:, :, 1], norms.eps)
    out = torch.empty_like(dout)
    state = kernel.forward_into(out, *projected.unbind(2), None, EPS, norm)
    kernel.backward_into(grads.unbind(2), dout, *projected.unbind(2), None, state, EPS, norm)
    want, *want_grads = truth(projected, None, dout, norms)
    assert error(out, want) <= 4e-4
    assert max(error(grads[:, :, i], want_grads[i]) for i in range(3)) <= 4e-4


@pytest.mark.gpu
def test_more_than_two_billion_elements() -> None:
    """A projection of 2^31 elements and more, of which the last image is compared; about 20 GB."""
    shape = (24, 16384, 57, 32)  # 24 * 16384 * 3 * 57 * 32 = 2^31 + 4.3e6
    torch.use_deterministic_algorithms(False)
    x = torch.randn(24, 16384, 3, 57, 32, dtype=BRAIN, device=DEVICE)
    assert x.numel() > 2**31
    dout = torch.randn(shape, dtype=BRAIN, device=DEVICE)
    out, state, rstd = op.qkv_linear_attention(x, None, None, 1.0, None, EPS)
    dx, *_ = op.qkv_linear_attention_backward(dout, x, None, None, None, state, rstd, EPS)
    want, *grads = truth(x[-1:], None, dout[-1:])
    assert error(out[-1:], want) <= BARS[BRAIN][0]
    assert max(error(dx[-1:, :, i], grads[i]) for i in range(3)) <= BARS[BRAIN][1]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2, 256, 36, 32), (2, 4096, 36, 32), (2, 1000, 5, 24)])
def test_a_cuda_graph_holds_forward_and_backward(shape: tuple[int, int, int, int]) -> None:
    """Captured, filled with other inputs and replayed: what an eager call gives, to the last bit."""
    torch.use_deterministic_algorithms(False)
    x, norms = qkv(BRAIN, shape).requires_grad_(), norms_of(shape)

    def run() -> tuple[Tensor, Tensor]:
        out = qkv_linear_attention(x, norms, backend="triton")
        return out, torch.autograd.grad(out, x, out.detach())[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, dx = run()
    with torch.no_grad():
        x.copy_(qkv(BRAIN, shape, seed=2))
    graph.replay()
    want, want_dx = run()
    assert torch.equal(out, want)
    assert torch.equal(dx, want_dx)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_an_attention_of_either_backend(qk_norm: bool) -> None:
    """The whole module: output, and the gradients of its input and of every parameter; and the same bits again."""
    results = []
    for backend in ("torch", "triton", "triton"):
        torch.manual_seed(0)
        spec = {"name": "linear", "head_dim": 8, "qk_norm": qk_norm, "backend": backend}
        attention, x = build("attention", spec, dim=16).to(DEVICE), torch.randn(1, 3, 5, 16).to(DEVICE).requires_grad_()
        out = attention(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *attention.parameters()])])
    assert all(error(a, b) < 2e-6 for a, b in zip(results[1], results[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("qk_norm", [False, True])
def test_an_attention_compiles_in_one_graph_under_autocast(qk_norm: bool) -> None:
    """As in training: float32 weights, a bfloat16 projection, gradients to the weights."""
    spec = {"name": "linear", "head_dim": 32, "qk_norm": qk_norm}
    module, plain = (build("attention", {**spec, "backend": b}, dim=64).to(DEVICE) for b in ("triton", "torch"))
    plain.load_state_dict(module.state_dict())
    tokens = torch.randn(2, 9, 37, 64, device=DEVICE)

    def gradients(run: Callable[[Tensor], Tensor], attention: torch.nn.Module) -> tuple[Tensor, ...]:
        with torch.autocast(DEVICE, dtype=BRAIN):
            loss = run(tokens).float().square().sum()
        return torch.autograd.grad(loss, list(attention.parameters()))

    results = gradients(torch.compile(module, fullgraph=True), module)
    assert all(error(a, b) < 2e-2 for a, b in zip(results, gradients(plain, plain), strict=True))
