"""Stacks of several mixers: one for all blocks, a list, or a pattern that repeats."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sana_lab.checkpoints import architectures
from sana_lab.config import experiments, hashing, registry, specs
from sana_lab.config.specs import SpecError
from sana_lab.costs.flops import count_macs
from sana_lab.models.attention import layers
from sana_lab.systems.muon import is_hidden
from sana_lab.training import checks
from sana_lab.types import Text

LINEAR, SOFTMAX = ({"name": name, "head_dim": 8} for name in ("linear", "softmax"))
PATTERN = [LINEAR, LINEAR, LINEAR, SOFTMAX]


def stack(attention: Any, depth: int = 4, **options: object) -> Any:
    return tiny.dit(depth=depth, attention=attention, **options)


def inputs(side: int = 4) -> tuple[Tensor, Tensor, Text]:
    random = torch.Generator().manual_seed(2)
    return (
        torch.randn(2, 4, side, side, generator=random),
        torch.tensor([0.2, 0.8]),
        tiny.caption([3, 5], dtype=torch.float32),
    )


def names(dit: Any) -> list[str]:
    return [type(block.attention).__name__ for block in dit.blocks]


# --- patterns


def test_a_pattern_repeats_from_the_first_block_on():
    assert names(stack(PATTERN, depth=8)) == (["LinearAttention"] * 3 + ["SoftmaxAttention"]) * 2
    assert names(stack([SOFTMAX, LINEAR], depth=2)) == ["SoftmaxAttention", "LinearAttention"]
    assert names(stack("softmax", depth=2)) == ["SoftmaxAttention"] * 2


@pytest.mark.parametrize(
    ("length", "depth", "words"),
    [
        (3, 4, "3 layers, of which depth 4 is no multiple; expected a pattern of 1, 2, 4 layers, or depth 3 or 6"),
        (5, 3, "expected a pattern of 1, 3 layers, or depth 5$"),
    ],
)  # fmt: skip
def test_a_pattern_fits_the_depth(length: int, depth: int, words: str):
    with pytest.raises(SpecError, match=words):
        layers(["linear"] * (length - 1) + ["softmax"], depth)


def test_a_spec_is_the_shortest_pattern():
    """Equal stacks are one configuration, so that they have one hash."""
    one, two = specs.resolve("attention", "linear"), specs.resolve("attention", "softmax")
    for given, resolved in (
        (["linear", "linear"], one),
        (["linear", {"name": "softmax"}, "linear", "softmax"], [one, two]),
        (["linear", "softmax", "softmax"], [one, two, two]),
    ):
        assert specs.resolve("dit", {"name": "sana", "attention": given})["attention"] == resolved
    canonical = specs.canonical("dit", {"name": "sana", "attention": ["linear", "softmax"]})["attention"]
    assert canonical == [specs.canonical("attention", name) for name in ("linear", "softmax")]


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        ([], r"dit.attention is \[\], expected a name or a mapping"),
        (["linear", "sofmax"], "no attention is called 'sofmax'; did you mean 'softmax'"),
        (["linear", {"name": "softmax", "eps": 1}], r"'softmax' has no option 'eps'.*\[dit.attention\[1\].eps\]"),
        (["linear", 3], r"dit.attention\[1\] is 3, expected a name or a mapping"),
    ],
)  # fmt: skip
def test_wrong_patterns(attention: list[Any], words: str):
    with pytest.raises(SpecError, match=words):
        specs.resolve("dit", {"name": "sana", "attention": attention})


def test_a_list_is_for_parts_that_take_one():
    with pytest.raises(SpecError, match=r"ffn is .*expected a name or a mapping"):
        specs.resolve("dit", {"name": "sana", "ffn": ["mix", "mlp"]})


# --- models


def test_a_stack_of_pure_mixers_has_the_keys_and_weights_of_each():
    hybrid, linear = stack(PATTERN).state_dict(), stack(LINEAR).state_dict()
    assert all(torch.equal(hybrid[k], v) for k, v in linear.items())
    assert hybrid.keys() == linear.keys()


@torch.no_grad()
def test_each_block_has_its_own_mixer():
    """The last block's tokens change, the ones below do not."""
    outputs = {}
    for name, attention in (("hybrid", PATTERN), ("linear", LINEAR)):
        dit, kept = stack(attention), []
        for block in dit.blocks:
            block.register_forward_hook(lambda m, i, o, kept=kept: kept.append(o))
        dit(*inputs())
        outputs[name] = kept
    pairs = zip(outputs["hybrid"], outputs["linear"], strict=True)
    assert [torch.equal(a, b) for a, b in pairs] == [True, True, True, False]


def test_macs_of_a_stack_are_those_of_its_layers():
    hybrid, linear, softmax = map(macs, (PATTERN, LINEAR, SOFTMAX))
    assert 4 * hybrid == 3 * linear + softmax
    assert softmax > linear


def macs(attention: Any) -> int:
    with torch.device("meta"):
        dit = specs.build("dit", {**tiny.DIT, "depth": 4, "attention": attention}, channels=4, text_dim=12)
        text = Text(torch.empty(1, 5, 12), torch.ones(1, 5, dtype=torch.bool))
        return count_macs(lambda: dit(torch.empty(1, 4, 16, 16), torch.empty(1), text))


def test_scans_turn_with_the_mixers_of_their_class():
    """Not with the block, or every second layer would read in two directions only."""
    small = {"head_dim": 8, "rank": 2}
    dit = stack([{"name": "gated_linear", **small}, SOFTMAX, {"name": "gated_delta", "head_dim": 8}], depth=6)
    assert [block.attention.order for block in dit.blocks] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("name", sorted(registry.TABLE["attention"]))
def test_every_mixer_trains_and_samples_in_a_stack(name: str):
    """Gradients reach every parameter, also those of all blocks recomputed; the sampling network is the network."""
    gradients = []
    for checkpointing in (False, "selective", True):
        dit = tiny.dit(
            dim=32, depth=2, attention=[name, SOFTMAX], checkpointing=checkpointing, position="sincos", base=4
        )
        dit.train()(*inputs()).square().sum().backward()
        gradients.append([p.grad for p in dit.parameters()])
        assert all(g is not None and g.isfinite().all() and g.any() for g in gradients[-1])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))
    x, t, text = inputs()
    with torch.no_grad():
        assert torch.allclose(dit.prepare(text)(x, t), dit(x, t, text), atol=1e-6)


def test_muon_steps_the_matrices_of_mixers():
    dit = tiny.dit(dim=32, depth=4, attention=["gated_linear", "gated_delta", "mhla", "conv"])
    kinds = {k.split(".", 2)[2]: is_hidden(k, p) for k, p in dit.named_parameters() if ".attention." in k}
    hidden = {k for k, matrix in kinds.items() if matrix}
    ends = ("qkvg.weight", "decay.0.weight", "decay.1.weight", "gates.weight", "qkv.weight", "proj.weight")
    assert hidden == {f"attention.{end}" for end in (*ends, "expand.weight", "project.weight")}


def test_diffusers_has_no_stacks():
    with pytest.raises(SpecError, match="this DiT has attention linear, linear, linear, softmax and ffn mix"):
        architectures.write_sana(stack(PATTERN).spec, {"channels": 4, "text_dim": 12})


# --- experiments


def test_a_stack_in_an_experiment(here: Path):
    tiny.write_experiment(here, "mine", changes={"system.dit.depth": 4})
    pattern = "system.dit.attention=[linear, {name: linear, eps: 1.0e-6}]"
    checks.check(experiments.load("mine", [pattern]))
    hashes = [hashing.experiment_hash(experiments.load("mine", [o])) for o in (
        pattern, "system.dit.attention=[linear, softmax]", "system.dit.attention=[linear, softmax, linear, softmax]",
        "system.dit.attention=[linear, linear]", "system.dit.attention=linear",
    )]  # fmt: skip
    assert hashes[1] == hashes[2]
    assert hashes[3] == hashes[4] == hashing.experiment_hash(experiments.load("mine"))
    assert len(set(hashes)) == 3
    with pytest.raises(SpecError, match="pattern of 3 layers, of which depth 4 is no multiple; expected"):
        checks.check(experiments.load("mine", ["system.dit.attention=[linear, linear, softmax]"]))
    with pytest.raises(SpecError, match="an override of eps is for one part, where there is a list of 2"):
        experiments.load("mine", [pattern, "system.dit.attention.eps=1"])


NO_BACKWARD = """
import torch

from sana_lab.models.attention import Mixer


class Frozen(Mixer):
    def __init__(self, *, dim: int) -> None:
        super().__init__(dim)

    def forward(self, x):
        with torch.no_grad():
            return x.mean((1, 2), keepdim=True).expand_as(x)


class Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2


class Kernel(Frozen):
    def forward(self, x):
        return Forward.apply(x)
"""


@pytest.mark.parametrize("name", ["Frozen", "Kernel"])
def test_a_mixer_without_a_backward_is_refused(here: Path, name: str):
    """A user's own, from an ordinary folder, that a loaded experiment names."""
    (here / "frozen_mixer.py").write_text(NO_BACKWARD)
    tiny.write_experiment(
        here, "mine", changes={"system.dit.attention": ["linear", f"frozen_mixer:{name}"], "system.dit.depth": 2}
    )
    with pytest.raises(SpecError, match=rf"blocks.1.attention \(frozen_mixer:{name}\) has no backward"):
        checks.check(experiments.load("mine"))


CUT = """
from sana_lab.models.attention import Mixer


class Cut(Mixer):
    def __init__(self, *, dim: int) -> None:
        super().__init__(dim)

    def forward(self, x):
        return x - x.mean(0, keepdim=True)
"""


def test_every_entry_of_a_pattern_keeps_the_contract_of_its_kind(here: Path):
    (here / "cut_mixer.py").write_text(CUT)
    tiny.write_experiment(
        here, "mine", changes={"system.dit.attention": ["linear", "cut_mixer:Cut"], "system.dit.depth": 2}
    )
    with pytest.raises(SpecError, match=r"cut_mixer:Cut.*an image alone and in a batch differ"):
        checks.check(experiments.load("mine"))
