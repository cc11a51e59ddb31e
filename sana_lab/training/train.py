"""Command `sana-lab train`: train or resume an experiment; its folder is named by its hash."""

import json
import logging
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf

from sana_lab import environment
from sana_lab.checkpoints import files, weights
from sana_lab.config import experiments, hashing, interpolation, specs
from sana_lab.config.atomic_write import explaining_full_disk, write_text
from sana_lab.config.limits import point_steps
from sana_lab.config.paths import check_folder
from sana_lab.config.registry import WEIGHTED
from sana_lab.config.schema import Config
from sana_lab.costs.out_of_memory import advise_on_out_of_memory, first_line
from sana_lab.data import DataModule
from sana_lab.systems import System
from sana_lab.systems.compile import compile_blocks
from sana_lab.tracking.logger import RunLogger
from sana_lab.tracking.store import Store
from sana_lab.training import callbacks, ranks
from sana_lab.training.budget import Announce, BudgetReporter, ChangingPicture, TimeBudget
from sana_lab.training.callbacks import Progress, Timer
from sana_lab.training.card import card
from sana_lab.training.checkpointing import CheckpointFiles, Checkpoints
from sana_lab.training.checks import check, check_objective
from sana_lab.training.points import PointEvaluation, Points, lacking, line
from sana_lab.training.resume import resumable

Record = Callable[[], AbstractContextManager[Logger | None]]
"""Opens the record of a training: a logger for as long as it lasts."""


class Reporting(NamedTuple):
    """What a training reports to beside its logger, and with what it measures points."""

    progress: Progress | None = None
    evaluation: PointEvaluation | None = None
    announce: Announce | None = None  # of a training within a time; None prints to stderr


def folder(experiment: Config) -> Path:
    """Output folder of an experiment: checkpoints, weights, the resolved experiment."""
    return weights.HOME / "models" / hashing.experiment_hash(experiment)


def train(
    experiment: Config,
    *,
    name: str = "experiment",
    logger: Logger | None = None,
    progress: Progress | None = None,
    evaluation: PointEvaluation | None = None,
    announce: Announce | None = None,
) -> Path:
    """Train an experiment or resume its training, and return its weights file; returns at once if already trained.

    An experiment with `eval.at` or `eval.every` needs `sana_lab.evaluation.points.Evaluation`. A training within a time
    (`trainer.max_seconds`) announces its progress in lines, on stderr if not elsewhere.

    Several devices are several processes, of which the first alone has the lock and the logger. A second process that
    trains the same model prints a message and waits for the first. `Diverged` if the loss is not finite; `OutOfMemory`
    with advice on options that need less memory; `DiskFull` with the room that is left.
    """
    return _train_alone(experiment, name, lambda: nullcontext(logger), Reporting(progress, evaluation, announce))


def _train_alone(experiment: Config, name: str, record: Record, reporting: Reporting) -> Path:
    """Train under the folder's lock and `record`, unless it is trained already."""
    home = folder(experiment)
    check_folder(home)
    check_objective(experiment)
    ranks.join(experiment["trainer"]["accelerator"])
    with _lock(home, name):
        path = ranks.first(lambda: weights.trained(experiment))
        if path is None:
            with (
                record() as logger,
                advise_on_out_of_memory(lambda: memory_advice(experiment)),
                explaining_full_disk(home),
            ):
                _train(experiment, name, home, logger, reporting)
                path = ranks.first(lambda: weights.trained(experiment))
        assert path is not None
        return path


def _train(experiment: Config, name: str, home: Path, logger: Logger | None, reporting: Reporting) -> None:
    count = ranks.count(experiment)
    if count > 1 and not ranks.launched():
        ranks.start(count, _train_rank, count, experiment, name, home, logger, reporting)
    else:
        _train_rank(count, experiment, name, home, logger, reporting)


def _train_rank(
    count: int, experiment: Config, name: str, home: Path, logger: Logger | None, reporting: Reporting
) -> None:
    """The work of one of `count` processes; the first writes the weights."""
    options, timer = experiment["trainer"], callbacks.Timer()
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    L.seed_everything(experiment["seed"], verbose=False)
    if ranks.is_first():
        write_text(home / "experiment.yaml", _yaml(experiment))
    data: DataModule = specs.build("data", experiment["data"])
    system: System = specs.build("system", experiment["system"])
    system.clip = options["gradient_clip"]
    if options["compile"]:
        compile_blocks(system.part("dit"))
    measures, steps = dict[str, float](), options["max_steps"]
    points = _points(experiment, home, timer, reporting.evaluation)
    if options["max_steps"] > 0:
        checkpoints = Checkpoints(home, options["checkpoint_every"], options["log_every"])
        reporters = _reporters(experiment, home, timer, reporting)
        trainer = _trainer(experiment, count, system, logger, [*points, checkpoints, timer, *reporters])
        _fit(trainer, system, data, resumable(home))
        measures = checkpoints.final(trainer)
        steps = trainer.global_step if options["max_seconds"] else steps
    if ranks.is_first():
        about = card(experiment, name, timer.seconds, measures, steps)
        for each in points:
            about |= each.card()
        weights.write(home / "weights.safetensors", system.trained(), about)


def _points(experiment: Config, home: Path, timer: Timer, evaluation: PointEvaluation | None) -> list[Points]:
    """The callback that measures points, where the experiment has some. ValueError without an evaluation."""
    if not point_steps(experiment):
        return []
    if evaluation is None:
        raise ValueError(
            "eval.at and eval.every measure points, for which `train` needs an evaluation; "
            "expected evaluation=sana_lab.evaluation.points.Evaluation()"
        )
    return [Points(experiment, home, timer, evaluation)]


def _yaml(experiment: Config) -> str:
    """The experiment as YAML, what came from the environment as it was written."""
    return OmegaConf.to_yaml(OmegaConf.create(interpolation.as_written(experiment)))


@contextmanager
def _lock(home: Path, name: str) -> Iterator[None]:
    """The lock of the folder, once it is free, for the first rank; the others wait for what it decides."""
    if not ranks.is_first():
        yield
        return
    lock = FileLock(home / "lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"another process trains {name} in {home.absolute()}; waiting for it", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def memory_advice(experiment: Config) -> list[str]:
    """Options that reduce the memory of training."""
    from sana_lab.bench.memory_advice import training_advice

    return training_advice(experiment)


def _fit(trainer: L.Trainer, system: System, data: DataModule, checkpoint: str | None) -> None:
    """Train from a checkpoint, or from the beginning; KeyboardInterrupt on Ctrl-C."""
    with warnings.catch_warnings():
        callbacks.silence_lightning()
        try:
            trainer.fit(system, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except SystemExit as error:  # raised by Lightning on Ctrl-C, after it removes its signal handler
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from error


def _reporters(experiment: Config, home: Path, timer: Timer, reporting: Reporting) -> list[Callback]:
    """The callbacks that show progress, and those of a training within a time."""
    options, progress = experiment["trainer"], reporting.progress
    if options["max_seconds"] is None:
        bar = callbacks.ProgressBar(options["log_every"])
        return [bar if progress is None else callbacks.ProgressReporter(progress)]
    budget, announce = TimeBudget(timer, options["max_seconds"]), reporting.announce or _announce
    announce(f"{budget.seconds:g} s from now, beginning with the preparation of the data")
    picture = ChangingPicture(experiment, home, budget, announce)
    return [budget, picture, *([] if progress is None else [BudgetReporter(budget, progress)])]


def _announce(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _trainer(
    experiment: Config, count: int, system: System, logger: Logger | None, reporters: list[Callback]
) -> L.Trainer:
    options, home = experiment["trainer"], folder(experiment)
    grid = [callbacks.SampleGrid(experiment)] if experiment["prompts"] and options["max_seconds"] is None else []
    guard = callbacks.DivergenceGuard(home, options["log_every"])
    bar = any(isinstance(r, callbacks.ProgressBar) for r in reporters)
    return L.Trainer(
        **ranks.placement(options, count),
        plugins=[CheckpointFiles(), *ranks.plugins(count)],
        max_steps=options["max_steps"],
        max_epochs=-1,
        precision=options["precision"],
        gradient_clip_val=options["gradient_clip"] if system.automatic_optimization else None,
        accumulate_grad_batches=options["accumulate"],
        accelerator=options["accelerator"],
        log_every_n_steps=options["log_every"],
        val_check_interval=options["validate_every"] * options["accumulate"],  # Lightning counts batches
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=logger or False,
        callbacks=[guard, *grid, callbacks.Termination(), *reporters],
        enable_progress_bar=bar,
        enable_model_summary=False,
        default_root_dir=home,
    )


def main(name: str, overrides: Sequence[str], dry_run: bool, evaluation: PointEvaluation | None = None) -> None:
    """`sana-lab train`: train an experiment and those it takes weights from under MLflow runs, or print it.

    `evaluation` measures the points of `eval.at` and `eval.every`.
    """
    experiment = experiments.load(name, overrides)
    check(experiment)
    if dry_run:
        specs.build("data", experiment["data"]).check_content()
        print(_yaml(experiment), end="")
        trained = "yes" if weights.trained(experiment) else "no"
        print(f"# hash {hashing.experiment_hash(experiment)}; trained: {trained}")
        return
    ranks.join(experiment["trainer"]["accelerator"])
    for prerequisite in experiments.prerequisites(experiment):
        if ranks.first(lambda: weights.ready(experiments.load(prerequisite))) is None:  # noqa: B023  (called at once)
            main(prerequisite, [], False, evaluation)
    path = ranks.first(lambda: weights.trained(experiment))
    if path is not None:
        lacks = lacking(path, experiment)
        text = "\n".join(
            [f"{name} is trained already: {path}", *([lacks] if lacks else []), _further(name, overrides, path)]
        )
    else:
        _say_other_steps(name, overrides)
        text = f"trained: {_tracked(experiment, name, evaluation)}"
    if ranks.is_first():
        print(text)


def _say_other_steps(name: str, overrides: Sequence[str]) -> None:
    """Print how to go on from the same experiment with other steps, where it is trained."""
    if ranks.is_first() and (path := _with_other_steps(name, overrides)) is not None:
        print(f"{name} is trained with other steps: {path}; this trains it anew\n{_further(name, overrides, path)}")


def _with_other_steps(name: str, overrides: Sequence[str]) -> Path | None:
    """The weights of the same experiment without an override of its steps, where it is trained."""
    others = [override for override in overrides if not override.startswith("trainer.max_steps=")]
    return weights.trained(experiments.load(name, others)) if len(others) < len(overrides) else None


def _further(name: str, overrides: Sequence[str], path: Path) -> str:
    """How to train on from finished weights: another experiment, whose trained parts begin with them."""
    trained = {tensor.partition(".")[0] for tensor in files.tensor_names(path)}
    starts = [f"system.{kind}.weights={path}" for kind in WEIGHTED if kind in trained]
    if not starts:
        return "more steps train it anew: trainer.max_steps=N"
    others = [override for override in overrides if not override.startswith("trainer.max_steps=")]
    command = shlex.join(["sana-lab", "train", name, *others, *starts, "trainer.max_steps=N"])
    return f"to train N steps more from these weights: {command}"


def _tracked(experiment: Config, name: str, evaluation: PointEvaluation | None) -> Path:
    """Train under an MLflow run, which ends as FINISHED, KILLED or FAILED."""
    store = Store(weights.HOME)
    with interrupt_on_sigterm():
        path = _train_alone(experiment, name, lambda: _recorded(store, experiment, name), Reporting(None, evaluation))
    if ranks.is_first():
        card = weights.card(path)
        print("\n".join([json.dumps(card["measured"]), *line(card)]))
    return path


@contextmanager
def _recorded(store: Store, experiment: Config, name: str) -> Iterator[Logger | None]:
    """The logger of the first rank, on the run that the model's training began, or on a new one."""
    if not ranks.is_first():
        yield None
        return
    with explaining_full_disk(store.database):
        run = _run(store, experiment, name)
    tracker = RunLogger(store, run)
    try:
        yield tracker
        with explaining_full_disk(store.database):
            tracker.finalize("success")
            store.finish(run)
    except BaseException as error:
        with suppress_storage_errors():
            tracker.finalize("failed")
            store.set_tags(run, {"sana.error": f"{type(error).__name__}: {error}"})
            store.finish(run, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


def _run(store: Store, experiment: Config, name: str) -> str:
    """The id of the model's newest run that is not finished, resumed, or of a new run."""
    model = {"sana.model": hashing.experiment_hash(experiment)}
    store.create("training")
    run = next((r.id for r in store.find("training", model) if r.status != "FINISHED"), None)
    if run is None:
        run = store.start_run("training", name, {**model, **environment.environment()})
    else:
        store.resume(run)
        store.set_tags(run, {"sana.error": "", **environment.environment()})
    store.log_params(run, interpolation.as_written(experiment))
    return run


@contextmanager
def suppress_storage_errors() -> Iterator[None]:
    """Warn where a failure cannot be recorded, so that it is not hidden by the one of the record.

    MLflow's own log of the failed write, a traceback over a hundred lines, is left out.
    """
    from mlflow.exceptions import MlflowException

    log = logging.getLogger("mlflow.store.db.utils")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except (MlflowException, OSError) as error:
        warnings.warn(f"the run keeps its status, as MLflow cannot write: {first_line(error)}", stacklevel=3)
    finally:
        log.setLevel(before)


@contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM within the block, as on Ctrl-C. Signals are those of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
