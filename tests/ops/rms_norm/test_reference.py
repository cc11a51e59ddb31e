"""RMSNorm and residual: the forms for inference against the definition in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sana_lab.ops.rms_norm import reference as module
from sana_lab.ops.rms_norm import rms_norm_2d
from sana_lab.ops.rms_norm.reference import definition, operator

EPS = 1e-5


def inputs(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 24, 5, 7)) -> list[Tensor]:
    """x, weight, bias, residual."""
    torch.manual_seed(0)
    shapes = shape, shape[1:2], shape[1:2], shape
    return [torch.randn(s).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("backend", ["torch", "auto", "fast"])
def test_equals_torchs_own(dtype: torch.dtype, last: bool, added: bool, backend: Any, monkeypatch):
    monkeypatch.setattr(module, "CELLS", 400)  # several pieces, the last one smaller
    x, weight, bias, residual = inputs(dtype)
    expected = (F.rms_norm(x.double().movedim(1, -1), (24,), weight.double(), EPS) + bias.double()).movedim(-1, 1)
    expected = expected + residual.double() if added else expected
    given = x.to(memory_format=torch.channels_last) if last else x.clone()
    out = rms_norm_2d(given, weight, bias, EPS, residual if added else None, backend)
    assert out.dtype == dtype
    assert given.equal(x)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=20 * torch.finfo(dtype).eps)


def test_gradients_are_the_definitions_to_the_last_bit():
    results = []
    for call in (rms_norm_2d, definition):
        x, weight, bias, residual = (t.requires_grad_() for t in inputs())
        out = call(x, weight, bias, EPS, residual)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, weight, bias, residual))))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_operator_is_registered_well():
    x, weight, bias, residual = inputs()
    for rest in (None, residual):
        torch.library.opcheck(operator, (x.to(memory_format=torch.channels_last), weight, bias, EPS, rest))


def test_fast_says_what_it_needs():
    x, *rest = inputs(torch.bfloat16)
    with pytest.raises(ValueError, match=r"'fast' of RMSNorm needs torch.float32, torch.float64 on cpu, not"):
        rms_norm_2d(x, rest[0], rest[1], EPS, backend="fast")
    with pytest.raises(ValueError, match="not on meta"):
        rms_norm_2d(x.to("meta"), rest[0], rest[1], EPS, backend="fast")
    assert rms_norm_2d(x, rest[0], rest[1], EPS).equal(definition(x, rest[0], rest[1], EPS))
