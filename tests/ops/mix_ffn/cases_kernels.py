"""Cases for the Mix-FFN kernel, run by `kernel_cases`.

Errors are against the definition in float64.
"""

import copy

import pytest
import torch
from kernel_comparison import BOUNDS, BRAIN, DEVICE, FULL, HALF, error
from torch import Tensor

from sana_lab.models.autoencoders.dcae_blocks import GluMbConv
from sana_lab.models.layers import MixFfn
from sana_lab.ops.mix_ffn import kernels as kernel
from sana_lab.ops.mix_ffn import mix_ffn
from sana_lab.ops.mix_ffn.closed_form import definition

pytestmark = pytest.mark.usefixtures("poison")
Shape = tuple[int, int, int, int]


SMALL = [  # (B, h, w, M): one and two columns of programs, rows that end in mid-run, blocks of channels
    (FULL, (1, 5, 3, 10)),
    (FULL, (1, 2, 18, 3)),
    (FULL, (1, 1, 1, 1)),
    (FULL, (1, 2, 4, 130)),
    (HALF, (1, 3, 5, 40)),
    (BRAIN, (1, 3, 2, 4)),
]
LARGE = [
    (dtype, shape)
    for dtype in (FULL, HALF, BRAIN)
    for shape in [(2, 16, 16, 2880), (2, 32, 32, 2880), (3, 45, 19, 100), (1, 64, 64, 5600), (1, 33, 7, 1)]
]


def tensors(dtype: torch.dtype, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and a gradient of the result."""
    *grid, m = shape
    random = torch.Generator().manual_seed(0)
    shapes = (*grid, 2 * m), (2 * m, 1, 3, 3), (2 * m,), (*grid, m)
    x, weight, bias, dout = (torch.randn(s, generator=random).to(DEVICE, dtype) for s in shapes)
    return x, weight / 2, bias, dout


def compare(x: Tensor, weight: Tensor, bias: Tensor, dout: Tensor) -> None:
    """Output and the three gradients, against the definition in float64."""
    mine = [t.detach().requires_grad_() for t in (x, weight, bias)]
    theirs = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    out, want = mix_ffn(*mine, backend="triton"), definition(*theirs)
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    bound, bound_gradient = BOUNDS[x.dtype]
    assert error(out, want) <= bound
    got, expected = torch.autograd.grad(out, mine, dout), torch.autograd.grad(want, theirs, dout.double())
    errors = [error(a, b) for a, b in zip(got, expected, strict=True)]
    assert max(errors) <= bound_gradient, errors


@torch.no_grad()
def test_the_middle_of_dcaes_feed_forward_runs_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """GLUMBConv on channels-last cells in inference, against its convolutions in float64; in training it has none."""
    torch.manual_seed(0)
    block = GluMbConv(8).to(DEVICE)
    x = torch.randn(2, 8, 5, 7, device=DEVICE).contiguous(memory_format=torch.channels_last)
    want = copy.deepcopy(block).double()(x.double())
    calls: list[torch.Size] = []
    monkeypatch.setattr(block, "kernel", "triton")
    launch = kernel.launch

    def watched(to: object, cut: kernel.GridTiling, tokens: Tensor, *rest: object, **constants: object) -> None:
        calls.append(tokens.shape)
        launch(to, cut, tokens, *rest, **constants)

    monkeypatch.setattr(kernel, "launch", watched)
    assert error(block(x), want) <= BOUNDS[FULL][0]
    assert calls == [(2, 5, 7, 64)]
    with torch.enable_grad():
        block(x)
    assert len(calls) == 1


@pytest.mark.parametrize(("dtype", "shape"), SMALL)
@torch.no_grad()
def test_without_the_operator(dtype: torch.dtype, shape: Shape) -> None:
    """In inference the kernel is launched alone: the same to the last bit."""
    x, weight, bias, _ = tensors(dtype, shape)
    assert torch.equal(mix_ffn(x, weight, bias, backend="triton"), kernel.mix_ffn(x, weight, bias))


@pytest.mark.parametrize(("dtype", "shape"), SMALL)
def test_agrees_with_the_definition(dtype: torch.dtype, shape: Shape) -> None:
    compare(*tensors(dtype, shape))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "shape"), LARGE)
def test_agrees_at_size(dtype: torch.dtype, shape: Shape) -> None:
    compare(*tensors(dtype, shape))


def test_cuts_change_the_order_of_sums_alone() -> None:
    x, weight, bias, dout = tensors(FULL, (2, 3, 4, 4))
    plain, other = kernel.plan(x, 4), kernel.GridTiling(rows=2, columns=2, groups=2, channels=16, warps=1)
    outs = [kernel.forward(x, weight, bias, c) for c in (plain, other)]
    grads = [kernel.backward(dout, x, weight, bias, c) for c in (plain, other)]
    for one, two in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        assert error(two, one) < 1e-6


def test_layouts_and_repeats_to_the_last_bit() -> None:
    """Channels before columns before rows in memory, a gradient with strides of zero; a second run is the same."""
    x, weight, bias, _ = tensors(FULL, (1, 3, 4, 3))
    x = x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    dout = torch.randn(3, device=DEVICE).expand(1, 3, 4, 3)
    assert x.stride(1) == 1
    compare(x, weight, bias, dout)
    runs = [(kernel.forward(x, weight, bias), *kernel.backward(dout, x, weight, bias)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_float32_weight_of_a_bfloat16_stream() -> None:
    """As under autocast: the weight is not rounded, nor is its gradient."""
    x, weight, bias, dout = tensors(FULL, (1, 3, 2, 4))
    mine = [x.to(BRAIN).requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    theirs = [t.detach().double().requires_grad_() for t in mine]
    with torch.autocast(DEVICE, dtype=BRAIN):
        out = mix_ffn(*mine, backend="triton")
    want = definition(*theirs)
    assert error(out, want) <= BOUNDS[BRAIN][0]
    got = torch.autograd.grad(out, mine, dout.to(BRAIN))
    expected = torch.autograd.grad(want, theirs, dout.to(BRAIN).double())
    assert [g.dtype for g in got] == [BRAIN, FULL, FULL]
    assert max(error(a, b) for a, b in zip(got, expected, strict=True)) <= BOUNDS[BRAIN][1]


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # NumPy's, under the interpreter
def test_nan_and_overflow_are_not_hidden() -> None:
    """A NaN is seen by the nine tokens around it; a result beyond float16 is infinite, as by the definition."""
    x, weight, bias, _ = tensors(HALF, (1, 4, 4, 2))
    x[0, 0, 0, 0] = torch.nan
    out = mix_ffn(x, weight, bias, backend="triton")
    assert out[0, :2, :2, 0].isnan().all()
    assert out.isnan().sum() == 4
    out = mix_ffn(torch.full_like(x, 300.0), torch.ones_like(weight), bias, backend="triton")
    assert torch.equal(out.isinf(), definition(torch.full_like(x, 300.0), torch.ones_like(weight), bias).isinf())
    assert out.isinf().any()


def test_the_layer_in_one_graph_under_autocast() -> None:
    """Changing `backend` changes neither its keys nor its result."""
    torch.manual_seed(0)
    layers = [MixFfn(backend=backend, dim=4).to(DEVICE) for backend in ("torch", "triton")]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(1, 3, 3, 4, device=DEVICE)

    def loss(layer: torch.nn.Module) -> Tensor:
        with torch.autocast(DEVICE, dtype=HALF):
            return layer(x).float().square().sum()

    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = [(out, *torch.autograd.grad(out, layer.parameters())) for layer in layers for out in [whole(layer)]]
    assert max(error(a, b) for a, b in zip(results[1], results[0], strict=True)) < 2e-3


@pytest.mark.gpu
def test_offsets_beyond_two_billion() -> None:
    """Pictures of a batch that lie 2^30 elements apart: the third starts where 32-bit offsets end (4.3 GB)."""
    x, weight, bias, dout = tensors(BRAIN, (3, 5, 9, 32))
    storage = torch.empty(2 * 2**30 + 5 * 9 * 64, dtype=BRAIN, device=DEVICE)
    far = storage.as_strided(x.shape, (2**30, 9 * 64, 64, 1))
    far.copy_(x)
    compare(far, weight, bias, dout)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by opcheck itself
def test_operator_contract() -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares a fake's strides with real memory, poison or not
    x, weight, bias, dout = tensors(FULL, (1, 4, 5, 8))
    torch.library.opcheck(kernel.mix_ffn, tuple(t.clone().requires_grad_() for t in (x, weight, bias)))
    torch.library.opcheck(kernel.mix_ffn_backward, (dout, x, weight, bias))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FULL, HALF, BRAIN])
def test_cuda_graph(dtype: torch.dtype) -> None:
    """Forward and backward captured once and replayed on other numbers, to the last bit."""
    torch.use_deterministic_algorithms(False)  # filling with NaN is for the eager cases
    x, weight, bias, dout = tensors(dtype, (2, 16, 16, 288))

    def run() -> tuple[Tensor, ...]:
        return kernel.forward(x, weight, bias), *kernel.backward(dout, x, weight, bias)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    x.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, run(), strict=True))


@pytest.mark.gpu
def test_the_layer_through_inductor() -> None:
    layer = MixFfn(backend="triton", dim=64).to(DEVICE)
    x = torch.randn(2, 17, 16, 64, device=DEVICE)
    compiled = torch.compile(lambda t: layer(t).square().sum(), fullgraph=True)
    got, want = torch.autograd.grad(compiled(x), layer.parameters()), None
    layer.backend = "torch"
    want = torch.autograd.grad(layer(x).square().sum(), layer.parameters())
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 1e-3
