"""Points of curves: when they are measured, that training does not notice, that a kill loses and doubles none."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

from sana_lab import __main__
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, hashing, limits, specs
from sana_lab.config.schema import Config, Trial
from sana_lab.config.specs import SpecError
from sana_lab.evaluation import evaluate
from sana_lab.evaluation.points import Evaluation
from sana_lab.systems import System
from sana_lab.tracking.store import Store
from sana_lab.training import command, points, train
from sana_lab.training.callbacks import Timer

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader")  # mlflow 3.17 with sqlalchemy 2.1

MEASURED = {
    "trainer.max_steps": 8,
    "trainer.checkpoint_every": 3,
    "trainer.validate_every": 4,
    "data.held_out": 16,
    "eval.held_out": 16,
    "eval.images_per_prompt": 2,
    "eval.measures": [{"name": "distances", "extractor": "shapes"}],
    "eval.at_images": 6,
    "prompts": [],
}


@pytest.fixture
def folder(here: Path) -> Path:
    """Two experiments whose measures are numbers after a second of training."""
    tiny.write_experiment(here, changes=MEASURED)
    tiny.write_experiment(here, "squeeze", tiny.SQUEEZE, {"trainer.max_steps": 4, "eval.at_images": 3})
    return here


def with_points(*overrides: str) -> Config:
    return experiments.load("tiny", ["eval.at=[0.5, 1]", *overrides])


def trained(experiment: Config, evaluation: Any = None, **options: Any) -> Path:
    return train.train(experiment, progress=print, evaluation=evaluation or Evaluation(), **options)


def measured(experiment: Config) -> list[points.Point]:
    return points.read(train.folder(experiment) / points.FILE, experiment)


class TestSteps:
    def test_shares_and_intervals_are_one_list(self, folder):
        assert limits.point_steps(experiments.load("tiny")) == []
        assert limits.point_steps(with_points()) == [4, 8]
        assert limits.point_steps(with_points("eval.every=3")) == [3, 4, 6, 8]
        assert limits.point_steps(experiments.load("tiny", ["eval.at=[0.01, 0.02]"])) == [1]
        assert limits.point_steps(with_points("trainer.max_steps=0", "eval.every=3")) == []

    def test_one_that_never_comes_is_an_error(self, folder):
        with pytest.raises(SpecError, match=r"eval\.every is 9, and trainer\.max_steps 8; expected at most as many"):
            command.main("tiny", ["eval.every=9"], False, Evaluation())
        for share in ("0", "1.5"):
            with pytest.raises(SpecError, match=r"eval\.at\[0\] is .*expected float in \(0, 1\]"):
                experiments.load("tiny", [f"eval.at=[{share}]"])

    def test_they_name_no_other_model_and_no_other_trial(self, folder):
        plain, other = experiments.load("tiny"), with_points("eval.every=2", "eval.at_images=5")
        assert hashing.experiment_hash(plain) == hashing.experiment_hash(other)
        assert hashing.trial_hash(Trial({}, 0, plain)) == hashing.trial_hash(Trial({}, 0, other))
        assert hashing.points_hash(plain) != hashing.points_hash(other)
        assert hashing.points_hash(plain) == hashing.points_hash(experiments.load("tiny", ["eval.bench_repeats=4"]))
        assert hashing.points_hash(plain) == hashing.points_hash(experiments.load("tiny", ["eval.reconstruct=true"]))


def test_training_is_the_same_to_the_last_bit(folder, monkeypatch):
    """Of a system that draws from the global random state too: weights, measures, and that state after it."""
    noisy = [f"system.optimizer={{name: '{__name__}:Noisy'}}", "eval.every=1"]
    before = trained(with_points(*noisy))
    after = torch.rand(1), np.random.rand(1)
    monkeypatch.setattr(weights, "HOME", folder / "elsewhere")
    without = trained(experiments.load("tiny", noisy[:1]))
    assert (torch.rand(1), np.random.rand(1)) == after
    a, b = weights.read(before), weights.read(without)
    assert a.keys() == b.keys()
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert weights.card(before)["measured"] == weights.card(without)["measured"]
    assert (weights.card(before)["points"]["steps"], "points" in weights.card(without)) == (list(range(1, 9)), False)


class Noisy(torch.optim.SGD):
    """Adds noise of the global generator to its steps, and insists on the mode and the weights of training."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, lr)

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for p in (p for group in self.param_groups for p in group["params"]):
            p.data.add_(torch.randn_like(p), alpha=1e-3)
        return loss


def test_a_point_is_the_evaluation_of_the_averaged_weights(folder):
    """On as many images as the whole evaluation has, the last point equals it; an earlier one is another number."""
    decoder = f"system.autoencoder.weights={frozen_parts(folder)['autoencoder']['weights']}"
    experiment = with_points("eval.at_images=100", decoder)
    trained(experiment)
    half, end = measured(experiment)
    assert [(p.step, p.images) for p in (half, end)] == [(4, 16), (8, 32)]
    report = evaluate.evaluate("tiny", [decoder])
    values = {k: v for each in report["measures"].values() for k, v in each["values"].items()}
    assert end.values.keys() == values.keys()
    assert end.values["fd_shapes"] == pytest.approx(values["fd_shapes"], rel=1e-6)
    assert half.values["fd_shapes"]["value"] != pytest.approx(values["fd_shapes"]["value"], rel=1e-5)
    per_image = end.per_image["fd_shapes"]
    assert per_image["values"] == pytest.approx(report["per_image"]["fd_shapes"]["values"], rel=1e-5)
    assert per_image["drawn"] == report["per_image"]["fd_shapes"]["drawn"]


def test_fewer_images_are_spread_over_the_tasks(folder):
    """Columns keep their names, though the benchmark is partial; each image has the cluster of its prompt."""
    experiment = with_points("eval.prompts_per_task=2", "eval.at=[1]")
    trained(experiment)
    (point,) = measured(experiment)
    assert {"geneval", "geneval_single_object", "geneval_color_attr", "fd_shapes"} <= point.values.keys()
    assert point.per_image["geneval"]["clusters"] == [0, 2, 4, 6, 8, 10]
    assert point.per_image["fd_shapes"]["clusters"] == [0, 2, 5, 8, 10, 13]
    assert point.values["geneval"]["n"] == point.values["fd_shapes"]["n"] == 6
    assert point.evaluation_seconds > 0


KILLED = """
import sys, time
from sana_lab.config import experiments
from sana_lab.evaluation.points import Evaluation
from sana_lab.tracking.logger import RunLogger
from sana_lab.tracking.store import Store
from sana_lab.training import points, train

def wait(*_):
    print("point", flush=True)
    time.sleep(600)

if sys.argv[2] == "before":
    points._log_to = wait  # the point is in its file alone
else:
    points.Points._warn = wait
train.train(experiments.load("tiny", sys.argv[3:]), progress=print, evaluation=Evaluation(),
    logger=RunLogger(Store("runs"), sys.argv[1]))
"""


@pytest.mark.parametrize("moment", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_a_killed_training_has_each_point_once(folder, runs, monkeypatch, moment):
    """kill -9 at the point of step 4, before or after MLflow has it: the checkpoint is that of step 3."""
    store, given = Store(runs), ["eval.every=4"]
    run = store.start_run("training", "tiny")
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, run, moment, *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "point\n"
        process.kill()
    experiment = experiments.load("tiny", given)
    assert [p.name for p in train.folder(experiment).glob("*.ckpt")] == ["step=3.ckpt"]
    first = measured(experiment)
    assert [p.step for p in first] == [4]
    from sana_lab.tracking.logger import RunLogger

    trained(experiment, logger=RunLogger(store, run))
    resumed = measured(experiment)
    assert [p.step for p in resumed] == [4, 8]
    assert resumed[0] == first[0]
    for key in ("points/fd_shapes", "points_by_images/fd_shapes", "points_by_seconds/fd_shapes"):
        assert len(store.client.get_metric_history(run, key)) == 2
    assert [step for step, _ in store.history(run, "points/fd_shapes")] == [4, 8]
    assert [step for step, _ in store.history(run, "points_by_images/fd_shapes")] == [16, 32]
    monkeypatch.setattr(weights, "HOME", folder / "elsewhere")
    trained(experiment)
    assert [p.values for p in measured(experiment)] == [p.values for p in resumed]


def test_an_autoencoder_is_measured_by_its_reconstructions(folder):
    experiment = experiments.load("squeeze", ["eval.at=[0.5, 1]"])
    trained(experiment)
    half, end = measured(experiment)
    assert half.values.keys() == end.values.keys() == {"psnr", "ssim"}
    assert (end.values["psnr"]["n"], len(end.per_image["psnr"]["values"])) == (3, 3)
    report = evaluate.evaluate("squeeze", ["eval.reconstructions=3"])["reconstruction"]
    assert end.values["psnr"]["value"] == pytest.approx(report["psnr"], rel=1e-6)
    assert half.values["psnr"]["value"] != end.values["psnr"]["value"]


def frozen_parts(folder: Path) -> dict[str, Any]:
    torch.manual_seed(1)
    parts = {}
    for kind, spec in (("autoencoder", tiny.VAE), ("text_encoder", tiny.T5)):
        save_file(specs.build(kind, spec).state_dict(), folder / f"{kind}.safetensors")
        parts[kind] = {**spec, "weights": str(folder / f"{kind}.safetensors")}
    return parts


def test_a_denoiser_on_cached_features_samples_with_the_encoders_of_its_data(folder):
    """The same point as of the whole system with its weights; without weights of the encoders one clear error."""
    parts = frozen_parts(folder)
    features = {"name": "features", "text_encoder": parts["text_encoder"], "batch": 4}
    source = {"name": "latents", "source": {"name": "shapes", "size": 16, "held_out": 16}, "items": 8}
    features["source"] = {**source, "autoencoder": parts["autoencoder"]}
    system = {"name": "dit", "dit": tiny.DIT, "warmup": 2, **parts}
    changes = {"system": system, "data": features, "eval.at": [1.0], "eval.at_images": 100}
    tiny.write_experiment(folder, "cached", changes={**MEASURED, **changes})
    experiment = experiments.load("cached")
    path = trained(experiment)
    (point,) = measured(experiment)
    whole = {**system, "name": "text2image", "dit": {**tiny.DIT, "weights": str(path)}}
    tiny.write_experiment(
        folder, "whole", changes={**MEASURED, "system": whole, "data": source["source"], "trainer.max_steps": 0}
    )
    train.train(experiments.load("whole"))
    report = evaluate.evaluate("whole")["measures"]["distances"]["values"]["fd_shapes"]
    assert point.values["fd_shapes"]["value"] == pytest.approx(report["value"], rel=1e-5)
    assert {name.split(".")[0] for name in weights.read(path)} == {"dit"}
    bare = experiments.load("cached", ["trainer.max_steps=9"])
    del bare["system"]["autoencoder"]["weights"]
    with pytest.raises(SpecError, match=r"eval\.at and eval\.every need an evaluation, and DitSystem has none"):
        trained(bare)


class TestWords:
    def test_training_without_an_evaluation_says_what_it_needs(self, folder):
        with pytest.raises(ValueError, match=r"expected evaluation=sana_lab\.evaluation\.points\.Evaluation\(\)"):
            train.train(with_points())

    def test_measures_are_built_before_the_first_step(self, folder):
        missing = with_points("eval.measures=[{name: geneval, prompts: nowhere.jsonl, detector: shapes}]")
        with pytest.raises(ValueError, match=r"nowhere\.jsonl"):
            trained(missing)
        assert measured(missing) == []

    def test_a_finished_training_says_what_it_lacks(self, folder, runs, capsys):
        trained(experiments.load("tiny"))
        capsys.readouterr()
        assert __main__.main(["train", "tiny", "eval.at=[0.5,1]"]) == 0
        assert "its training measured no points at steps 4, 8 under these settings" in capsys.readouterr().out

    def test_one_that_goes_on_with_points_says_what_is_passed(self, folder, monkeypatch, capsys):
        with monkeypatch.context() as patch:
            patch.setattr(weights, "write", refuse)
            patch.setattr(train.Checkpoints, "on_fit_end", lambda *_: None)
            with pytest.raises(RuntimeError):
                trained(experiments.load("tiny"))
        experiment = with_points("eval.every=2")
        trained(experiment)
        assert [p.step for p in measured(experiment)] == [8]
        assert "sana-lab: no points at steps 2, 4, 6: they were trained without" in capsys.readouterr().err

    def test_the_share_of_time_is_stated_and_too_much_is_a_warning(self, folder, capsys):
        trained(with_points(), Slow(0.5))
        err = capsys.readouterr().err
        assert err.count("of the training's time, expected at most 10%; try eval.at_images=") == 2
        assert "sana-lab: 2 points of 6 images took" in err
        quick = with_points("seed=1")
        card = weights.card(trained(quick, Slow(0.0)))
        assert "sana-lab" not in capsys.readouterr().err
        assert 0 <= card["points"]["share"] < 0.1
        assert points.line(card)[0].startswith("points at steps 4, 8: 6 images each, 0.")
        assert card["seconds"] > 0


class Slow:
    """Takes its time, and calls the number of parameters a measure."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def check(self, system: System, experiment: Config) -> None:
        assert system.evaluates

    def measure(self, system: System, experiment: Config) -> dict[str, Any]:
        import time

        assert not any(module.training for module in system.modules())
        time.sleep(self.seconds)
        return {"values": {"params": {"value": 1.0, "low": None, "high": None, "n": 1}}, "per_image": {}}


def refuse(*_: Any) -> None:
    raise RuntimeError


def test_a_pause_is_no_time_of_the_training():
    timer = Timer()
    with timer.paused() as pause:
        timer.start -= 5.0  # five seconds pass
        pause.start -= 5.0
    assert 0 <= timer.seconds < 0.5
