"""The middle of Mix-FFN: its definition against a loop over taps, its gradients, and its operator on the CPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sana_lab.costs.flops import count_macs
from sana_lab.ops.mix_ffn import mix_ffn
from sana_lab.ops.mix_ffn.closed_form import definition, gradients

GRIDS = [(1, 1), (1, 2), (2, 2), (3, 1), (4, 5), (7, 3)]


def tensors(grid: tuple[int, int], m: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = (2, *grid, 2 * m), (2 * m, 1, 3, 3), (2 * m,)
    x, weight, bias = (torch.randn(s, dtype=torch.float64, generator=random).to(dtype) for s in shapes)
    return x, weight, bias


def naive(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Token by token and tap by tap."""
    h, w = x.shape[1:3]
    y = torch.zeros_like(x) + bias
    for i in range(h):
        for j in range(w):
            for di in (-1, 0, 1):
                for dj in (-1, 0, 1):
                    if 0 <= i + di < h and 0 <= j + dj < w:
                        near = x[:, i + di, j + dj]
                        y[:, i, j] += near * torch.sigmoid(near) * weight[:, 0, 1 + di, 1 + dj]
    a, g = y[..., : y.shape[-1] // 2], y[..., y.shape[-1] // 2 :]
    return a * g * torch.sigmoid(g)


@pytest.mark.parametrize("grid", GRIDS)
def test_definition_is_the_sum_over_taps(grid: tuple[int, int]) -> None:
    torch.testing.assert_close(mix_ffn(*tensors(grid)), naive(*tensors(grid)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("grid", GRIDS)
def test_gradients_in_closed_form_are_autograds(grid: tuple[int, int]) -> None:
    inputs = [t.requires_grad_() for t in tensors(grid)]
    out = definition(*inputs)
    dout = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for got, want in zip(gradients(dout, *inputs), torch.autograd.grad(out, inputs, dout), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("grid", GRIDS)
def test_overwriting_changes_no_bit(grid: tuple[int, int]) -> None:
    x, weight, bias = tensors(grid, dtype=torch.float32)
    expected, before = mix_ffn(x, weight, bias), x.clone()
    assert torch.equal(mix_ffn(x, weight, bias, overwrite=True), expected)  # gradients could be taken: nothing is lost
    assert torch.equal(x, before)
    with torch.no_grad():
        assert torch.equal(mix_ffn(x, weight, bias), expected)
        assert torch.equal(x, before)
        assert torch.equal(mix_ffn(x, weight, bias, overwrite=True), expected)


def test_pictures_that_are_channels_last_stay_so() -> None:
    """As a picture model calls it; the same as its own layers."""
    convolution = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    x = torch.randn(2, 6, 5, 4).contiguous(memory_format=torch.channels_last)
    bias = convolution.bias
    assert bias is not None
    out = mix_ffn(x.permute(0, 2, 3, 1), convolution.weight, bias).permute(0, 3, 1, 2)
    value, gate = convolution(F.silu(x)).chunk(2, 1)
    assert torch.equal(out, value * F.silu(gate))
    assert out.is_contiguous(memory_format=torch.channels_last)


# --- the operator, which is the closed form on the CPU


@pytest.fixture
def operator() -> Callable[..., Tensor]:
    pytest.importorskip("triton")
    from sana_lab.ops.mix_ffn import kernels

    return kernels.mix_ffn


def assert_same(got: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Output and gradients are the definition's."""
    for x in inputs:
        x.requires_grad_()
    a, b = got(*inputs), definition(*inputs)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.autograd.grad(a.sum(), inputs), torch.autograd.grad(b.sum(), inputs))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by opcheck itself
def test_operator_contract(operator: Callable[..., Tensor]) -> None:
    """Schema, fake tensors, autograd registration and tracing, as torch itself checks them."""
    inputs = tensors((4, 5), dtype=torch.float32)
    torch.library.opcheck(operator, tuple(t.requires_grad_() for t in inputs))
    backward = torch.ops.sana_lab.mix_ffn_backward
    torch.library.opcheck(backward, (operator(*inputs).detach(), *(t.detach() for t in inputs)))


def test_operator_in_one_graph_under_a_checkpoint(operator: Callable[..., Tensor]) -> None:
    inputs = list(tensors((4, 5)))

    def kept(*given: Tensor) -> Tensor:
        return checkpoint(operator, *given, use_reentrant=False)

    assert_same(kept, inputs)
    assert_same(torch.compile(operator, fullgraph=True, backend="aot_eager"), inputs)


def test_operator_is_exported_for_any_grid(operator: Callable[..., Tensor]) -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return operator(x, weight, bias)

    free = {1: torch.export.Dim("h", min=2), 2: torch.export.Dim("w", min=2)}
    program = torch.export.export(Layer(), tensors((4, 5)), dynamic_shapes=(free, None, None))
    assert [node for node in program.graph.nodes if "sana_lab.mix_ffn" in str(node.target)]
    torch.testing.assert_close(program.module()(*tensors((7, 3))), definition(*tensors((7, 3))))


def test_operator_takes_a_float32_weight_and_the_meta_device(operator: Callable[..., Tensor]) -> None:
    x, weight, bias = tensors((4, 5), dtype=torch.float32)
    out = mix_ffn(x.to("meta", torch.bfloat16), weight.to("meta"), bias.to("meta"), backend="triton")
    assert (out.shape, out.dtype) == ((2, 4, 5, 3), torch.bfloat16)


@pytest.mark.parametrize("grid", [(2, 1), (3, 4)])
def test_operator_counts_as_much_as_the_definition(grid: tuple[int, int]) -> None:
    pytest.importorskip("triton")
    inputs = [t.to("meta", torch.float32).requires_grad_() for t in tensors(grid)]
    tokens = max(3, grid[0]) * max(3, grid[1])  # a grid below the kernel's size is widened
    for backend in ("torch", "triton"):
        out = mix_ffn(*inputs, backend=backend)
        with FlopCounterMode(display=False) as counter:
            mix_ffn(*inputs, backend=backend)
        assert counter.get_total_flops() == 2 * 2 * tokens * 6 * 9
        assert count_macs(lambda out=out: out.sum().backward()) == 2 * 2 * tokens * 6 * 9


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 8)}, r"x must be \(B, h, w, 2M\), values and then gates; got \(2, 3, 8\)"),
        ({"x": torch.zeros(2, 3, 3, 7)}, r"values and then gates; got \(2, 3, 3, 7\)"),
        ({"weight": torch.zeros(8, 8, 3, 3)}, r"weight must be \(8, 1, k, k\) .* got \(8, 8, 3, 3\) and \(8,\)"),
        ({"weight": torch.zeros(8, 1, 3, 5)}, r"weight must be \(8, 1, k, k\) .* got \(8, 1, 3, 5\)"),
        ({"bias": torch.zeros(4)}, r"bias \(8,\), one for each of x's channels; got .* \(4,\)"),
        (
            {"x": torch.zeros(1, 3, 3, 8).int()},
            "must be floating, weight and bias alike; got torch.int32, torch.float32",
        ),
        ({"bias": torch.zeros(8).half()}, "weight and bias alike; got torch.float32, torch.float32, torch.float16"),
        ({"bias": torch.zeros(8, device="meta")}, "must be on one device; got cpu, cpu, meta"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Tensor], message: str) -> None:
    good = {"x": torch.zeros(1, 3, 3, 8), "weight": torch.zeros(8, 1, 3, 3), "bias": torch.zeros(8)}
    with pytest.raises(ValueError, match=message):
        mix_ffn(**(good | change))


@pytest.mark.parametrize(
    ("dtype", "kernel", "tokens", "needs"),
    [
        (torch.float64, 3, 9, "float16, bfloat16 or float32 tensors, not torch.float64"),
        (torch.float32, 5, 9, "a depthwise kernel of 3 x 3, not 5 x 5"),
        (torch.float32, 3, 0, "at least one token"),
        (torch.float32, 3, 9, "CUDA tensors, or TRITON_INTERPRET=1 .* are on cpu, which backend 'torch' takes"),
    ],
)
def test_explicit_triton_never_falls_back(dtype: torch.dtype, kernel: int, tokens: int, needs: str) -> None:
    pytest.importorskip("triton")
    x, weight = torch.zeros(1, 3, tokens // 3, 8, dtype=dtype), torch.zeros(8, 1, kernel, kernel, dtype=dtype)
    with pytest.raises(ValueError, match=f"'triton' needs {needs}"):
        mix_ffn(x, weight, torch.zeros(8, dtype=dtype), backend="triton")
