"""Counts against closed forms."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from sana_lab.costs.flops import count_macs, count_pair_macs, count_parameters, parameters_by_component
from sana_lab.ops.linear_attention.autograd import linear_attention, qkv_linear_attention
from sana_lab.ops.linear_attention.reference import definition
from sana_lab.types import Text

B, H, N, D = 1, 12, 64, 64


def heads(n: int = N, h: int = H, d: int = D) -> torch.Tensor:
    return torch.randn(B, h, n, d)


def test_linear_layer():
    layer, x = nn.Linear(48, 80), torch.randn(3, 5, 48)
    assert count_macs(lambda: layer(x)) == 3 * 5 * 48 * 80


def test_grouped_convolution():
    layer, x = nn.Conv2d(16, 16, 3, padding=1, groups=16), torch.randn(2, 16, 8, 8)
    assert count_macs(lambda: layer(x)) == 2 * 16 * 8 * 8 * 9


@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_convolutions_backward_is_two_forwards(layer: type[nn.Conv2d] | type[nn.ConvTranspose2d], groups: int):
    convolution, x = layer(6, 12, 3, stride=2, padding=1, groups=groups), torch.randn(2, 6, 7, 8).requires_grad_()
    forward = count_macs(lambda: convolution(x))
    out = convolution(x)
    assert count_macs(lambda: out.sum().backward()) == 2 * forward
    out = convolution(x.detach())
    assert count_macs(lambda: out.sum().backward()) == forward


@pytest.mark.parametrize("grad", [False, True])
def test_softmax_attention_on_the_cpu(grad: bool):
    q = heads().requires_grad_(grad)
    flops = 2 * count_macs(lambda: scaled_dot_product_attention(q, heads(), heads()))
    assert flops == 4 * B * H * N**2 * D == 12_582_912


def test_softmax_attention_in_inference_mode():
    with torch.inference_mode():
        assert count_macs(lambda: scaled_dot_product_attention(heads(), heads(), heads())) == 2 * B * H * N**2 * D


def test_cross_and_grouped_query_attention():
    k = heads(n=7, h=3)
    count = count_macs(lambda: scaled_dot_product_attention(heads(), k, k, enable_gqa=True))
    assert count == 2 * B * H * N * 7 * D


def test_softmax_backward_is_two_and_a_half_forwards():
    q, k, v = (heads().requires_grad_() for _ in range(3))
    forward = count_macs(lambda: scaled_dot_product_attention(q, k, v))
    out = scaled_dot_product_attention(q, k, v)
    assert count_macs(lambda: out.sum().backward()) == 5 * forward // 2


def test_matrix_vector_and_dot():
    m, v = torch.randn(6, 9), torch.randn(9)
    assert count_macs(lambda: (m @ v, v @ v)) == 6 * 9 + 9


def test_counts_without_weights_on_the_meta_device():
    with torch.device("meta"):
        layer, x = nn.Linear(48, 80), torch.randn(3, 48)
        q = torch.randn(B, H, N, D)
    assert count_macs(lambda: layer(x)) == 3 * 48 * 80
    assert count_macs(lambda: scaled_dot_product_attention(q, q, q)) == 2 * B * H * N**2 * D


def test_formulas_are_not_registered_for_others():
    count_macs(lambda: scaled_dot_product_attention(heads(), heads(), heads()))
    registry = FlopCounterMode(display=False).flop_registry
    assert torch.ops.aten.mv not in registry


def test_parameters_count_shared_ones_once_and_tell_frozen_ones():
    a, b = nn.Linear(4, 3), nn.Linear(4, 3)
    b.weight = a.weight
    b.bias.requires_grad_(False)
    assert count_parameters(nn.ModuleList([a, b])) == {"total": 12 + 3 + 3, "trainable": 12 + 3}
    assert parameters_by_component({"first": a, "second": b}) == {
        "all": {"total": 18, "trainable": 15},
        "first": {"total": 15, "trainable": 15},
        "second": {"total": 15, "trainable": 12},
    }


def test_the_linear_attention_kernel_counts_as_its_definition():
    q = torch.empty(2, 100, 3, 32, device="meta")
    count = count_macs(lambda: definition(q, q, q, None, 1e-8))
    assert count == count_macs(lambda: linear_attention(q, q, q, None, 1e-8)) == 2 * 100 * 3 * (2 * 32**2 + 32)
    fused = torch.empty(2, 100, 3, 3, 32, device="meta")
    assert count == count_macs(lambda: qkv_linear_attention(fused, None, None, 1.0, None, 1e-8))


def test_a_guided_pair_is_two_rows_without_the_products_with_the_caption():
    """One layer of each: 2 rows of 16 positions, 300 of caption, 8 wide."""
    layer = nn.Linear(8, 8, device="meta")

    def denoise(x: torch.Tensor, t: torch.Tensor, text: Text) -> torch.Tensor:
        image, caption = layer(x.flatten(2).mT), layer(text.tokens)
        image = scaled_dot_product_attention(image, image, image)
        return scaled_dot_product_attention(image, caption, caption)

    projections, attention = 2 * (16 + 300) * 8 * 8, 2 * 2 * 16 * 16 * 8
    assert count_pair_macs(denoise, (8, 4, 4), 8) == projections + attention


def test_a_triangular_solve_is_substitution():
    """Row i of n takes i products of rows solved before, in each column; the gradient of the right side as much."""
    matrix, right = torch.eye(5).expand(3, 5, 5), torch.randn(3, 5, 7, requires_grad=True)
    assert count_macs(lambda: torch.linalg.solve_triangular(matrix, right, upper=False)) == 3 * 7 * (0 + 1 + 2 + 3 + 4)
    out = torch.linalg.solve_triangular(matrix, right, upper=False)
    assert count_macs(lambda: out.sum().backward()) == 3 * 7 * 10
