"""The 3x3 convolution with what follows it: every backend against the definition, and where each may be used."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sana_lab.ops.conv import reference as module
from sana_lab.ops.conv.reference import Norm, conv3x3, operator, pays
from sana_lab.ops.inference_backend import uses_fast

CASES: list[dict[str, Any]] = [
    {},
    {"activation": "silu"},
    {"activation": "relu", "residual": True},
    {"norm": True},
    {"norm": True, "residual": True, "activation": "silu"},
]


def inputs(dtype: torch.dtype = torch.float64, *size: int, **options: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """x, weight, bias; and the options with tensors in place of True."""
    torch.manual_seed(0)
    height, width = size or (9, 14)
    x, weight, bias = torch.randn(2, 6, height, width), torch.randn(8, 6, 3, 3), torch.randn(8)
    arguments = dict(options)
    if options.get("norm"):
        arguments["norm"] = Norm(torch.randn(8).to(dtype), torch.randn(8).to(dtype), 1e-5)
    if options.get("residual"):
        arguments["residual"] = torch.randn(2, 8, height, width).to(dtype)
    return [t.to(dtype) for t in (x, weight, bias)], arguments


def plainly(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """Step by step, with other functions of torch."""
    y = F.conv2d(F.pad(x, (1, 1, 1, 1)), weight, bias)
    y = {"none": y, "relu": y.clamp(min=0), "silu": y * torch.sigmoid(y)}[options.get("activation", "none")]
    if "norm" in options:
        weights, shift, eps = options["norm"]
        y = (F.rms_norm(y.movedim(1, -1), y.shape[1:2], weights, eps) + shift).movedim(-1, 1)
    return y + options["residual"] if "residual" in options else y


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("backend", ["torch", "auto", "fast"])
def test_every_backend_is_the_definition(options: dict[str, Any], backend: Any):
    tensors, options = inputs(**options)
    for x in (tensors[0], tensors[0].to(memory_format=torch.channels_last)):
        kept = [t.clone() for t in (x, *tensors[1:])]
        out = conv3x3(x, *tensors[1:], **options, backend=backend)
        torch.testing.assert_close(out, plainly(*tensors, **options), rtol=1e-11, atol=1e-11)
        assert all(a.equal(b) for a, b in zip((x, *tensors[1:]), kept, strict=True))


def test_auto_takes_winograd_where_it_pays(monkeypatch):
    x, weight = torch.randn(1, 64, 64, 64), torch.randn(64, 64, 3, 3)
    assert pays(x, weight)
    assert not pays(x[..., :32], weight)
    assert not pays(x[:, :8], weight[:, :8])
    assert not pays(x.double(), weight.double())
    assert not pays(x.to("meta"), weight)
    calls: list[Tensor] = []
    monkeypatch.setattr(module, "operator", lambda x, *rest: calls.append(x) or operator(x, *rest))
    truth = F.conv2d(x.double(), weight.double(), padding=1)
    assert (conv3x3(x, weight) - truth).norm() <= 5e-6 * truth.norm()
    assert len(calls) == 1
    assert conv3x3(x, weight, backend="torch").equal(F.conv2d(x, weight, padding=1))
    assert len(calls) == 1


def test_gradients_are_the_definitions_to_the_last_bit():
    tensors, options = inputs(torch.float32, 64, 64, norm=True, residual=True, activation="silu")
    results = []
    for backend in ("auto", "torch"):
        for t in tensors:
            t.requires_grad_()
        out = conv3x3(*tensors, **options, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), tensors)))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_nothing_is_kept_of_a_weight_that_changes():
    (x, weight, bias), _ = inputs()
    for _ in range(2):
        torch.testing.assert_close(conv3x3(x, weight, bias, backend="fast"), plainly(x, weight, bias))
        weight.data.mul_(3)  # which no version counter sees


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any):
    tensors, options = inputs(norm=True, residual=True)
    with mode():
        weight = torch.nn.Parameter(tensors[1])
        out = conv3x3(tensors[0], weight, tensors[2], **options, backend="fast")
        out.mul_(2)
    torch.testing.assert_close(out, 2 * plainly(*tensors, **options), rtol=1e-11, atol=1e-11)


def test_operator_is_registered_well():
    tensors, _ = inputs(torch.float32)
    x = tensors[0].to(memory_format=torch.channels_last)
    for rest in (
        ("none", None, None, 0.0, None),
        ("silu", torch.ones(8), torch.zeros(8), 1e-5, torch.ones(2, 8, 9, 14)),
    ):
        torch.library.opcheck(operator, (x, *tensors[1:], *rest))


def test_products_are_counted_as_in_the_definition():
    tensors, options = inputs(norm=True)
    counts = []
    for backend in ("torch", "fast"):
        with FlopCounterMode(display=False) as counter:
            conv3x3(*tensors, **options, backend=backend)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * 9 * 14 * 8 * 6 * 9] * 2


# --- bad input


def test_fast_where_it_cannot_be_is_refused():
    tensors, _ = inputs()
    tensors[1].requires_grad_()
    with pytest.raises(ValueError, match="'fast' records no gradient"):
        conv3x3(*tensors, backend="fast")
    with torch.no_grad():
        assert conv3x3(*tensors, backend="fast").requires_grad is False
        with pytest.raises(ValueError, match=r"needs float32 or float64, not torch.bfloat16"):
            conv3x3(*(t.bfloat16() for t in tensors), backend="fast")
        with torch.autocast("cpu"), pytest.raises(ValueError, match="autocast"):
            conv3x3(*tensors, backend="fast")
    with pytest.raises(ValueError, match="'winograd' is unknown; expected one of auto, torch, fast"):
        conv3x3(*tensors, backend="winograd")


def test_auto_leaves_autocast_and_gradients_to_the_definition():
    x = torch.zeros(1, requires_grad=True)
    assert not uses_fast("auto", x)
    assert uses_fast("auto", x.detach(), None)
    with torch.no_grad():
        assert uses_fast("auto", x)
        assert not uses_fast("auto", x, pays=False)
        with torch.autocast("cpu"):
            assert not uses_fast("auto", x)
