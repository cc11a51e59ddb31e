"""Cases for benchmarks/nvlabs_algorithm.py, run by `kernel_cases`."""

import sys
from pathlib import Path

import pytest
import torch
from kernel_comparison import DEVICE, INTERPRETED, error

from sana_lab.ops.linear_attention.reference import definition

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import nvlabs_algorithm as peer

# TF32 on a GPU; the interpreter multiplies in float32
BOUNDS = {torch.float32: 1e-6 if INTERPRETED else 2e-3, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("config", [peer.Config(32), peer.Config(64)])
@pytest.mark.parametrize(("shape", "dtype"), [((2, 70, 2, 32), torch.float32), ((1, 33, 3, 32), torch.float16)])
def test_it_is_linear_attention(shape: tuple[int, ...], dtype: torch.dtype, config: peer.Config) -> None:
    """Output and the projection's gradient, against the definition in float64."""
    b, n, h, d = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(b, n, 3 * h * d, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = torch.randn(b, n, h * d, generator=generator).to(DEVICE, dtype)
    y = x.detach().double().requires_grad_()
    out = peer.core(x, h, config)
    want = definition(*y.unflatten(-1, (3, h, d)).unbind(2), None, peer.EPS).flatten(2)
    assert out.dtype == dtype
    assert error(out, want) <= BOUNDS[dtype]
    (dx,), (dy,) = torch.autograd.grad(out, x, weight), torch.autograd.grad(want, y, weight.double())
    assert error(dx, dy) <= BOUNDS[dtype]


def test_it_always_writes_numerators_and_normalisers() -> None:
    with torch.no_grad():
        out, vk, middle = peer.forward(torch.randn(1, 9, 3, 2, 32, device=DEVICE), peer.Config(32))
    assert (middle.dtype, middle.shape, vk.shape) == (torch.float32, (1, 9, 2, 33), (1, 2, 33, 32))
    assert torch.allclose(out, middle[..., :32] / middle[..., 32:], atol=1e-6)


@pytest.mark.gpu
def test_a_configuration_is_chosen_by_timing() -> None:
    x = torch.randn(2, 300, 3 * 64, device=DEVICE, dtype=torch.bfloat16)
    assert peer.fastest(x, 2, gradients=True) in peer.CONFIGS
