"""A training whose MLflow server is lost goes on; points of curves, measured points and images come once it is back."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from stand_in_server import Server

from sana_lab.checkpoints import weights
from sana_lab.config import experiments
from sana_lab.tracking.logger import RunLogger
from sana_lab.training import points, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:MLflow's server does not answer"),
]


class Lost:
    """Measures of points: the server is lost with the first, and back with the last."""

    def __init__(self, server: Server) -> None:
        self.server, self.value = server, 0.0

    def check(self, *_: Any) -> None:
        """Any system can be measured."""

    def measure(self, *_: Any) -> dict[str, Any]:
        self.value += 0.25
        self.server.away = self.value < 0.75
        estimate = {"value": self.value, "low": 0.0, "high": 1.0, "n": 2}
        return {"values": {"exact": estimate}, "per_image": {}}


@pytest.fixture
def run(server: Server, here: Path) -> str:
    changes = {"trainer.max_steps": 6, "trainer.validate_every": 2, "eval.every": 2}
    tiny.write_experiment(here, changes=changes)
    return server.store().start_run("training", "tiny")


def test_nothing_is_lost_and_nothing_waits(server: Server, run: str):
    logger = RunLogger(server.store(), run, seconds=0.0)
    path = train.train(experiments.load("tiny"), logger=logger, evaluation=Lost(server))
    assert weights.card(path)["steps"] == 6
    assert server.images(run) == ["samples 2", "samples 4", "samples 6"]
    assert server.points(run, "points/exact") == [(2, 0.25), (4, 0.5), (6, 0.75)]
    assert [step for step, _ in server.points(run, "train/loss")] == [0, 1, 2, 3, 4, 5]
    assert server.failures <= 2  # then there is a pause
    assert not list((server.store().home / "outbox").glob("*.[jp]*"))


def test_a_resumed_training_sends_the_points_that_the_run_lacks(server: Server, run: str):
    """The points are in their file, and some of them in the run."""
    experiment, logger = experiments.load("tiny"), RunLogger(server.store(), run)
    train.train(experiment, evaluation=Lost(server))
    server.away = False
    measured = points.read(train.folder(experiment) / points.FILE, experiment)
    points.log(server.store(), run, measured[:1])
    points._log_to(logger, measured)
    points._log_to(logger, measured)
    logger.finalize()
    assert server.points(run, "points/exact") == [(2, 0.25), (4, 0.5), (6, 0.75)]
