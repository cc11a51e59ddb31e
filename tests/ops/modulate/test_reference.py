"""Gated residual, norm and modulation: definition against a loop over tokens, gradients, the operator on the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sana_lab.ops.modulate import add, add_modulate, modulate
from sana_lab.ops.modulate.closed_form import definition, gradients

KINDS = {  # which of y, gate, shift and scale are there, and which of sum and out come back
    "modulate": ((0, 3, 4), (1,)),
    "add": ((0, 1, 2), (0,)),
    "add_modulate": ((0, 1, 2, 3, 4), (0, 1)),
    "add_modulate without a gate": ((0, 1, 3, 4), (0, 1)),
}


def tensors(kind: str, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    """x, y, gate, shift and scale; the vectors are views of one tensor, as a block has them."""
    random = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=random).to(dtype) for _ in range(2))
    vectors = torch.randn(2, 6, 8, dtype=torch.float64, generator=random).to(dtype).unbind(1)
    return [t if i in KINDS[kind][0] else None for i, t in enumerate((x, y, *vectors[:3]))]


def leaves(inputs: list[Tensor | None]) -> list[Tensor]:
    return [t.requires_grad_() for t in inputs if t is not None]


def test_modulate_is_a_norm_then_an_affine_map() -> None:
    x, _, _, shift, scale = tensors("modulate")
    assert x is not None
    assert shift is not None
    assert scale is not None
    out = modulate(x, shift, scale)
    for b, i, j in [(0, 0, 0), (1, 2, 4)]:
        token = x[b, i, j]
        normed = (token - token.mean()) / (token.var(unbiased=False) + 1e-6).sqrt()
        torch.testing.assert_close(out[b, i, j], normed * (1 + scale[b]) + shift[b])


def test_the_parts_are_those_of_the_whole() -> None:
    x, y, gate, shift, scale = (t for t in tensors("add_modulate", torch.float32) if t is not None)
    total, out = add_modulate(x, y, gate, shift, scale)
    assert torch.equal(total, x + gate[:, None, None] * y)
    assert torch.equal(total, add(x, y, gate))
    assert torch.equal(out, modulate(total, shift, scale))
    total, out = add_modulate(x, y, None, shift, scale)
    assert torch.equal(total, x + y)
    assert torch.equal(out, modulate(x + y, shift, scale))


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float32, torch.half), (torch.half, torch.float32)])
@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_bits_are_the_same(kind: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """It writes over what it made itself then, and over nothing that it was given."""
    x, y, *vectors = tensors(kind, dtypes[0])
    assert x is not None
    inputs = [x, y, *(None if t is None else t.to(dtypes[1])[:1] for t in vectors)]
    before = [None if t is None else t.clone() for t in inputs]
    want = definition(*inputs)
    with torch.no_grad():
        got = definition(*inputs)
    assert [t.dtype for t in got] == [t.dtype for t in want]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(a is None or torch.equal(a, b) for a, b in zip(inputs, before, strict=True) if b is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_closed_form_are_autograds(kind: str) -> None:
    inputs = tensors(kind)
    _, y, gate, _, scale = inputs
    wanted, given = leaves(inputs), [definition(*inputs)[i] for i in KINDS[kind][1]]
    douts = [torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    want = torch.autograd.grad(given, wanted, douts[: len(given)])
    dsum, dout = None if kind == "modulate" else douts[0], douts[len(given) - 1]
    total = None if scale is None else definition(*inputs)[0]
    got = gradients(dsum, None if scale is None else dout, total, y if gate is not None else None, gate, scale)
    same = [got[0], got[0] if y is not None and gate is None else got[1], *got[2:]]
    for a, b in zip([g for g in same if g is not None], want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --- the operator, which is the closed form on the CPU


@pytest.fixture
def operator() -> Callable[..., tuple[Tensor, Tensor]]:
    pytest.importorskip("triton")
    from sana_lab.ops.modulate import kernels

    return kernels.modulate


def assert_same(got: Callable[..., tuple[Tensor, Tensor]], kind: str) -> None:
    """Outputs and gradients are the definition's."""
    inputs = tensors(kind)
    wanted, numbers = leaves(inputs), KINDS[kind][1]
    mine, theirs = ([outs[i] for i in numbers] for outs in (got(*inputs, None), definition(*inputs)))
    torch.testing.assert_close(mine, theirs)
    both = [torch.autograd.grad(sum(out.sin().sum() for out in outs), wanted) for outs in (mine, theirs)]
    torch.testing.assert_close(*both)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by opcheck itself
@pytest.mark.parametrize("kind", KINDS)
def test_operator_contract(kind: str, operator: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Schema, fake tensors, autograd registration and tracing, as torch itself checks them."""
    inputs = tensors(kind, torch.float32)
    leaves(inputs)
    torch.library.opcheck(operator, (*inputs, None))
    x, y, gate, _, scale = (None if t is None else t.detach() for t in inputs)
    dsum, dout, total = None if y is None else x, None if scale is None else x, None if scale is None else x
    saved = (dsum, dout, total, y if gate is not None else None, gate, scale, torch.float32)
    torch.library.opcheck(torch.ops.sana_lab.modulate_backward, saved)


@pytest.mark.parametrize("kind", KINDS)
def test_operator_in_one_graph_under_a_checkpoint(kind: str, operator: Callable[..., tuple[Tensor, Tensor]]) -> None:
    def kept(*given: Any) -> Any:
        return checkpoint(operator, *given, use_reentrant=False)

    assert_same(kept, kind)
    assert_same(torch.compile(operator, fullgraph=True, backend="aot_eager"), kind)


def test_operator_is_exported_for_any_grid(operator: Callable[..., tuple[Tensor, Tensor]]) -> None:
    class Layer(nn.Module):
        def forward(self, x: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            return operator(x, y, None, shift, scale, None)

    given = [t for t in tensors("add_modulate without a gate") if t is not None]
    free = {1: torch.export.Dim("h", min=2), 2: torch.export.Dim("w", min=2)}
    program = torch.export.export(Layer(), tuple(given), dynamic_shapes=(free, free, None, None))
    other = [t.repeat(1, 3, 1, 1) if t.ndim == 4 else t for t in given]
    torch.testing.assert_close(program.module()(*other), definition(other[0], other[1], None, other[2], other[3]))


def test_operator_promotes_as_torch_does_and_narrows_under_autocast() -> None:
    """In mixed precision the stream is float32, what is added bfloat16; a linear layer reads the modulated result."""
    pytest.importorskip("triton")
    x, y, gate, shift, scale = (t.to("meta") for t in tensors("add_modulate", torch.float32) if t is not None)
    for dtypes in [(torch.bfloat16,) * 3, (torch.float32, torch.bfloat16, torch.float32), (torch.half,) * 3]:
        a, b, c = x.to(dtypes[0]), y.to(dtypes[1]), gate.to(dtypes[2])
        want = [t.dtype for t in definition(a, b, c, shift, scale)]
        assert [t.dtype for t in add_modulate(a, b, c, shift, scale, backend="triton")] == want
    from sana_lab.ops.modulate import kernels

    total, out = kernels.modulate(x, y, gate, shift, scale, torch.bfloat16)
    assert (total.dtype, out.dtype) == (torch.float32, torch.bfloat16)


# --- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 8)}, r"x and y must be \(B, h, w, C\) of one shape; got \(2, 3, 8\)"),
        ({"y": torch.zeros(2, 3, 5, 9)}, r"of one shape; got \(2, 3, 5, 8\), \(2, 3, 5, 9\)"),
        (
            {"gate": torch.zeros(2, 1, 8)},
            r"must be \(B, C\) = \(2, 8\) or \(1, C\), as x is \(2, 3, 5, 8\); got \[\(2, 1, 8\)",
        ),
        ({"shift": torch.zeros(3, 8)}, r"must be \(B, C\) = \(2, 8\)"),
        ({"scale": torch.zeros(2, 8).half()}, "shift and scale must have one dtype; got torch.float32, torch.float16"),
        ({"y": torch.zeros(2, 3, 5, 8).int()}, "must be floating; got .*torch.int32"),
        ({"gate": torch.zeros(2, 8, device="meta")}, "must be on one device; got .*meta"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Tensor], message: str) -> None:
    good = dict(zip(("x", "y", "gate", "shift", "scale"), tensors("add_modulate", torch.float32), strict=True))
    with pytest.raises(ValueError, match=message):
        add_modulate(**(good | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "dtype", "needs"),
    [
        ((1, 1, 1, 8), torch.float64, "float16, bfloat16 or float32 tensors, not torch.float64"),
        ((1, 1, 1, 8200), torch.float32, "a width of at most 8192, not 8200"),
        ((1, 0, 1, 8), torch.float32, "at least one token"),
        ((1, 1, 1, 8), torch.float32, "CUDA tensors, or TRITON_INTERPRET=1 .* are on cpu, which backend 'torch' takes"),
    ],
)
def test_explicit_triton_never_falls_back(shape: tuple[int, ...], dtype: torch.dtype, needs: str) -> None:
    pytest.importorskip("triton")
    vector = torch.zeros(shape[0], shape[-1], dtype=dtype)
    with pytest.raises(ValueError, match=f"'triton' needs {needs}"):
        modulate(torch.zeros(shape, dtype=dtype), vector, vector, backend="triton")
