"""Numbers of 8 and 4 bits against their grids by brute force, and the e4m3 kernel against its definition."""

import itertools

import pytest
import torch
from torch import Tensor

from sana_lab.ops.low_bits import E2M1, e4m3_matmul, e4m3_product, e4m3_rows, int4, nvfp4


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal values whose rows have magnitudes from 0.01 to 100."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-2, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))


def test_e4m3_rows_round_to_the_nearest_of_the_grid():
    bits = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = bits[bits.isfinite()]
    x = random(5, 64)
    values, scale = e4m3_rows(x)
    assert (values.float().abs().amax(1) == 448).all()
    nearest = ((x / scale)[..., None] - grid).abs().amin(-1)
    assert torch.allclose((x / scale - values.float()).abs(), nearest, atol=1e-4)
    assert ((values.float() * scale - x).abs() <= x.abs() * 2**-4 + scale * 2**-9).all()


def test_rows_of_zeros_stay_zeros():
    for x in (e4m3_rows(torch.zeros(2, 32))[0].float(), int4(torch.zeros(2, 32)), nvfp4(torch.zeros(2, 32))):
        assert torch.equal(x, torch.zeros(2, 32))


@pytest.mark.parametrize(("rows", "inner", "out"), [(1, 16, 16), (37, 64, 48), (256, 192, 576)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_kernel_is_the_definition(rows: int, inner: int, out: int, has_bias: bool):
    """To bfloat16's rounding of the bias, of the product before it and of the sum, each within 2^-8 of its size; and to
    the order of a float32 sum, within 2^-20 of the sum of magnitudes."""
    a, b = e4m3_rows(random(rows, inner)), e4m3_rows(random(out, inner, seed=1))
    bias = torch.randn(out) if has_bias else None
    exact, kernel = e4m3_product(*a, *b, bias), e4m3_matmul(*a, *b, bias)
    size = exact.abs() + e4m3_product(*a, *b, None).abs() + (bias.abs() if bias is not None else 0)
    assert kernel.dtype == torch.bfloat16
    terms = e4m3_product(a[0].float().abs(), a[1], b[0].float().abs(), b[1], None)
    assert ((kernel.float() - exact).abs() <= 2**-8 * size + 2**-20 * terms).all()


def test_int4_has_15_values_a_group():
    x = random(3, 150)
    y = int4(x, 64)
    for row, part in itertools.product(range(3), (slice(0, 64), slice(64, 128), slice(128, 150))):
        step = x[row, part].abs().max() / 7
        assert torch.allclose(y[row, part], (x[row, part] / step).round() * step)


def test_nvfp4_rounds_each_16_to_the_nearest_of_its_grid():
    x = random(4, 64)
    y, whole = nvfp4(x), x.abs().max() / (6 * 448)
    grid = torch.tensor([s * m for m in E2M1 for s in (-1, 1)])
    for given, rounded in zip(
        x.unflatten(1, (4, 16)).flatten(0, 1), y.unflatten(1, (4, 16)).flatten(0, 1), strict=True
    ):
        scale = (given.abs().max() / 6 / whole).to(torch.float8_e4m3fn).float() * whole
        nearest = (given[:, None] - grid * scale).abs().amin(1)
        assert torch.allclose((given - rounded).abs(), nearest, atol=1e-6 * float(scale) + 1e-7)


def test_four_bits_of_a_dtype_keep_it():
    for dtype in (torch.bfloat16, torch.float32):
        assert int4(torch.ones(2, 16, dtype=dtype)).dtype == nvfp4(torch.ones(2, 16, dtype=dtype)).dtype == dtype
