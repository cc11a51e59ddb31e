"""Winograd's F(4x4, 3x3): its matrices exactly, its sums in float64, its blocks at sizes that do not divide."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sana_lab.ops.conv import winograd
from sana_lab.ops.conv.winograd import INPUT, KERNEL_24, OUTPUT, blocks_of, conv3x3, transformed

SIZES = [(1, 1), (2, 3), (4, 4), (5, 8), (9, 11), (3, 300), (70, 13)]


def times(matrix: tuple[tuple[int, ...], ...], vector: list[Fraction]) -> list[Fraction]:
    return [sum((a * b for a, b in zip(row, vector, strict=True)), Fraction(0)) for row in matrix]


def test_the_matrices_give_four_outputs_of_three_taps_exactly():
    """On a basis of taps and inputs, so for all."""
    for tap in range(3):
        for cell in range(6):
            g = [Fraction(i == tap) for i in range(3)]
            d = [Fraction(i == cell) for i in range(6)]
            products = [a * b / 24 for a, b in zip(times(KERNEL_24, g), times(INPUT, d), strict=True)]
            assert times(OUTPUT, products) == [sum(g[j] * d[i + j] for j in range(3)) for i in range(4)]


def problem(size: tuple[int, int], batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(size))
    shapes = (batch, 5, *size), (7, 5, 3, 3), (7,)
    x, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("last", [False, True])
def test_equals_direct_sums(size: tuple[int, int], last: bool):
    x, weight, bias = problem(size)
    given = x.to(memory_format=torch.channels_last) if last else x
    out = conv3x3(given, weight, bias)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, F.conv2d(x, weight, bias, padding=1), rtol=0, atol=1e-12)
    torch.testing.assert_close(conv3x3(given, weight, None), F.conv2d(x, weight, padding=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", [32, 256])
def test_error_in_float32(channels: int):
    """Relative L2 below 5e-6 (measured 1.7e-6, where direct sums have 5e-7); no value off by more than 3e-5 of the
    largest."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, channels, 24, 24), torch.randn(channels, channels, 3, 3)
    truth = F.conv2d(x.double(), weight.double(), padding=1)
    off = conv3x3(x, weight, None).double() - truth
    assert off.norm() <= 5e-6 * truth.norm()
    assert off.abs().max() <= 3e-5 * truth.abs().max()


def test_kernels_are_transformed_in_both_dimensions():
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    g = torch.tensor(KERNEL_24).double() / 24
    expected = torch.einsum("ia,jb,ocab->ijco", g, g, weight)
    torch.testing.assert_close(transformed(weight), expected)
    torch.testing.assert_close(transformed(weight.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("size", [*SIZES, (256, 256), (40, 700)])
@pytest.mark.parametrize("batch", [1, 3])
def test_blocks_cover_every_tile_once(size: tuple[int, int], batch: int):
    count = torch.zeros(batch, *size, 1)
    for block in blocks_of(torch.empty(batch, 1, *size)):
        block.cells(count).add_(1)
        assert block.rows * block.columns <= 2 * winograd.TILES
    assert count.min() == count.max() == 1


def test_finish_sees_each_block_with_its_place():
    x, weight, bias = problem((70, 13))
    extra = torch.randn(2, 70, 13, 7, dtype=torch.float64)
    out = conv3x3(x, weight, bias, lambda y, place, block: place.copy_(2 * y + block.cells(extra)))
    expected = 2 * F.conv2d(x, weight, bias, padding=1) + extra.permute(0, 3, 1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_uninitialised_memory_never_shows():
    """NaN in whatever `empty` returns."""
    x, weight, bias = problem((9, 11))
    expected = F.conv2d(x, weight, bias, padding=1)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(9).isnan().all()
        torch.testing.assert_close(conv3x3(x, weight, bias), expected, rtol=0, atol=1e-12)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_repeat_to_the_last_bit_and_threads_are_left_as_they_were(threads: int):
    x, weight, bias = problem((70, 90), batch=1, dtype=torch.float32)
    truth = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first = conv3x3(x, weight, bias)
        assert all(conv3x3(x, weight, bias).equal(first) for _ in range(3))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert (first - truth).norm() <= 5e-6 * truth.norm()
