"""Attention cores on a fused projection (B, N, 3 C), without projections: only the mixing differs."""

import argparse
from collections.abc import Callable

import torch
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sana_lab.ops.backend import Backend
from sana_lab.ops.linear_attention import qkv_linear_attention


def ours(qkv: Tensor, heads: int, backend: Backend = "auto") -> Tensor:
    return qkv_linear_attention(qkv.unflatten(-1, (3, heads, -1)), backend=backend).flatten(2)


def softmax(qkv: Tensor, heads: int) -> Tensor:
    """PyTorch's fused softmax attention."""
    q, k, v = (x.transpose(1, 2) for x in split(qkv, heads))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def diffusers(qkv: Tensor, heads: int) -> Tensor:
    """diffusers' linear-attention processor."""
    third = qkv.shape[-1] // 3
    same = nn.Identity()
    attention = argparse.Namespace(
        to_q=lambda x: x[..., :third],
        to_k=lambda x: x[..., third : 2 * third],
        to_v=lambda x: x[..., 2 * third :],
        norm_q=None,
        norm_k=None,
        heads=heads,
        to_out=[same, same],
    )
    return SanaLinearAttnProcessor2_0()(attention, qkv)


def split(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Three views (B, N, H, D)."""
    return tuple(part.unflatten(-1, (heads, -1)) for part in qkv.chunk(3, -1))


def naive_linear(qkv: Tensor, heads: int) -> Tensor:
    """Linear attention through its N x N weights, in float64: (B, N, C)."""
    return naive(qkv, heads, lambda q, k: normalised(q.relu() @ k.relu().mT))


def naive_softmax(qkv: Tensor, heads: int) -> Tensor:
    """Softmax attention through its N x N weights, in float64: (B, N, C)."""
    return naive(qkv, heads, lambda q, k: (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1))


def normalised(weights: Tensor) -> Tensor:
    return weights / (weights.sum(-1, keepdim=True) + 1e-8)


def naive(qkv: Tensor, heads: int, weigh: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """One head at a time, so that its weights fit in memory."""
    q, k, v = (part.double().transpose(1, 2).flatten(0, 1) for part in split(qkv, heads))  # (B H, N, D)
    mixed = torch.stack([weigh(*pair) @ value for *pair, value in zip(q, k, v, strict=True)])
    return mixed.unflatten(0, (-1, heads)).transpose(1, 2).flatten(2)
