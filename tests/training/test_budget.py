"""Training within a time: when it ends, what the learning rate follows, what is shown, and what is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image

from sana_lab import systems
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, hashing
from sana_lab.config.specs import SpecError
from sana_lab.systems import autoencoder
from sana_lab.systems.optim import learning_rate_factor
from sana_lab.training import PICTURE, budget, train
from sana_lab.training.callbacks import Timer
from sana_lab.training.checks import check

WITHIN = ["trainer.max_seconds=1.5", "trainer.max_steps=1000000", "trainer.validate_every=100000"]


@pytest.fixture
def folder(here: Path) -> Path:
    tiny.write_experiment(here, changes={"system.decay": 0.5})
    tiny.write_experiment(here, "squeeze", tiny.SQUEEZE)
    return here


class Pictures(DummyLogger):
    """Steps at which samples are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def log_image(self, key: str, image: Image.Image, step: int) -> None:
        assert (key, image.mode) == ("samples", "RGB")
        self.steps.append(step)


class Clock:
    """The training's seconds: 0.25 before the first step, 0.125 for each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.25) -> None:
        self.seconds = seconds
        self.shares: list[float] = []  # elapsed when each step's learning rate is set
        monkeypatch.setattr(Timer, "seconds", property(lambda _: self.seconds))
        monkeypatch.setattr(systems, "set_learning_rate", self.step)

    def step(self, trainer: object, warmup: int, decay: float, elapsed: float) -> None:
        self.shares.append(elapsed)
        self.seconds += 0.125


def test_training_ends_by_time_and_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(budget, "INTERVAL", 0.5)
    clock, logger = Clock(monkeypatch), Pictures()
    progress: list[tuple[int, int, str]] = []
    lines: list[str] = []
    experiment = experiments.load("tiny", WITHIN)
    path = train.train(experiment, progress=lambda *p: progress.append(p), logger=logger, announce=lines.append)
    card = weights.card(path)
    assert (card["seconds"], card["steps"], card["samples"], card["max_seconds"]) == (1.5, 10, 40, 1.5)
    assert "val/loss" in card["measured"]  # measured when it ends
    assert clock.shares == pytest.approx([(0.25 + 0.125 * i) / 1.5 for i in range(10)])
    assert logger.steps == [0, 2, 6, 10]
    with Image.open(path.with_name(PICTURE)) as image:
        assert image.height > image.width  # four rows of two pictures
    assert lines[0] == "1.5 s from now, beginning with the preparation of the data"
    assert lines[1].endswith(f"s: {path.with_name(PICTURE)}")
    assert lines[2].startswith("0 of 1.5 s, 1 s left, step 2, loss ")
    assert len(lines) == 4
    assert [p[:2] for p in progress] == [(15, 15)]
    assert progress[0][2].startswith("2 of 1.5 s, 0 s left, step 10, loss ")
    assert [p.name for p in path.parent.glob("*.ckpt")] == ["step=10.ckpt"]


def test_time_that_is_over_is_not_trained_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """After a kill between the last step and the writing of the weights."""
    clock, experiment = Clock(monkeypatch), experiments.load("tiny", WITHIN)
    with monkeypatch.context() as patch:
        patch.setattr(weights, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train.train(experiment)
    card = weights.card(train.train(experiment))
    assert (card["steps"], len(clock.shares)) == (10, 10)


def test_time_that_ends_before_the_first_step_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch):
    Clock(monkeypatch, seconds=2.0)
    experiment = experiments.load("tiny", WITHIN)
    with pytest.raises(RuntimeError, match=r"max_seconds is 1\.5, and preparing the data took 2 s: no step"):
        train.train(experiment)
    assert weights.trained(experiment) is None


class TestRate:
    def test_it_decays_over_the_last_share_of_the_time(self):
        factors = [learning_rate_factor(10, 1000, 1, 0.4, elapsed) for elapsed in (0.0, 0.3, 0.6, 0.8, 1.0)]
        assert factors == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0])

    def test_steps_that_are_farther_count(self):
        assert learning_rate_factor(90, 100, 1, 0.4, 0.5) == learning_rate_factor(90, 100, 1, 0.4)

    def test_a_constant_rate_stays(self):
        assert learning_rate_factor(10, 1000, 1, 0.0, 1.0) == 1.0


def test_its_clock_is_that_of_the_card():
    timer = Timer()
    timer.load_state_dict({"seconds": 30.0})
    one = budget.TimeBudget(timer, 40.0)
    assert 0.75 <= one.share < 0.9
    timer.load_state_dict({"seconds": 41.0})
    trainer = SimpleNamespace(should_stop=False)
    one.on_train_batch_end(trainer)
    assert (one.share, trainer.should_stop) == (1.0, True)


def test_no_budget_keeps_the_hash(folder: Path):
    plain, none, some = (
        hashing.experiment_hash(experiments.load("tiny", overrides))
        for overrides in ([], ["trainer.max_seconds=null"], ["trainer.max_seconds=90"])
    )
    assert plain == none != some


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("tiny", ["eval.at=[0.5]"], "leaves their number open; expected eval.every"),
    ],
)
def test_what_needs_a_number_of_steps_is_refused(folder: Path, name: str, overrides: list[str], words: str):
    with pytest.raises(SpecError, match=words):
        check(experiments.load(name, ["trainer.max_seconds=9", *overrides]))


def test_the_clock_of_the_first_rank_counts(monkeypatch: pytest.MonkeyPatch):
    """On another rank, whose own clock has just begun."""
    monkeypatch.setattr(budget.ranks, "launched", lambda: True)
    other, trainer = budget.TimeBudget(Timer(), 40.0), SimpleNamespace(should_stop=False)
    for seconds, share in ((10.0, 0.25), (41.0, 1.0)):
        monkeypatch.setattr(budget.ranks, "first", lambda decide, seconds=seconds: seconds)
        other.on_train_batch_end(trainer)
        assert (other.elapsed(), trainer.should_stop) == (share, share == 1)


def test_a_cosine_ends_with_the_time(folder: Path, monkeypatch: pytest.MonkeyPatch):
    experiment = experiments.load("squeeze", ["system.schedule=cosine", "system.warmup=1", *WITHIN])
    system = check(experiment)
    clock, rates = Clock(monkeypatch), list[float]()
    begin = autoencoder.ramp

    def ramp(*arguments: Any) -> float:
        clock.seconds += 0.125
        rates.append(begin(*arguments))
        return rates[-1]

    monkeypatch.setattr(autoencoder, "ramp", ramp)
    assert weights.card(train.train(experiment))["steps"] == 10
    assert rates[-1] < 0.05 < rates[5]
    monkeypatch.setattr(type(system), "decays_by_time", False)  # as of a system of one's own
    with pytest.raises(SpecError, match="'cosine' follows the number of steps; expected constant"):
        check(experiment)


LATE = '''
import os
from pathlib import Path

from sana_lab.systems.text2image import TextToImage
from sana_lab.training.callbacks import Timer

CLOCK = [0.25]
if "RANK" in os.environ:
    Timer.seconds = property(lambda timer: CLOCK[0] if os.environ["RANK"] == "0" else 0.0)

class Late(TextToImage):
    """A step takes 0.125 s, and the clock of the second rank stands still; each rank writes its learning rates."""

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        CLOCK[0] += 0.125
        with Path("rates." + os.environ["RANK"]).open("a") as file:
            print(self.trainer.optimizers[0].param_groups[0]["lr"], file=file)
'''


def test_two_devices_end_after_the_same_step_with_the_same_rates(folder: Path):
    tiny.write(folder, "late.py", LATE)
    tiny.write_experiment(folder, "late", changes={"system.decay": 0.9, "system.name": "late:Late"})
    path = train.train(experiments.load("late", [*WITHIN, "trainer.devices=2"]))
    rates = [(folder / f"rates.{rank}").read_text().split() for rank in range(2)]
    assert rates[0] == rates[1]
    assert float(rates[0][-1]) < float(rates[0][4])
    card = weights.card(path)
    assert (card["steps"], card["seconds"], card["devices"], len(rates[0])) == (10, 1.5, 2, 10)
    assert path.with_name(PICTURE).is_file()
