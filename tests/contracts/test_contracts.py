"""Parts that ship keep the contract of their kind, and each rule refuses a part that breaks it."""

import re
from pathlib import Path
from typing import Any

import pytest
import tiny

from sana_lab.commands import check
from sana_lab.config import experiments, registry, specs
from sana_lab.contracts import run
from sana_lab.training import checks

SPECS: list[tuple[str, specs.Spec]] = [
    *(("attention", name) for name in registry.TABLE["attention"]),
    *(("ffn", name) for name in registry.TABLE["ffn"]),
    *(("solver", name) for name in registry.TABLE["solver"] if name != "scm"),  # scm is no ODE's: it adds noise
    ("dit", tiny.TWO_BLOCKS),
    ("autoencoder", tiny.VAE),
    ("autoencoder", tiny.DCAE),
    ("text_encoder", tiny.LLM),
    ("text_encoder", tiny.T5),
    ("text_encoder", {"name": "label", "classes": 3, "width": 8}),
    ("text_encoder", {"name": "adapter", "encoder": tiny.LLM, "width": 24}),
    ("data", {"name": "shapes", "size": 16, "batch": 4}),
    ("optimizer", "adamw"),
    *(("method", name) for name in registry.TABLE["method"] if name != "distill"),  # which needs a teacher
]


@pytest.mark.parametrize(("kind", "spec"), SPECS, ids=lambda value: value if isinstance(value, str) else value["name"])
def test_parts_that_ship_keep_their_contract(kind: str, spec: specs.Spec):
    assert [finding for finding in run.check(kind, spec) if finding.problem is not None] == []


def test_every_kind_of_a_users_part_has_a_contract():
    assert registry.TABLE.keys() - run.RULES.keys() <= {
        "probe",
        "cache",
        "executor",
        "layout",
        "adapter",
        "regions",
        "search",
        "pruner",
    }


ATTENTION = """
import torch
from torch import nn
from sana_lab.models.attention import Attention

class Base(Attention):
    def __init__(self, head_dim: int = 8, *, dim: int) -> None:
        super().__init__(dim, head_dim, qk_norm=False)
    def mix(self, q, k, v):
        return v

class Cut(Base):
    def mix(self, q, k, v):
        return v[:, :-1]

class Unused(Base):
    def __init__(self, head_dim: int = 8, *, dim: int) -> None:
        super().__init__(head_dim, dim=dim)
        self.gain = nn.Parameter(torch.ones(1))

class Mixes(Base):
    def mix(self, q, k, v):
        return v - v.mean(0, keepdim=True)

class InPlace(Base):
    def forward(self, x):
        return super().forward(x.mul_(2))

class Random(Base):
    def mix(self, q, k, v):
        return v + torch.rand_like(v)

class Wide(Base):
    def mix(self, q, k, v):
        return v
    def forward(self, x):
        return super().forward(x).float()

class Hidden(Base):
    def __init__(self, head_dim: int = 8, *, dim: int) -> None:
        super().__init__(head_dim, dim=dim)
        self.secret = [torch.rand(1)]
    def mix(self, q, k, v):
        return v * self.secret[0].to(v)

class Bare(Base):
    def __init__(self, head_dim=8, *, dim) -> None:
        super().__init__(head_dim, dim=dim)

class Raises(Base):
    def mix(self, q, k, v):
        return v.view(-1, 7)

def backwards(velocity, x, times, /):
    return x - sum(velocity(x, torch.full((len(x),), float(t))) for t in times[:-1]) * 0.9

class Loose:
    def mix(self, q, k, v):
        return v
"""


@pytest.fixture
def guests(here: Path) -> Path:
    (here / "broken_parts.py").write_text(ATTENTION)
    return here


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Cut", "cannot be viewed|shape|invalid"),
        ("Unused", "no gradient reaches gain"),
        ("Mixes", "alone and in a batch differ"),
        ("InPlace", "changed in place"),
        ("Random", "two calls in evaluation mode differ"),
        ("Wide", "tokens in bfloat16 give float32"),
        ("Hidden", "state dict lacks something"),
        ("Bare", "no type beside head_dim"),
        ("Raises", r"RuntimeError.*broken_parts.py, line \d+: return v.view\(-1, 7\)"),
    ],
)
def test_a_broken_attention_is_described(guests: Path, name: str, words: str, capsys: pytest.CaptureFixture[str]):
    assert check.main(f"broken_parts:{name}") == 1
    assert re.search(words, capsys.readouterr().out)


def test_a_sound_one_is_too(guests: Path, capsys: pytest.CaptureFixture[str]):
    assert check.main("broken_parts:Base", ["head_dim=16"]) == 0
    assert "attention broken_parts:Base {head_dim: 16}" in capsys.readouterr().out


def test_a_solver_that_does_not_converge(guests: Path):
    problems = [f.problem for f in run.check("solver", "broken_parts:backwards") if f.problem]
    assert any("and" in problem and "with 64" in problem for problem in problems)


def test_a_class_of_no_kind_hears_which_one_its_methods_are_of(guests: Path):
    with pytest.raises(specs.SpecError, match=r"'mix' is that of sana_lab.models.attention.Attention"):
        check.main("broken_parts:Loose")


def test_a_name_that_several_kinds_have():
    with pytest.raises(specs.SpecError, match="--kind"):
        check.main("shapes")


def test_training_refuses_a_broken_part_before_it_begins(guests: Path):
    (guests / "experiments").mkdir()
    text = tiny.EXPERIMENT.replace("cross_heads: 2", "cross_heads: 2, attention: 'broken_parts:Mixes'")
    (guests / "experiments/mine.yaml").write_text(text)
    with pytest.raises(specs.SpecError, match="breaks a rule of its kind: The result of an image"):
        checks.check(experiments.load("mine"))


def test_parts_of_the_users_own_are_listed_wherever_they_are(guests: Path):
    config: Any = {
        "system": {"name": "text2image", "dit": {"name": "sana", "attention": {"name": "broken_parts:Base"}}},
        "sampling": {"solver": {"name": "broken_parts:backwards"}},
    }
    assert [(kind, spec["name"]) for kind, spec in run.guests(config)] == [
        ("attention", "broken_parts:Base"),
        ("solver", "broken_parts:backwards"),
    ]


METHODS = """
import torch
from sana_lab.methods import Method

class Vector(Method):
    def losses(self, step):
        return {"vector": step.prediction.mean((1, 2, 3))}

class Rolls(Method):
    def losses(self, step):
        return {"rolls": (step.prediction * torch.rand_like(step.prediction)).mean()}

class Writes(Method):
    def build(self, model):
        self.bias = [model.dit.head.linear.bias]
    def losses(self, step):
        self.bias[0].data.add_(1)
        return {"writes": step.prediction.mean()}

class Unread(Method):
    def build(self, model):
        self.layer = torch.nn.Linear(2, 2)
    def losses(self, step):
        return {"unread": step.prediction.mean()}
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Vector", r"term 'vector' is no number: shape \(4,\)"),
        ("Rolls", "the same step has other terms; use Step.uniform"),
        ("Writes", "it changed head.linear.bias of the model in a step"),
        ("Unread", "no gradient reaches 0.layer.weight, 0.layer.bias of it"),
    ],
)
def test_a_broken_method_is_described(here: Path, name: str, words: str):
    (here / "broken_methods.py").write_text(METHODS)
    problems = [f.problem for f in run.check("method", f"broken_methods:{name}") if f.problem]
    assert any(re.search(words, problem) for problem in problems), problems


def test_parts_of_the_users_own_are_listed_in_lists_of_specs(here: Path):
    (here / "broken_methods.py").write_text(METHODS)
    methods = [{"name": "contrastive"}, {"name": "broken_methods:Vector"}]
    config: Any = {"system": {"name": "text2image", "method": methods}}
    assert [(kind, spec["name"]) for kind, spec in run.guests(config)] == [("method", "broken_methods:Vector")]
