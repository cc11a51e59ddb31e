"""The interface of a system: what a guest's needs, what it inherits, and what is said of one that lacks something."""

from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from torch import nn

from sana_lab.ablation import runner
from sana_lab.checkpoints import weights
from sana_lab.config import experiments
from sana_lab.config.specs import Spec, SpecError
from sana_lab.evaluation import evaluate
from sana_lab.systems import System
from sana_lab.systems.ema import Average
from sana_lab.training import checks, train
from sana_lab.types import Batch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Guest(System):
    """Learns the mean colour of its pictures; `scale` is frozen, `extra` serves training alone."""

    frozen, auxiliary = ("scale",), ("extra",)

    def __init__(
        self, optimizer: Annotated[Spec, "optimizer"] = "sgd", warmup: int = 2, ema: float = 0.5, start: float = 0.0
    ) -> None:
        super().__init__()
        self.colour, self.extra = nn.Linear(1, 3, bias=False), nn.Linear(1, 1)
        self.scale = nn.Linear(1, 1).requires_grad_(False)
        nn.init.constant_(self.colour.weight, start)
        self.average = Average(self, ema)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        error = batch.images.mean((0, 2, 3)) - self.colour(torch.ones(1))
        return error.square().mean() + self.extra(torch.ones(1)).square().mean()


class NoStep(System):
    pass


class NoAverage(System):
    def __init__(self, optimizer: Annotated[Spec, "optimizer"] = "sgd") -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        raise AssertionError


class NoOptimizer(NoAverage):
    def __init__(self, ema: float = 0.9) -> None:
        System.__init__(self)
        self.net = nn.Linear(1, 1)
        self.average = Average(self, ema)


def experiment(here: Path, system: type[System], **options: Any) -> dict[str, Any]:
    (here / "experiments").mkdir(exist_ok=True)
    (here / "experiments/guest.yaml").write_text(
        f"system: {{name: '{__name__}:{system.__name__}'}}\n"
        "data: {name: shapes, size: 8, batch: 2, held_out: 2}\n"
        "trainer: {max_steps: 4, checkpoint_every: 2, accelerator: cpu, threads: 1}\n"
    )
    return experiments.load("guest", [f"{k}={v}" for k, v in options.items()])


def test_a_guest_trains_resumes_and_leaves_averaged_weights(here):
    given = experiment(here, Guest)
    checks.check(given)
    path = train.train(given)
    kept = torch.load(path.parent / "step=4.ckpt", weights_only=True)
    assert set(kept["state_dict"]) == {"colour.weight", "extra.weight", "extra.bias"}
    assert kept["average"]["updates"] == 4
    assert kept["hyper_parameters"]["ema"] == 0.5
    left = weights.read(path)
    assert left.keys() == {"colour.weight"}
    assert left["colour.weight"].equal(kept["average"]["values"]["colour.weight"])
    assert not left["colour.weight"].equal(kept["state_dict"]["colour.weight"])


@pytest.mark.parametrize(
    ("system", "words"),
    [
        (NoStep, "lacks training_step of sana_lab.systems.System"),
        (NoAverage, "NoAverage has no `average`"),
        (NoOptimizer, "NoOptimizer has no option `optimizer`"),
    ],
)
def test_what_a_guest_lacks_is_named_in_one_line_before_training(here, system: type[System], words: str):
    with pytest.raises(SpecError) as caught:
        checks.check(experiment(here, system))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (here / "runs").exists()


def test_without_an_evaluation_it_trains_and_is_a_trial_with_its_losses_alone(here, caplog):
    """Named before training; `eval` is an error, and a trial of an ablation loses nothing."""
    given = experiment(here, Guest, **{"trainer.max_steps": 0})
    with caplog.at_level("INFO"):
        checks.check(given)
    assert "Guest has no method `evaluate`" in caplog.text
    system = Guest()
    system.experiment = given
    with pytest.raises(SpecError, match="Guest has no method `evaluate`, so there is nothing to measure"):
        evaluate.evaluate(system)
    assert "measures" not in evaluate.evaluate(system, may_be_empty=True)


@pytest.mark.parametrize(("report", "words"), [({}, "nothing to measure of a Judged"), ([1], "returned a list")])
def test_an_evaluation_without_a_number_is_an_error(here, report: Any, words: str):
    class Judged(Guest):
        def evaluate(self, evaluator: Any) -> Any:
            return report

    system = Judged()
    system.experiment = experiment(here, Guest)
    with pytest.raises(SpecError, match=words):
        evaluate.evaluate(system)


def test_weights_as_they_are_before_the_first_step_and_averages_after():
    system = Guest(start=1.0)
    nn.init.constant_(system.colour.weight, 3.0)  # as when weights are loaded

    def value() -> float:
        return system.colour.weight.detach()[0].item()

    with system.averaged():
        assert value() == 3.0
    system.average.update(system)
    with system.averaged():
        assert 1.0 < value() < 3.0
    assert value() == 3.0
    system.write_average()
    assert 1.0 < value() < 3.0


def test_children_are_found_by_their_kind():
    system = Guest()
    assert system.part("colour") is system.colour
    assert system.part("dit") is None


@pytest.mark.parametrize(
    ("columns", "claims", "metric"),
    [("[val_loss, geneval]", "[]", "geneval"), ("[val_loss]", "[{metric: exact, order: [a, b]}]", "exact")],
)
def test_an_ablation_of_it_that_shows_an_evaluation_is_refused_before_training(
    here: Path, columns: str, claims: str, metric: str
):
    experiment(here, Guest)
    rows = "axes: {start: {a: {system.start: 0.0}, b: {system.start: 1.0}}}"
    path = here / "ablations/guests.yaml"
    path.parent.mkdir()
    path.write_text(f"title: Guests\nbase: guest\n{rows}\ncolumns: {columns}\nexpect: {claims}\n")
    with pytest.raises(SpecError, match=f"shows '{metric}', and its system Guest has no method `evaluate`") as caught:
        runner.main("guests", dry_run=True)
    assert "\n" not in str(caught.value)
    assert not (here / "runs").exists()
    path.write_text(f"title: Guests\nbase: guest\n{rows}\ncolumns: [val_loss, train_s]\n")
    assert runner.main("guests", dry_run=True) == 0
