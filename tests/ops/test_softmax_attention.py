"""Softmax attention in half precision on the CPU: float32 in training, the fused kernel in inference."""

import pytest
import torch
import torch.nn.functional as F

from sana_lab.ops.softmax_attention import softmax_attention


def inputs(dtype: torch.dtype, grad: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


def valid() -> torch.Tensor:
    return torch.tensor([[1, 1, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)[:, None, None]


@pytest.mark.parametrize("mask", [None, valid()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_is_in_float32_and_rounds_once(dtype: torch.dtype, mask: torch.Tensor | None):
    half = inputs(dtype, grad=True)
    single = [x.detach().float().requires_grad_() for x in half]
    with torch.autocast("cpu", dtype):
        result = softmax_attention(*half, mask)
    expected = F.scaled_dot_product_attention(*single, attn_mask=mask)
    assert result.dtype == dtype
    assert torch.equal(result, expected.to(dtype))
    result.float().square().sum().backward()
    expected.to(dtype).float().square().sum().backward()
    for ours, reference in zip(half, single, strict=True):
        assert torch.equal(ours.grad, reference.grad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_inference_is_the_fused_kernel_in_its_own_precision(dtype: torch.dtype):
    tensors = inputs(dtype, grad=False)
    expected = F.scaled_dot_product_attention(*tensors, attn_mask=valid())
    assert torch.equal(softmax_attention(*tensors, valid()), expected)


def test_full_precision_keeps_its_own_in_training():
    tensors = inputs(torch.float64, grad=True)
    assert torch.equal(softmax_attention(*tensors), F.scaled_dot_product_attention(*tensors))


def test_autocast_of_float32_trains_in_float32():
    tensors = inputs(torch.float32, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = softmax_attention(*tensors)
    assert torch.equal(result, F.scaled_dot_product_attention(*tensors).bfloat16())
