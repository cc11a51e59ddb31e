"""Divergence of a training: what ends it, and how it returns to its last good checkpoint."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import tiny
import torch
from torch import Tensor

from sana_lab.checkpoints import weights
from sana_lab.config import experiments, hashing
from sana_lab.shapes.data import Shapes
from sana_lab.systems.text2image import TextToImage
from sana_lab.training import callbacks, divergence, train


@pytest.fixture
def folder(here: Path) -> Path:
    every = {"trainer.max_steps": 12, "trainer.checkpoint_every": 4, "trainer.validate_every": 2}
    tiny.write_experiment(here, changes={"data.size": 16, "prompts": [], **every})
    return here


class Batches:
    """The batches of each training step, some of which have a loss that is made so many times as large."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bad: dict[int, float]) -> None:
        self.numbers: list[int] = []
        step = TextToImage.training_step

        def training_step(system: TextToImage, batch: Any, batch_idx: int) -> Tensor:
            self.numbers.append(batch_idx)
            loss = step(system, batch, batch_idx)
            return loss * bad.get(batch_idx, 1.0)

        monkeypatch.setattr(TextToImage, "training_step", training_step)


def test_it_goes_on_from_the_checkpoint_behind_the_batches_that_diverged(folder, monkeypatch, capsys):
    batches = Batches(monkeypatch, {6: float("nan")})
    path = train.train(experiments.load("tiny", ["trainer.returns=1"]))
    assert batches.numbers == [*range(7), *range(8, 16)]  # from step 4 on, and 4 to 7 are skipped
    card = weights.card(path)
    (event,) = card["returns"]
    assert (event["from"], event["batch"], event["skipped"]) == (4, 6, 4)
    assert card["steps"] == 12
    assert all(v.isfinite().all() for v in weights.read(path).values())
    assert "training goes on from step 4, and 4 batches are skipped" in capsys.readouterr().err


def test_the_bar_shows_steps_of_all_after_a_return(folder, monkeypatch):
    shown = []

    def update(bar: callbacks.ProgressBar, task: Any, current: int, **_: Any) -> None:
        if task is not None and task == bar.train_progress_bar_id:
            shown.append((current, bar.progress.tasks[task].total))

    monkeypatch.setattr(callbacks.ProgressBar, "_update", update)
    Batches(monkeypatch, {6: float("nan")})
    train.train(experiments.load("tiny", ["trainer.returns=1"]))
    assert shown == [(step, 12) for step in (*range(1, 7), *range(5, 13))]


def test_before_the_first_checkpoint_it_begins_anew(folder, monkeypatch):
    batches = Batches(monkeypatch, {1: float("inf")})
    train.train(experiments.load("tiny", ["trainer.returns=1", "trainer.validate_every=3"]))
    assert batches.numbers == [0, 1, *range(3, 15)]


def test_the_weights_are_those_of_a_training_that_never_had_the_batches(folder, monkeypatch):
    """Optimiser, average and steps are kept: equal to the last bit to a training on other numbers of batches."""
    with monkeypatch.context() as patch:
        Batches(patch, {6: float("nan")})
        returned = weights.read(train.train(experiments.load("tiny", ["trainer.returns=1"])))
    monkeypatch.setattr(weights, "HOME", folder / "elsewhere")
    step, batch = TextToImage.training_step, Shapes.train_batch
    monkeypatch.setattr(TextToImage, "training_step", lambda system, data, n: step(system, data, n + 4 * (n >= 4)))
    monkeypatch.setattr(Shapes, "train_batch", lambda data, n, part: batch(data, n + 4 * (n >= 4), part))
    never = weights.read(train.train(experiments.load("tiny")))
    assert returned.keys() == never.keys()
    assert all(torch.equal(never[name], tensor) for name, tensor in returned.items())


def test_returns_are_counted_and_bounded(folder, monkeypatch):
    batches = Batches(monkeypatch, dict.fromkeys(range(6, 20), float("nan")))
    experiment = experiments.load("tiny", ["trainer.returns=2"])
    with pytest.raises(divergence.Diverged, match=r"the loss is nan at step 5 after 2 returns to a checkpoint; last"):
        train.train(experiment)
    assert batches.numbers == [*range(7), 8, 10]
    with pytest.raises(divergence.Diverged, match="after 2 returns"):  # the checkpoint counts them
        train.train(experiment)
    assert weights.trained(experiment) is None


def test_a_spike_is_a_loss_far_above_its_mean_once_that_has_settled(folder, monkeypatch):
    monkeypatch.setattr(divergence, "SETTLED", 5)
    batches = Batches(monkeypatch, {2: 1e3, 9: 1e5})
    with pytest.raises(divergence.Diverged, match=r"the loss was \d+\.\d times its running mean at step 10"):
        train.train(experiments.load("tiny", ["trainer.spike=50"]))
    assert batches.numbers == [*range(10)]


def test_a_spike_between_logging_points_is_noticed_before_a_checkpoint(folder, monkeypatch):
    monkeypatch.setattr(divergence, "SETTLED", 3)
    batches = Batches(monkeypatch, {5: 1e5})
    experiment = experiments.load("tiny", ["trainer.spike=50", "trainer.log_every=100", "trainer.returns=1"])
    card = weights.card(train.train(experiment))
    assert batches.numbers == [*range(8), *range(8, 16)]
    assert card["returns"][0]["cause"].startswith("the loss was")


def test_a_loss_that_is_not_finite_leaves_the_mean_as_it_is(monkeypatch):
    monkeypatch.setattr(divergence, "SETTLED", 5)
    guard = divergence.DivergenceGuard(Path(), 1, divergence.Limits(spike=3.0))
    for loss in [1.0] * 7:
        guard._watch(torch.tensor(loss), 3.0)
    assert not guard.spiked
    guard._watch(torch.tensor(float("nan")), 3.0)
    assert guard.state_dict()["mean"] == pytest.approx(1.0)
    assert guard.spiked is not None
    assert guard.spiked.isinf()
    guard = divergence.DivergenceGuard(Path(), 1, divergence.Limits(spike=3.0))
    guard._watch(torch.tensor(float("inf")), 3.0)  # before the mean has settled too
    assert guard.state_dict()["mean"] == 0
    assert guard.spiked is not None


def test_a_nan_between_logging_points_ends_no_watch_for_spikes(folder, monkeypatch):
    """A NaN that leaves the weights finite is noticed before the next checkpoint, which it would have spoilt."""
    monkeypatch.setattr(divergence, "SETTLED", 3)
    batches = Batches(monkeypatch, {})
    end = divergence.DivergenceGuard.on_train_batch_end

    def with_nan(guard: Any, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        outputs = {"loss": torch.tensor(float("nan"))} if index == 6 else outputs
        end(guard, trainer, module, outputs, batch, index)

    monkeypatch.setattr(divergence.DivergenceGuard, "on_train_batch_end", with_nan)
    experiment = experiments.load("tiny", ["trainer.spike=50", "trainer.log_every=100", "trainer.returns=1"])
    card = weights.card(train.train(experiment))
    assert batches.numbers == [*range(8), *range(8, 16)]
    assert card["returns"][0]["cause"] == "the loss was not finite"


def test_no_checkpoint_is_written_behind_a_spike(folder, monkeypatch):
    guard = divergence.DivergenceGuard(folder, 100, divergence.Limits(spike=50.0))
    guard.spiked = torch.tensor(60.0)
    trainer = L.Trainer(logger=False, accelerator="cpu", barebones=True)
    with pytest.raises(divergence.Diverged, match=r"the loss was 60\.0 times its running mean"):
        guard.on_save_checkpoint(trainer, L.LightningModule(), {})


def test_options_at_their_defaults_keep_the_hash(folder):
    tiny_hash = hashing.experiment_hash(experiments.load("tiny"))
    assert hashing.experiment_hash(experiments.load("tiny", ["trainer.returns=0", "trainer.spike=null"])) == tiny_hash
    assert hashing.experiment_hash(experiments.load("tiny", ["trainer.returns=1"])) != tiny_hash


def test_the_norm_of_the_gradient_is_logged_before_it_is_clipped(folder, monkeypatch):
    norms: list[Tensor] = []
    clip = TextToImage.configure_gradient_clipping

    def clipping(system: Any, optimizer: Any, *options: Any, **named: Any) -> None:
        gradients = [p.grad for p in system.parameters() if p.grad is not None]
        norms.append(sum((g.double().square().sum() for g in gradients), torch.zeros(())).sqrt())
        clip(system, optimizer, *options, **named)

    monkeypatch.setattr(TextToImage, "configure_gradient_clipping", clipping)
    measured = weights.card(train.train(experiments.load("tiny", ["trainer.gradient_clip=0.01"])))["measured"]
    assert measured["train/grad_norm"] == pytest.approx(float(norms[-1]), rel=1e-5)
    assert measured["train/grad_norm"] > 0.01
