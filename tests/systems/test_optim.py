"""Optimisers fused on CUDA where a spec leaves it open, and nowhere else; learning rates as functions of the step."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from sana_lab.systems.optim import fused, learning_rate_factor, optimizer


def stepped(device: str, **options: Any) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    """Ten steps of a small network on the device."""
    torch.manual_seed(0)
    net, system = nn.Linear(16, 16).to(device), L.LightningModule()
    made = optimizer({"name": "adamw", "lr": 0.01, **options}, net.named_parameters(), system)
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
    made = optimizer(f"{__name__}:Plain", nn.Linear(2, 2).named_parameters(), system)
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


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (59, 1.0), (60, 1.0), (80, 0.5), (99, 0.025), (100, 0.0), (120, 0.0)],
)
def test_up_flat_and_down(step: int, expected: float):
    """Ten steps of warm-up, a hundred in all, the last 40 % to zero."""
    assert learning_rate_factor(step, 100, 10, 0.4) == pytest.approx(expected)


def test_without_warm_up_or_decay_it_is_constant():
    assert {learning_rate_factor(step, 100, 0, 0.0) for step in range(200)} == {1.0}


def test_endless_training_never_decays():
    assert learning_rate_factor(10**6, -1, 10, 0.4) == 1.0


def test_warm_up_and_decay_may_meet():
    rates = [learning_rate_factor(step, 10, 8, 1.0) for step in range(11)]
    assert rates == pytest.approx([min(1, (s + 1) / 8) * (1 - s / 10) for s in range(11)])
