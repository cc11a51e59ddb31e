"""Optimisers fused on CUDA where a spec leaves it open, and nowhere else; learning rates as functions of the step."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from sana_lab.config.specs import SpecError
from sana_lab.systems.optim import Groups, fused, learning_rate_factor, optimizer, split_groups


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


class TestGroups:
    """Options for parameters by pattern."""

    def net(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), "norm": nn.LayerNorm(4)})

    def groups(self, spec: Any, groups: Groups) -> tuple[torch.optim.Optimizer, list[set[str]]]:
        net = self.net()
        pairs = list(net.named_parameters())
        built, names = optimizer(spec, pairs, L.LightningModule()), {p: name for name, p in pairs}
        split_groups(built, groups, pairs)
        return built, [{names[p] for p in group["params"]} for group in built.param_groups]

    def test_norms_and_biases_are_not_decayed(self):
        built, names = self.groups("adamw", {"*norm*": {"weight_decay": 0.0}, "*.bias": {"weight_decay": 0, "lr": 0.5}})
        weights, norms = {"blocks.0.weight", "blocks.1.weight"}, {"norm.weight", "norm.bias"}
        assert names == [weights, norms, {"blocks.0.bias", "blocks.1.bias"}]
        assert [(g["weight_decay"], g["lr"]) for g in built.param_groups] == [(0.01, 1e-3), (0.0, 1e-3), (0, 0.5)]

    def test_an_undecayed_parameter_without_gradient_stays(self):
        built, _ = self.groups({"name": "adamw", "lr": 1.0, "weight_decay": 0.5}, {"*.bias": {"weight_decay": 0.0}})
        for group in built.param_groups:
            for p in group["params"]:
                p.data.fill_(1.0)
                p.grad = torch.zeros_like(p)
        built.step()
        assert [{float(p.detach().mean()) for p in g["params"]} for g in built.param_groups] == [{0.5}, {1.0}]

    def test_muon_keeps_its_division_within_them(self):
        built, names = self.groups("muon", {"blocks.1.*": {"weight_decay": 0.0}})
        flags = [(group["muon"], group["weight_decay"]) for group in built.param_groups]
        assert flags == [(True, 0.01), (False, 0.01), (True, 0.0), (False, 0.0)]
        assert names[2:] == [{"blocks.1.weight"}, {"blocks.1.bias"}]

    @pytest.mark.parametrize(
        ("groups", "words"),
        [
            (
                {"*nrom*": {"weight_decay": 0.0}},
                "matches no parameter; expected a pattern of names such as",
            ),
            ({"*": {"wieght_decay": 0.0}}, "sets 'wieght_decay'; did you mean 'weight_decay'"),
        ],
    )
    def test_what_does_nothing_is_refused(self, groups: Groups, words: str):
        with pytest.raises(SpecError, match=words):
            self.groups("adamw", groups)
