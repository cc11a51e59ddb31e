"""Cases for the Triton kernel of RMSNorm, run by `kernel_cases`."""

import pytest
import torch
from kernel_comparison import DEVICE, INTERPRETED
from torch import Tensor

from sana_lab.ops.rms_norm import kernels as kernel
from sana_lab.ops.rms_norm import rms_norm_2d
from sana_lab.ops.rms_norm.reference import definition

pytestmark = pytest.mark.usefixtures("poison")
EPS = 1e-5

# relative L2; the interpreter truncates to bfloat16 where a GPU rounds
BOUNDS = {torch.float32: 3e-7, torch.float16: 4e-4, torch.bfloat16: 6e-3 if INTERPRETED else 2.5e-3}


def inputs(dtype: torch.dtype, shape: tuple[int, ...]) -> list[Tensor]:
    """x, weight, bias, residual."""
    generator = torch.Generator().manual_seed(0)
    shapes = shape, shape[1:2], shape[1:2], shape
    return [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes]


def error(out: Tensor, tensors: list[Tensor], added: bool) -> float:
    x, weight, bias, residual = (t.double() for t in tensors)
    truth = definition(x, weight, bias, EPS, residual if added else None)
    return float((out.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(2, 24, 5, 7), (1, 1, 3, 3), (1, 130, 2, 9), (1, 1024, 1, 3)])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_equals_the_definition(dtype: torch.dtype, shape: tuple[int, ...], added: bool, last: bool):
    tensors = inputs(dtype, shape)
    x, weight, bias, residual = tensors
    x = x.to(memory_format=torch.channels_last) if last else x
    out = kernel.forward(x, weight, bias, EPS, residual if added else None)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert error(out, tensors, added) <= BOUNDS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        *((dtype, shape) for dtype in BOUNDS for shape in [(1, 128, 512, 512), (2, 512, 64, 96)]),
        *((dtype, (1, 128, 4096, 4096)) for dtype in (torch.float16, torch.bfloat16)),
    ],
)
def test_large_grids(dtype: torch.dtype, shape: tuple[int, ...]):
    """The last has 2^31 numbers, whose offsets do not fit 32 bits; in float32 its reference would fit few cards."""
    x = torch.randn(shape, device=DEVICE, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, shape[1], device=DEVICE, dtype=dtype)
    out = rms_norm_2d(x, weight, bias, EPS, x, backend="fast")
    for part in (slice(0, 8), slice(-8, None)):
        piece, source = out[:, :, part], x[:, :, part]
        assert error(piece, [source, weight, bias, source], True) <= BOUNDS[dtype]


@pytest.mark.gpu
def test_operator_on_cuda_is_registered_well():
    x, weight, bias, residual = inputs(torch.float32, (2, 24, 5, 7))
    x = x.to(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.sana_lab.rms_norm_2d.default, (x, weight, bias, EPS, residual))
