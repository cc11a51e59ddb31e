"""Optimisers fused on CUDA where a spec leaves it open, and nowhere else."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from sana_lab.systems.optim import fused, optimizer


def stepped(device: str, **options: Any) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    """Ten steps of a small network on the device."""
    torch.manual_seed(0)
    net, system = nn.Linear(16, 16).to(device), L.LightningModule()
    made = optimizer({"name": "adamw", "lr": 0.01, **options}, net.parameters(), system)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(device)
    for _ in range(10):
        made.zero_grad()
        net(x).square().mean().backward()
        made.step()
    return made, [p.detach().cpu() for p in net.parameters()]


def test_on_the_cpu_a_spec_is_taken_as_written():
    for given in (None, True, False):
        made, weights = stepped("cpu", fused=given)
        net = nn.Linear(16, 16)
        written = torch.optim.AdamW(net.parameters(), 0.01, fused=given)
        assert made.defaults == written.defaults
        torch.testing.assert_close(weights, stepped("cpu")[1])


def test_optimizers_without_the_option_are_left_alone():
    system = L.LightningModule()
    made = optimizer(f"{__name__}:Plain", nn.Linear(2, 2).parameters(), system)
    assert isinstance(made, Plain)


class Plain(torch.optim.SGD):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_an_open_choice_is_fused_and_steps_alike():
    made, weights = stepped("cuda")
    assert made.defaults["fused"] is True
    assert stepped("cuda", fused=False)[0].defaults["fused"] is False
    torch.testing.assert_close(weights, stepped("cuda", fused=False)[1], rtol=1e-5, atol=1e-6)
    system = L.LightningModule()
    system._trainer = L.Trainer(accelerator="gpu", devices=1, precision="16-mixed", logger=False, barebones=True)
    assert fused(list(nn.Linear(2, 2).cuda().parameters()), system) is None
