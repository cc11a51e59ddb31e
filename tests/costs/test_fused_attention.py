"""Attention is counted as it is computed: without the matrix of scores."""

import pytest
import tiny
import torch
import torch.nn.functional as F

from sana_lab.costs.fused_attention import PLAIN, fused_attention
from sana_lab.costs.live_memory import LiveBytes
from sana_lab.types import Text


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_of_a_step_is_that_on_the_cpu(checkpointing: bool):
    """300 tokens of text, so that the scores would be its largest part."""
    with fused_attention():
        counted = step("meta", checkpointing)
    assert counted == step("cpu", checkpointing)
    assert counted < 0.8 * step("meta", checkpointing)


def step(device: str, checkpointing: bool) -> int:
    """Peak bytes of forward and backward of a DiT."""
    dit = tiny.dit(dim=128, cross_heads=8, checkpointing=checkpointing).to(device).train()
    x, t = torch.randn(1, tiny.CHANNELS, 16, 16, device=device), torch.rand(1, device=device)
    text = Text(torch.randn(1, 300, tiny.TEXT_DIM, device=device), torch.ones(1, 300, dtype=torch.bool, device=device))
    with LiveBytes(dit.parameters(), device) as live:
        dit(x, t, text).square().mean().backward()
    return live.peak


def test_only_tensors_without_data_are_concerned():
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    expected = F.scaled_dot_product_attention(q, k, v)
    with fused_attention():
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), expected)
        narrow = F.scaled_dot_product_attention(q.to("meta"), k.to("meta"), v[..., :4].to("meta"))
        assert narrow.shape == (1, 2, 5, 4)
    assert F.scaled_dot_product_attention is PLAIN
