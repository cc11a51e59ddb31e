"""Cases for the kernel between layers, run by `kernel_cases`.

Errors are against the definition in float64.
"""

import pytest
import torch
from kernel_comparison import BOUNDS, BRAIN, DEVICE, FULL, HALF, error
from torch import Tensor

from sana_lab.config.specs import build
from sana_lab.ops.backend import Backend
from sana_lab.ops.modulate import add, add_modulate, modulate
from sana_lab.ops.modulate import kernels as kernel
from sana_lab.ops.modulate.closed_form import definition
from sana_lab.types import Text

pytestmark = pytest.mark.usefixtures("poison")
Shape = tuple[int, int, int, int]
Inputs = list[Tensor | None]


KINDS = {"modulate": (0, 3, 4), "add": (0, 1, 2), "add_modulate": (0, 1, 2, 3, 4), "without a gate": (0, 1, 3, 4)}
SMALL = [(FULL, (2, 1, 5, 20)), (FULL, (1, 1, 2, 600)), (HALF, (1, 1, 3, 80)), (BRAIN, (1, 2, 2, 16))]
LARGE = [
    (dtype, shape)
    for dtype in (FULL, HALF, BRAIN)
    for shape in [(2, 32, 32, 1152), (2, 16, 16, 2240), (3, 45, 19, 100), (1, 128, 128, 2240), (1, 3, 5, 8192)]
]


def tensors(kind: str, dtype: torch.dtype, shape: Shape) -> Inputs:
    """x, y, gate, shift and scale where the kind has them; the vectors are views of one tensor, as a block's are."""
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(shape, generator=random).to(DEVICE, dtype) for _ in range(2))
    vectors = torch.randn(shape[0], 6, shape[-1], generator=random).to(DEVICE, dtype).unbind(1)
    return [t if i in KINDS[kind] else None for i, t in enumerate((x, y, *vectors[:3]))]


def run(inputs: Inputs, backend: Backend = "triton") -> list[Tensor]:
    """Through the public functions: the results that the kind has."""
    x, y, gate, shift, scale = inputs
    assert x is not None
    if shift is None or scale is None:
        assert y is not None
        assert gate is not None
        return [add(x, y, gate, backend=backend)]
    if y is None:
        return [modulate(x, shift, scale, backend=backend)]
    return list(add_modulate(x, y, gate, shift, scale, backend=backend))


def grown(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    return [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]


def gradients(outs: list[Tensor], inputs: Inputs, seed: int = 1) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    douts = [torch.randn(out.shape, generator=random).to(DEVICE, HALF).to(out.dtype) for out in outs]
    return torch.autograd.grad(outs, [t for t in inputs if t is not None], douts)


def compare(given: Inputs, bounds: tuple[float, float]) -> None:
    """Results and gradients, against the definition in float64. Gradients come in exact in every dtype."""
    mine, theirs = grown(given), grown(given, torch.float64)
    outs, both = run(mine), definition(*theirs)
    wants = [both[-1]] if given[1] is None else list(both[: len(outs)])
    assert all(out.is_contiguous() for out in outs)
    assert max(error(a, b) for a, b in zip(outs, wants, strict=True)) <= bounds[0]
    got, want = gradients(outs, mine), gradients(wants, theirs)
    assert [g.dtype for g in got] == [t.dtype for t in given if t is not None]
    errors = [error(a, b) for a, b in zip(got, want, strict=True)]
    assert max(errors) <= bounds[1], errors


@pytest.mark.parametrize(("dtype", "shape"), SMALL)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_definition(kind: str, dtype: torch.dtype, shape: Shape) -> None:
    compare(tensors(kind, dtype, shape), BOUNDS[dtype])


@torch.no_grad()
def test_without_the_operator() -> None:
    """In inference the kernel is launched alone: the same to the last bit."""
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, 5, 24, generator=random).to(DEVICE) for _ in range(2))
    gate, shift, scale = (torch.randn(2, 24, generator=random).to(DEVICE) for _ in range(3))
    mine = add_modulate(x, y, gate, shift, scale, backend="triton")
    assert all(map(torch.equal, mine, kernel.modulate(x, y, gate, shift, scale, None)))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "shape"), LARGE)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_at_size(kind: str, dtype: torch.dtype, shape: Shape) -> None:
    compare(tensors(kind, dtype, shape), BOUNDS[dtype])


@pytest.mark.parametrize("gated", [True, False])
def test_mixed_precision(gated: bool) -> None:
    """A float32 stream, to which half precision is added: each gradient in the dtype of what it is of."""
    x, y, gate, shift, scale = tensors("add_modulate", FULL, (1, 2, 3, 40))
    assert y is not None
    compare([x, y.to(HALF), gate if gated else None, shift, scale], BOUNDS[HALF])
    outs = run([x, y.to(HALF), gate, shift, scale])
    assert [out.dtype for out in outs] == [FULL, FULL]
    with torch.autocast(DEVICE, dtype=BRAIN):
        narrow = run([x, y.to(HALF), gate, shift, scale])
    assert [out.dtype for out in narrow] == [FULL, BRAIN]
    assert torch.equal(narrow[0], outs[0])
    assert error(narrow[1], outs[1]) < BOUNDS[BRAIN][0]


def test_layouts_and_repeats_to_the_last_bit() -> None:
    """Channels before rows in memory, rows of a wider grid, a gate shared by the batch; a second run is the same."""
    x, y, gate, shift, scale = tensors("add_modulate", FULL, (2, 2, 2, 20))
    assert x is not None
    assert y is not None
    x, y = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), y.repeat(1, 1, 2, 1)[:, :, ::2]
    gate = None if gate is None else gate[:1]
    given: Inputs = [x, y, gate, shift, scale]
    compare(given, BOUNDS[FULL])
    runs = []
    for _ in range(2):
        inputs = grown(given)
        outs = run(inputs)
        runs.append([*outs, *gradients(outs, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_mean_far_from_zero_costs_only_its_own_digits() -> None:
    """The variance is of what is left without the mean: of squares of 1000 + noise float32 would keep a digit. The mean
    itself is good to 6e-5."""
    x = 1000 + torch.randn(1, 1, 3, 600, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    zero = torch.zeros(1, 600, device=DEVICE)
    want = definition(x.double(), None, None, zero.double(), zero.double())[1]
    assert error(modulate(x, zero, zero, backend="triton"), want) < 6e-5


def test_one_nan_is_one_tokens() -> None:
    x, _, _, shift, scale = tensors("modulate", FULL, (1, 2, 3, 20))
    assert x is not None
    x[0, 1, 1, 7] = torch.nan
    out = run([x, None, None, shift, scale])[0]
    assert out[0, 1, 1].isnan().all()
    assert out.isnan().sum() == 20


@pytest.mark.parametrize("cut", [kernel.TokenTiling(32, 4, 1), kernel.TokenTiling(64, 16, 2)])
def test_cuts_change_the_order_of_sums_alone(cut: kernel.TokenTiling) -> None:
    x, y, gate, _, scale = tensors("add_modulate", FULL, (2, 3, 3, 20))
    assert x is not None
    one = kernel.backward(x, x, y, y, gate, scale, FULL)
    two = kernel.backward(x, x, y, y, gate, scale, FULL, cut)
    assert max(error(b, a) for a, b in zip(one, two, strict=True)) < 1e-6


# --- the transformer


def dit(backend: Backend) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"dim": 16, "depth": 1, "cross_heads": 2, "attention": {"name": "linear", "head_dim": 8}}
    ffn = {"name": "mix", "ratio": 1.0, "backend": backend}
    model = build("dit", {"name": "sana", **options, "ffn": ffn, "backend": backend}, channels=4, text_dim=12)
    return model.to(DEVICE)


def velocity(model: torch.nn.Module) -> Tensor:
    random = torch.Generator().manual_seed(1)
    x, tokens = torch.randn(1, 4, 3, 2, generator=random), torch.randn(1, 5, 12, generator=random)
    text = Text(tokens.to(DEVICE), torch.ones(1, 5, dtype=torch.bool, device=DEVICE))
    return model(x.to(DEVICE), torch.tensor([0.2], device=DEVICE), text)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_transformer_gives_the_same(autocast: bool) -> None:
    """The same keys, velocity and gradients whichever way they are computed, also through a checkpoint."""
    torch.use_deterministic_algorithms(False)  # embeddings by index have no deterministic backward on a GPU
    results = []
    for backend in ("torch", "triton"):
        model = dit(backend)
        model.checkpointing = autocast
        with torch.autocast(DEVICE, dtype=HALF, enabled=autocast):
            out = velocity(model)
        grads = torch.autograd.grad(out.float().square().sum(), model.parameters())
        results.append([out, torch.cat([g.flatten() for g in grads])])
    assert max(error(a, b) for a, b in zip(*results, strict=True)) < (5e-3 if autocast else 1e-5)


@pytest.mark.gpu
def test_the_transformer_through_inductor() -> None:
    torch.use_deterministic_algorithms(False)
    plain, fast = dit("torch"), torch.compile(dit("triton"), fullgraph=True)
    with torch.no_grad():
        assert error(velocity(fast), velocity(plain)) < 1e-4


# --- on a device alone


@pytest.mark.gpu
def test_offsets_beyond_two_billion() -> None:
    """Pictures of a batch that lie 2^30 elements apart: the third starts where 32-bit offsets end (4.3 GB)."""
    inputs = tensors("add_modulate", BRAIN, (3, 5, 9, 64))
    storage = torch.empty(2 * 2**30 + 5 * 9 * 64, dtype=BRAIN, device=DEVICE)
    far = storage.as_strided((3, 5, 9, 64), (2**30, 9 * 64, 64, 1))
    far.copy_(inputs[0])
    compare([far, *inputs[1:]], BOUNDS[BRAIN])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by opcheck itself
@pytest.mark.parametrize("kind", KINDS)
def test_operator_contract(kind: str) -> None:
    torch.use_deterministic_algorithms(False)  # opcheck compares a fake's strides with real memory, poison or not
    torch.library.opcheck(kernel.modulate, (*grown(tensors(kind, FULL, (2, 3, 5, 24))), None))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FULL, HALF, BRAIN])
def test_cuda_graph(dtype: torch.dtype) -> None:
    """Forward and backward captured once and replayed on other numbers, to the last bit."""
    torch.use_deterministic_algorithms(False)  # filling with NaN is for the eager cases
    x, y, gate, shift, scale = tensors("add_modulate", dtype, (2, 16, 16, 1152))
    assert x is not None

    def both() -> tuple[Tensor, ...]:
        total, out = kernel.forward(x, y, gate, shift, scale, None)
        return total, out, *kernel.backward(total, out, total, y, gate, scale, dtype)

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both()
    x.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, both(), strict=True))
