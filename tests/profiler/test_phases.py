"""The timer of phases against times written out, and a system that is left as it was."""

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch

from sana_lab.profiler import phases
from sana_lab.profiler.phases import OTHER, SAMPLING, TRAINING, PhaseProfiler, PhaseTimer, instrument
from sana_lab.systems.text2image import TextToImage

CPU = torch.device("cpu")


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the time."""
    now = [0.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_the_innermost_phase_counts_and_all_add_up(at: Any):
    timer = PhaseTimer(CPU)
    at(1.0)
    timer.step()
    at(2.0)
    with timer.phase("loss"):
        at(4.0)
        with timer.phase("dit: head"):
            at(7.0)
        with timer.phase(None):
            at(8.0)
    at(9.5)
    timer.step()
    assert timer.steps == [{OTHER: 2.5, "loss": 3.0, "dit: head": 3.0}]
    assert sum(timer.steps[0].values()) == 8.5


def test_what_a_backward_runs_is_its_own(at: Any):
    timer = PhaseTimer(CPU)
    timer.step()
    with timer.phase("backward"), timer.phase("dit: head"):
        at(3.0)
    timer.step()
    assert timer.steps == [{OTHER: 0.0, "backward": 3.0}]


def test_without_borders_only_steps_are_timed(at: Any):
    timer = PhaseTimer(CPU, boundaries=False)
    timer.step()
    with timer.phase("loss"):
        at(3.0)
    timer.step()
    assert timer.steps == [{OTHER: 3.0}]


def test_time_before_the_first_step_is_nobodys(at: Any):
    timer = PhaseTimer(CPU)
    with timer.phase("loss"):
        at(5.0)
    timer.step()
    at(6.0)
    timer.step()
    assert timer.steps == [{OTHER: 1.0}]


@pytest.mark.parametrize(
    ("action", "phase"),
    [
        ("[_TrainingEpochLoop].train_dataloader_next", "data loading"),
        ("[Strategy]SingleDeviceStrategy.batch_to_device", "transfer"),
        ("[Strategy]SingleDeviceStrategy.training_step", "loss"),
        ("[Strategy]SingleDeviceStrategy.backward", "backward"),
        ("[LightningModule]TextToImage.configure_gradient_clipping", "gradient clipping"),
        ("[LightningModule]TextToImage.optimizer_step", "optimiser"),
        ("[LightningModule]TextToImage.on_train_batch_start", "callbacks"),
        ("[Callback]DivergenceGuard.on_train_batch_end", "callbacks"),
        ("run_training_batch", None),
    ],
)
def test_lightnings_actions(action: str, phase: str | None):
    assert PhaseProfiler(PhaseTimer(CPU))._phase(action) == phase
    assert phase is None or phase in TRAINING


@pytest.fixture
def system() -> Iterator[TextToImage]:
    return tiny.text2image(autoencoder=tiny.VAE_2X, text_encoder=tiny.T5)


def hooks(system: TextToImage) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in system.modules())


def test_a_system_is_left_as_it_was(system: TextToImage):
    before, count = {name: set(vars(m)) for name, m in system.named_modules()}, hooks(system)
    timer = PhaseTimer(CPU)
    timer.step()
    with instrument(system, timer):
        assert hooks(system) > count
        images = torch.zeros(1, 3, 8, 8)
        latents = system.autoencoder.encode(images)
        system.dit(latents, torch.tensor([0.5]), system.encode_text(["a"]))
        system.average.update(system)
    timer.step()
    assert hooks(system) == count
    assert {name: set(vars(m)) for name, m in system.named_modules()} == before
    named = {name for name in TRAINING if name.startswith(("dit", "text"))} - {"dit: blocks"}
    assert set(timer.steps[0]) == named | {"autoencoder encode", "average", OTHER}


def test_phases_have_words():
    assert all(SAMPLING.values())
    assert all(TRAINING.values())
    assert list(TRAINING)[-1] == list(SAMPLING)[-1] == OTHER
