"""Points of curves: the measures of an experiment at some steps of its training, on the averaged weights.

A training with points is the training without them to the last bit: random state, modes and weights are restored, and
the points' time is no time of the training. Points are kept in `points.json` beside the checkpoints and in MLflow, by
step, by images and by seconds. A training that was killed goes on with the points it has.
"""

import json
import sys
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.seed import isolate_rng

from sana_lab.config import hashing
from sana_lab.config.atomic_write import write_text
from sana_lab.config.limits import point_steps
from sana_lab.config.schema import Config
from sana_lab.data import DataModule
from sana_lab.systems import System
from sana_lab.tracking.logger import RunLogger
from sana_lab.tracking.store import Store
from sana_lab.training.callbacks import Timer
from sana_lab.types import Json

FILE = "points.json"
"""Name of the file of points in a model's folder and among a run's artifacts; where weights ship, NAME.points.json."""

LAST = "points/seconds"
"""The metric of a point that is written last: where it is, all of the point is."""

LARGEST_SHARE = 0.1
"""Of the training's time; a training whose points take more says so."""


class PointEvaluation(Protocol):
    """Measures a system in training: `sana_lab.evaluation.points.Evaluation`, which this layer cannot import."""

    def check(self, system: System, experiment: Config) -> None:
        """SpecError or ValueError where the experiment's measures cannot be taken."""
        ...

    def measure(self, system: System, experiment: Config) -> Json:
        """The measures of the present weights: {"values": {column: {value, low, high, n}}, "per_image": {column:
        {values, clusters, drawn}}}, plain data."""
        ...


class Point(NamedTuple):
    """What was measured at one step."""

    step: int  # optimiser steps
    images: int  # training images so far, those of all devices
    seconds: float  # of training steps so far
    evaluation_seconds: float  # of this point
    values: Json  # column -> {value, low, high, n}
    per_image: Json  # column -> {values, clusters, drawn}


# --- the file


def beside(weights: Path) -> Path:
    """The file of the points of the training that gave a weights file."""
    return weights.with_name(FILE) if weights.name == "weights.safetensors" else weights.with_suffix(f".{FILE}")


def read(path: Path, experiment: Config) -> list[Point]:
    """The points in a file that were measured under the experiment's settings, by step; none without the file."""
    try:
        content = json.loads(path.read_text())
        points = [Point(**point) for point in content["points"]]
    except (OSError, ValueError, TypeError, KeyError):  # none, or not this version's
        return []
    return points if content["settings"] == hashing.points_hash(experiment) else []


def write(path: Path, experiment: Config, points: Sequence[Point]) -> None:
    """Write the points of a training."""
    write_text(path, json.dumps(as_json(experiment, points)))


def as_json(experiment: Config, points: Sequence[Point]) -> Json:
    """Points as plain data, with what they depend on beside the training."""
    return {"settings": hashing.points_hash(experiment), "points": [point._asdict() for point in points]}


# --- MLflow


def log(store: Store, run: str, points: Sequence[Point]) -> None:
    """Write the points that a run lacks: `points/COLUMN` by step, `points_by_images/` and `points_by_seconds/`."""
    logged = {step for step, _ in store.history(run, LAST)}
    for step, metrics in _lacking(points, logged):
        store.log_metrics(run, metrics, step)


def _lacking(points: Sequence[Point], logged: Container[int]) -> Iterator[tuple[int, Mapping[str, float]]]:
    """(position, metrics) of the points at other steps than those logged."""
    for point in points:
        if point.step not in logged:
            yield from _metrics(point)


def _metrics(point: Point) -> Iterator[tuple[int, Mapping[str, float]]]:
    """(position on its axis, metrics); the one that says that the point is logged comes last."""
    values = {name: estimate["value"] for name, estimate in point.values.items()}
    yield point.images, {f"points_by_images/{name}": value for name, value in values.items()}
    yield round(point.seconds), {f"points_by_seconds/{name}": value for name, value in values.items()}
    times = {"evaluation_s": point.evaluation_seconds, "images": point.images, "seconds": point.seconds}
    yield point.step, {f"points/{name}": value for name, value in {**values, **times}.items()}


def _log_to(logger: Logger, points: Sequence[Point]) -> None:
    """Write to a logger the points that it lacks; of another kind than the lab's, the newest. A busy database or a full
    disk does not stop the training: the next point writes them all. Those for a server wait in the logger's outbox."""
    if not isinstance(logger, RunLogger):
        for _, metrics in list(_metrics(points[-1]))[-1:]:
            logger.log_metrics(dict(metrics), points[-1].step)
        return
    if logger.outbox is not None:
        for step, metrics in _lacking(points, logger.steps(LAST)):
            logger.log_metrics(metrics, step)
        logger.try_flush()
        return
    from mlflow.exceptions import MlflowException

    assert logger.run_id is not None
    try:
        log(logger.store, logger.run_id, points)
    except MlflowException as error:
        print(f"sana-lab: points wait, MLflow did not take them: {str(error).splitlines()[0]}", file=sys.stderr)


# --- in training


class Points(Callback):
    """Measure the due points of an experiment.

    Its clock counts training steps: not the preparation of data, and neither validations with their sample grids nor
    points.
    """

    def __init__(self, experiment: Config, home: Path, timer: Timer, evaluation: PointEvaluation) -> None:
        self.experiment, self.file, self.timer, self.evaluation = experiment, home / FILE, timer, evaluation
        self.due = point_steps(experiment)
        self.points: list[Point] = []
        self.clock, self.validation = Timer(), ExitStack()

    def state_dict(self) -> dict[str, Any]:
        return self.clock.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.clock.load_state_dict(state_dict)

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Raise what would stop the first point, before the first step."""
        assert isinstance(module, System)
        with isolate_rng():
            self.evaluation.check(module, self.experiment)
        self.points = trainer.strategy.broadcast(read(self.file, self.experiment))

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Log what a killed process could not, name what it did not measure, and start the clock."""
        passed = [step for step in self.due if step <= trainer.global_step and step not in self._steps()]
        if trainer.is_global_zero and self.points:
            self._log(trainer)
        if trainer.is_global_zero and passed:
            print(f"sana-lab: no points at steps {_listed(passed)}: they were trained without", file=sys.stderr)
        self.clock.start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step in self.due and step not in self._steps():
            assert isinstance(module, System)
            self._measure(trainer, module)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, System)
        synchronise(module)
        self.validation.enter_context(self.clock.paused())

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.validation.close()

    @property
    def seconds(self) -> float:
        """Of all points, those before a resume included."""
        return sum(point.evaluation_seconds for point in self.points)

    def card(self) -> Json:
        """What the card of the weights says of the points; nothing where none are due."""
        if not self.due:
            return {}
        measured = {"steps": sorted(self._steps()), "images": self.experiment["eval"]["at_images"]}
        return {"points": {**measured, "seconds": round(self.seconds, 2), "share": round(self._share(), 4)}}

    def _measure(self, trainer: L.Trainer, system: System) -> None:
        """Measure the present weights, keep the point and log it; the same on every rank."""
        synchronise(system)
        seconds = self.clock.seconds
        with self.timer.paused(), self.clock.paused() as pause:
            with undisturbed(system, self.experiment):
                report = self.evaluation.measure(system, self.experiment)
            synchronise(system)
            point = Point(trainer.global_step, self._images(trainer), seconds, pause.seconds, **report)
            self.points = sorted([*self.points, trainer.strategy.broadcast(point)])
            if trainer.is_global_zero:
                write(self.file, self.experiment, self.points)
                self._log(trainer)
                self._warn(trainer)

    def _images(self, trainer: L.Trainer) -> int:
        data: DataModule = trainer.datamodule  # type: ignore[attr-defined]  # Lightning does not annotate it
        return trainer.global_step * data.batch * trainer.accumulate_grad_batches

    def _log(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            _log_to(logger, self.points)

    def _warn(self, trainer: L.Trainer) -> None:
        """Print a line where the points will take too much of the training, after the first; or took it, at the end."""
        first, last = len(self.points) == 1, trainer.global_step == self.due[-1]
        expected = self._share()
        if (first or last) and expected > LARGEST_SHARE:
            images = self.experiment["eval"]["at_images"]
            fitting = max(1, int(images * LARGEST_SHARE / expected))
            took = "took" if last else "will take about"
            print(
                f"sana-lab: {len(self.due)} points of {images} images {took} {expected:.0%} of the training's time, "
                f"expected at most {LARGEST_SHARE:.0%}; try eval.at_images={fitting}, or fewer points",
                file=sys.stderr,
            )

    def _share(self) -> float:
        """Expected time of all due points over that of the whole training, by those measured so far."""
        if not self.points:
            return 0.0
        newest, steps = self.points[-1], self.experiment["trainer"]["max_steps"]
        return self.seconds / len(self.points) * len(self.due) / (newest.seconds * steps / newest.step)

    def _steps(self) -> set[int]:
        return {point.step for point in self.points}


@contextmanager
def undisturbed(system: System, experiment: Config) -> Iterator[None]:
    """Context with the averaged weights in evaluation mode; after it all is as before, random state included."""
    modes = {module: module.training for module in system.modules()}
    before, system.experiment = system.experiment, experiment
    with isolate_rng(), torch.no_grad(), _uncompiled(experiment), system.averaged():
        system.eval()
        try:
            yield
        finally:
            system.experiment = before
            for module, mode in modes.items():
                module.training = mode


def _uncompiled(experiment: Config) -> Any:
    """Blocks that training compiled run as written, so that the sizes of sampling compile nothing anew."""
    return torch.compiler.set_stance("force_eager") if experiment["trainer"]["compile"] else nullcontext()


def synchronise(system: System) -> None:
    """Wait for queued work, so that a clock read after it counts what is done."""
    if system.device.type == "cuda":
        torch.cuda.synchronize(system.device)


def lacking(weights: Path, experiment: Config) -> str | None:
    """The line on a finished training without points that an experiment is to have; None where none are lacking."""
    steps = {point.step for point in read(beside(weights), experiment)}
    if lacking := [step for step in point_steps(experiment) if step not in steps]:
        return (
            f"its training measured no points at steps {_listed(lacking)} under these settings; a training measures "
            "them on its way, such as one with another seed"
        )
    return None


def line(card: Mapping[str, Any]) -> list[str]:
    """The line on the points of a training, by the card of its weights; none where it measured none."""
    if (points := card.get("points")) is None:
        return []
    steps, share = _listed(points["steps"]), f"{points['seconds']} s, {points['share']:.1%} of the training"
    return [f"points at steps {steps}: {points['images']} images each, {share}"]


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:8])) + (", ..." if len(steps) > 8 else "")
