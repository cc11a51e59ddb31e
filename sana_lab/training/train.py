"""Train or resume an experiment; its folder is named by its hash. The verb is `command`."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf

from sana_lab.bench.training_memory import on_cpu
from sana_lab.checkpoints import weights
from sana_lab.config import hashing, interpolation, specs
from sana_lab.config.atomic_write import explaining_full_disk, write_text
from sana_lab.config.limits import point_steps
from sana_lab.config.paths import check_folder
from sana_lab.config.schema import Config
from sana_lab.config.specs import SpecError
from sana_lab.costs.allocator import return_freed_memory
from sana_lab.costs.out_of_memory import advise_on_out_of_memory
from sana_lab.data import DataModule
from sana_lab.systems import System
from sana_lab.systems.compile import compile_blocks
from sana_lab.systems.sharding import is_sharded
from sana_lab.training import callbacks, loggers, parent, ranks
from sana_lab.training.budget import Announce, BudgetReporter, ChangingPicture, TimeBudget
from sana_lab.training.callbacks import Progress, Timer
from sana_lab.training.card import card
from sana_lab.training.checkpointing import CheckpointFiles, Checkpoints
from sana_lab.training.checks import check_objective
from sana_lab.training.divergence import Diverged, DivergenceGuard, Limits, return_to_checkpoint
from sana_lab.training.points import PointEvaluation, Points
from sana_lab.training.pruned import Judge, Judgement
from sana_lab.training.quiet import quiet
from sana_lab.training.resume import resumable
from sana_lab.training.terminated import Terminated

Record = Callable[[], AbstractContextManager[Logger | None]]
"""Opens the record of a training: a logger for as long as it lasts."""


class Reporting(NamedTuple):
    """What a training reports to beside its logger, and with what it measures points."""

    progress: Progress | None = None
    evaluation: PointEvaluation | None = None
    announce: Announce | None = None  # of a training within a time; None prints to stderr
    judge: Judge | None = None  # ends it early


class Work(NamedTuple):
    """What one process trains with."""

    experiment: Config
    processes: int
    system: System
    data: DataModule
    logger: Logger | None
    reporting: Reporting


class Outcome(NamedTuple):
    """What a finished training leaves beside its weights."""

    seconds: float
    measures: dict[str, float]
    steps: int
    about: dict[str, Any]  # further entries of the card


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
    judge: Judge | None = None,
) -> Path:
    """Train an experiment or resume its training, and return its weights file; returns at once if already trained.

    An experiment with `eval.at` or `eval.every` needs `sana_lab.evaluation.points.Evaluation`. A training within a time
    (`trainer.max_seconds`) announces its progress in lines, on stderr if not elsewhere. `Pruned` where a judge ends the
    training early.

    Several devices are several processes, of which the first alone has the lock and the logger. A second process that
    trains the same model prints a message and waits for the first. `Diverged` if the loss is not finite, once
    `trainer.returns` are used up; `OutOfMemory` with advice on options that need less memory; `DiskFull` with the room
    that is left.
    """
    return train_alone(experiment, name, lambda: nullcontext(logger), Reporting(progress, evaluation, announce, judge))


def train_alone(experiment: Config, name: str, record: Record, reporting: Reporting) -> Path:
    """Train under the folder's lock and `record`, unless it is trained already."""
    ranks.check_available(experiment["trainer"])
    home = folder(experiment)
    check_folder(home)
    check_objective(experiment)
    ranks.join(experiment["trainer"])
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
    ranks.join(options)  # where `ranks.start` started this process
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    if saves_memory(experiment):
        return_freed_memory()
    L.seed_everything(experiment["seed"], verbose=False)
    if ranks.is_first():
        write_text(home / "experiment.yaml", as_yaml(experiment))
    data: DataModule = specs.build("data", experiment["data"])
    system: System = specs.build("system", experiment["system"])
    system.clip = options["gradient_clip"]
    if options["compile"]:
        compile_blocks(system.part("dit"))
    ancestry = parent.begin(system, experiment, home, ranks.first)
    outcome: Outcome | None = Outcome(timer.seconds, {}, options["max_steps"], {})
    if options["max_steps"] > 0:
        work = Work(experiment, count, system, data, logger, reporting)
        while (outcome := _attempt(work, timer)) is None:
            timer = callbacks.Timer()
            L.seed_everything(experiment["seed"], verbose=False)
    assert outcome is not None
    trained = system.trained() if ranks.is_first() or is_sharded(system) else {}
    if ranks.is_first():
        about = card(experiment, name, outcome.seconds, outcome.measures, outcome.steps, count)
        about |= outcome.about | ancestry
        _write_adapter(system, home)
        weights.write(home / "weights.safetensors", trained, about)


def _write_adapter(system: System, home: Path) -> None:
    """Write the adapter of a finished training alone, in diffusers' layout, where it has one. A DiT or layer that
    diffusers does not have is said in a line: the weights hold the change all the same."""
    if factors := system.adapter_factors():
        from sana_lab.pretrained import lora  # here, as it imports all formats

        try:
            lora.write(home / lora.FILE, system.part("dit"), factors)
        except SpecError as error:
            print(f"sana-lab: no {lora.FILE}, as {error}; the weights hold the change", file=sys.stderr, flush=True)


def _attempt(work: Work, timer: Timer) -> Outcome | None:
    """Train from the newest checkpoint to the end; None where it diverged and a checkpoint to return to is prepared."""
    experiment, options, home = work.experiment, work.experiment["trainer"], folder(work.experiment)
    points = _points(experiment, home, timer, work.reporting.evaluation)
    guard = DivergenceGuard(home, options["log_every"], Limits.of(options))
    checkpoints = Checkpoints(home, options["checkpoint_every"], options["log_every"])
    reporters, judge = _reporters(experiment, home, timer, work.reporting), work.reporting.judge
    judgements = [] if judge is None else [Judgement(judge, points)]
    try:
        with quiet():
            end = callbacks.Termination(checkpoints.save, options["log_every"])
            trainer = _trainer(
                work, [guard, *_grid(experiment), *points, *judgements, checkpoints, timer, *reporters, end]
            )
            _fit(trainer, work.system, work.data, ranks.first(lambda: resumable(home)))
    except Diverged as error:
        diverged = error  # the name of an exception ends with its block
        clocks = {timer.state_key: timer, **{each.state_key: each.clock for each in points}}
        if not ranks.first(lambda: return_to_checkpoint(guard, diverged, options, clocks)):
            raise
        return None
    steps = trainer.global_step if options["max_seconds"] else options["max_steps"]
    about = guard.card()
    for each in points:
        about |= each.card()
    return Outcome(timer.seconds, checkpoints.final(trainer), steps, about)


def saves_memory(experiment: Config) -> bool:
    """Whether a training on the CPU recomputes activations, and so prefers less memory to less time."""
    dit = experiment["system"].get("dit")
    return isinstance(dit, dict) and bool(dit.get("checkpointing")) and on_cpu(experiment["trainer"]["accelerator"])


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


def as_yaml(experiment: Config) -> str:
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
    """Train from a checkpoint, or from the beginning; KeyboardInterrupt on Ctrl-C, `Terminated` on SIGTERM."""
    try:
        trainer.fit(system, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as error:  # raised by Lightning on Ctrl-C, after it removes its signal handler
        signal.signal(signal.SIGINT, signal.default_int_handler)
        cause = error.__context__
        raise (cause if isinstance(cause, Terminated) else KeyboardInterrupt()) from error


def _reporters(experiment: Config, home: Path, timer: Timer, reporting: Reporting) -> list[Callback]:
    """The callbacks that show progress, and those of a training within a time."""
    options, progress = experiment["trainer"], reporting.progress
    if options["max_seconds"] is None:
        bar = callbacks.ProgressBar(options["log_every"])
        return [bar if progress is None else callbacks.ProgressReporter(progress, options["log_every"])]
    budget = TimeBudget(timer, options["max_seconds"])
    announce = (reporting.announce or _announce) if ranks.is_first() else _say_nothing
    announce(f"{budget.seconds:g} s from now, beginning with the preparation of the data")
    picture = ChangingPicture(experiment, home, budget, announce)
    return [budget, picture, *([] if progress is None else [BudgetReporter(budget, progress)])]


def _announce(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_nothing(text: str) -> None:
    """Of other ranks than the first."""


def _grid(experiment: Config) -> list[Callback]:
    """The grid of samples at each validation, where the experiment has prompts."""
    options = experiment["trainer"]
    return [callbacks.SampleGrid(experiment)] if experiment["prompts"] and options["max_seconds"] is None else []


def _trainer(work: Work, reporters: list[Callback]) -> L.Trainer:
    options, home = work.experiment["trainer"], folder(work.experiment)
    logger = [work.logger] if work.logger else []
    bar = any(isinstance(r, callbacks.ProgressBar) for r in reporters)
    return L.Trainer(
        **ranks.placement(options, work.processes),
        plugins=[CheckpointFiles(work.experiment), *ranks.plugins(work.processes)],
        max_steps=options["max_steps"],
        max_epochs=-1,
        precision=options["precision"],
        gradient_clip_val=options["gradient_clip"] if work.system.automatic_optimization else None,
        accumulate_grad_batches=options["accumulate"],
        accelerator=options["accelerator"],
        log_every_n_steps=options["log_every"],
        val_check_interval=options["validate_every"] * options["accumulate"],  # Lightning counts batches
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=[*logger, *loggers.build(options["logger"], home)] or False,
        callbacks=reporters,
        enable_progress_bar=bar,
        enable_model_summary=False,
        default_root_dir=home,
    )
