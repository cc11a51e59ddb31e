"""Lightning's own loggers beside MLflow, by their names."""

import csv
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tiny

from sana_lab.config import experiments, hashing
from sana_lab.config.specs import SpecError
from sana_lab.training import checks, loggers, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader"),  # mlflow 3.17 with sqlalchemy 2.1
    pytest.mark.filterwarnings("ignore:.*unclosed file.*csv"),  # Lightning's CSV writer reads its file so
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6 with torch >= 2.13
]


def experiment(here: Path, *overrides: str) -> dict[str, Any]:
    tiny.write_experiment(here, changes={"trainer.max_steps": 2, "trainer.log_every": 1, "prompts": []})
    return experiments.load("tiny", overrides)


def test_csv_holds_the_losses(here: Path):
    config = experiment(here, "trainer.logger=csv")
    folder = train.train(config).parent
    rows = list(csv.DictReader((folder / "csv/version_0/metrics.csv").open()))
    assert [row["train/loss"] for row in rows if row["train/loss"]]
    assert {row["step"] for row in rows} >= {"0", "1"}


def test_a_logger_changes_no_hash(here: Path):
    plain, logged = experiment(here), experiment(here, "trainer.logger=[csv,wandb]")
    assert hashing.experiment_hash(plain) == hashing.experiment_hash(logged)


def test_a_second_session_keeps_the_first_ones_rows(tmp_path: Path):
    for loss in (1.0, 2.0):
        (logger,) = loggers.build(["csv", "csv"], tmp_path)
        logger.log_metrics({"loss": loss}, 0)
        logger.save()
    texts = [(tmp_path / f"csv/version_{i}/metrics.csv").read_text() for i in (0, 1)]
    assert [text.splitlines()[1].split(",")[0] for text in texts] == ["1.0", "2.0"]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_package_that_is_missing_is_named_before_training(here: Path):
    with pytest.raises(SpecError, match="pip install wandb"):
        checks.check(experiment(here, "trainer.logger=wandb"))


def test_an_unknown_name_has_the_nearest():
    with pytest.raises(SpecError, match="tensorboard"):
        experiments.load("shapes", ["trainer.logger=tensorbord"])


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_writes_events(tmp_path: Path):
    (logger,) = loggers.build("tensorboard", tmp_path)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    assert list((tmp_path / "tensorboard").glob("events*"))
