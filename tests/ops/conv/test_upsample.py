"""Nearest neighbours and a 3x3 convolution, and the transposed convolution that is the same."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sana_lab.ops.conv import upsample as module
from sana_lab.ops.conv.upsample import folded, operator, pays, upsample_conv3x3


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(*shape).to(dtype) for shape in ((2, 5, 3, 7), (4, 5, 3, 3), (4,)))  # type: ignore[return-value]


def naive(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Output by output."""
    batch, _, height, width = x.shape
    out = x.new_zeros(batch, len(weight), 2 * height, 2 * width)
    for row in range(2 * height):
        for column in range(2 * width):
            for i in range(3):
                for j in range(3):
                    y, z = row + i - 1, column + j - 1
                    if 0 <= y < 2 * height and 0 <= z < 2 * width:
                        out[..., row, column] += x[..., y // 2, z // 2] @ weight[..., i, j].T
    return out if bias is None else out + bias[:, None, None]


@pytest.mark.parametrize("backend", ["torch", "fast"])
@pytest.mark.parametrize("biased", [False, True])
def test_every_backend_is_the_loop(backend, biased):
    x, weight, bias = inputs()
    out = upsample_conv3x3(x, weight, bias if biased else None, backend)
    torch.testing.assert_close(out, naive(x, weight, bias if biased else None), rtol=0, atol=1e-12)


def test_half_precision_rounds_the_folded_kernel_once():
    _, weight, _ = inputs(torch.bfloat16)
    assert folded(weight).equal(folded(weight.double()).to(torch.bfloat16))


def test_folding_stays_on_the_device():
    """No tensor of the host: a copy from it would have the host wait, and forbid a CUDA graph."""
    devices: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            devices.extend(t.device.type for t in tree_leaves(out) if isinstance(t, Tensor))
            return out

    weight = torch.empty(4, 5, 3, 3, device="meta")
    with Watch():
        folded(weight)
    assert {*devices} == {"meta"}


def test_auto_folds_where_it_pays_and_no_gradient_is_recorded(monkeypatch):
    calls: list[Tensor] = []
    monkeypatch.setattr(module, "operator", lambda x, *rest: calls.append(x) or operator(x, *rest))
    x, weight, bias = inputs(torch.float32)
    assert not pays(x)
    large = x.repeat(1, 1, 10, 10)
    assert pays(large)
    for given in (x, large, large.clone().requires_grad_()):
        upsample_conv3x3(given, weight, bias)
    assert len(calls) == 1


def test_operator_is_registered_well_and_counted_as_in_the_definition():
    tensors = inputs(torch.float32)
    for x in (tensors[0], tensors[0].to(memory_format=torch.channels_last)):
        torch.library.opcheck(operator, (x, *tensors[1:]))
    with FlopCounterMode(display=False) as counter:
        upsample_conv3x3(*tensors, "fast")
    assert counter.get_total_flops() == 2 * 2 * (6 * 14) * 4 * 5 * 9
