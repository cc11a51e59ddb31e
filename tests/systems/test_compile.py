"""Compiled blocks: the same loss, gradients and state-dict keys; what cannot be compiled is said before any work."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from sana_lab.bench.record import compile_mode
from sana_lab.config import experiments, hashing
from sana_lab.config.specs import SpecError
from sana_lab.models.dit import Dit
from sana_lab.systems import compile
from sana_lab.systems.compile import compile_blocks
from sana_lab.training import checks

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
"""Dynamo looks at it of each input, and only hides the warning where warnings are no errors."""


def make(compiled: str | None, **options: Any) -> Dit:
    dit = tiny.dit(depth=3, **options).train()
    if compiled:
        compile_blocks(dit, compiled)
    return dit


def step(dit: Dit, length: int) -> tuple[Tensor, list[Tensor | None]]:
    random = torch.Generator().manual_seed(1)
    text = tiny.caption([length, length], dtype=torch.float32)
    loss = dit(torch.randn(2, 4, 4, 4, generator=random), torch.tensor([0.2, 0.7]), text).square().mean()
    dit.zero_grad()
    loss.backward()
    return loss.detach(), [p.grad for p in dit.parameters()]


def assert_same(backend: str, lengths: tuple[int, ...], **options: Any) -> None:
    eager, compiled = make(None, **options), make(backend, **options)
    assert list(eager.state_dict()) == list(compiled.state_dict())
    assert compile_mode(compiled) == "torch.compile"
    for length in lengths:
        torch.testing.assert_close(step(compiled, length), step(eager, length), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_traced_block_is_the_block(checkpointing: bool):
    """All three blocks share a graph; each length of text has one, and more of them than torch allows by itself."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    lengths = (3, 5, 6) if checkpointing else tuple(range(3, 13))
    assert_same("eager", lengths, checkpointing=checkpointing)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(lengths)


@pytest.mark.slow
def test_inductor_gives_the_same_numbers():
    torch._dynamo.reset()
    assert_same("inductor", (12, 6))


@pytest.fixture
def folder(here: Path) -> Path:
    """A working directory with one experiment, `tiny`."""
    tiny.write_experiment(here)
    return here


def test_compiling_is_no_other_model(folder: Path):
    assert hashing.experiment_hash(experiments.load("tiny", ["trainer.compile=true"])) == hashing.experiment_hash(
        experiments.load("tiny")
    )


def test_without_a_compiler_the_check_says_what_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    checks.check(experiments.load("tiny"))
    monkeypatch.setattr(compile, "_cpp_compiler", lambda: None)
    with pytest.raises(SpecError, match=r"trainer.compile needs a C\+\+ compiler such as g\+\+ on cpu; install it, or"):
        checks.check(experiments.load("tiny", ["trainer.compile=true"]))


def test_a_compiler_that_is_not_there_is_not_found(monkeypatch: pytest.MonkeyPatch):
    from torch._inductor import config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    assert compile.missing_compiler("cpu") == "a C++ compiler such as g++"


def test_what_cannot_be_compiled_is_refused(folder: Path):
    with pytest.raises(SpecError, match="exclude each other"):
        checks.check(experiments.load("tiny", ["trainer.compile=true", "system.dit.checkpointing=selective"]))
    with pytest.raises(SpecError, match="for systems with a DiT of blocks, and AutoencoderSystem has none"):
        checks.check(experiments.load("shapes_vae_f8", ["trainer.compile=true"]))


def test_fused_steps_and_loss_scaling_exclude_each_other(folder: Path):
    given = ["system.optimizer={name: adamw, fused: true}", "trainer.precision=16-mixed"]
    with pytest.raises(SpecError, match="a fused optimizer unscales the gradients of precision 16-mixed"):
        checks.check(experiments.load("tiny", given))
    checks.check(experiments.load("tiny", [*given, "trainer.gradient_clip=0"]))
    checks.check(experiments.load("tiny", given[1:]))
