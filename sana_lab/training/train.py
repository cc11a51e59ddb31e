"""Command `sana-lab train`: train or resume an experiment; its folder is named by its hash."""

import json
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf

from sana_lab import environment
from sana_lab.checkpoints import files, weights
from sana_lab.config import experiments, hashing, specs
from sana_lab.config.paths import check_folder
from sana_lab.config.registry import WEIGHTED
from sana_lab.config.schema import Config
from sana_lab.costs.out_of_memory import advise_on_out_of_memory
from sana_lab.data import DataModule
from sana_lab.systems import System
from sana_lab.systems.compile import compile_blocks
from sana_lab.tracking.logger import RunLogger
from sana_lab.tracking.store import Store
from sana_lab.training import callbacks
from sana_lab.training.callbacks import Progress
from sana_lab.training.checks import check
from sana_lab.training.resume import resumable


def folder(experiment: Config) -> Path:
    """Output folder of an experiment: checkpoints, weights, the resolved experiment."""
    return weights.HOME / "models" / hashing.experiment_hash(experiment)


def train(
    experiment: Config, *, name: str = "experiment", logger: Logger | None = None, progress: Progress | None = None
) -> Path:
    """Train an experiment or resume its training, and return its weights file; returns at once if already trained.

    A second process that trains the same model prints a message and waits for the first. `Diverged` if the loss is not
    finite; `OutOfMemory` with advice on options that need less memory.
    """
    home = folder(experiment)
    check_folder(home)
    with _lock(home, name), advise_on_out_of_memory(lambda: memory_advice(experiment)):
        return weights.trained(experiment) or _train(experiment, name, home, logger, progress)


def _train(experiment: Config, name: str, home: Path, logger: Logger | None, progress: Progress | None) -> Path:
    options, timer = experiment["trainer"], callbacks.Timer()
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    L.seed_everything(experiment["seed"], verbose=False)
    (home / "experiment.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(experiment)))
    data: DataModule = specs.build("data", experiment["data"])
    system: System = specs.build("system", experiment["system"])
    if options["compile"]:
        compile_blocks(system.part("dit"))
    metrics: dict[str, float] = {}
    if options["max_steps"] > 0:
        trainer = _trainer(experiment, system, home, logger, [timer, *_progress(options, progress)])
        _fit(trainer, system, data, resumable(home))
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    path = home / "weights.safetensors"
    weights.write(path, system.trained(), card(experiment, name, timer.seconds, metrics))
    return path


def _lock(home: Path, name: str) -> AcquireReturnProxy:
    """The lock of the folder, once it is free."""
    lock = FileLock(home / "lock")
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        print(f"another process trains {name} in {home.absolute()}; waiting for it", file=sys.stderr, flush=True)
        return lock.acquire()


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


def card(experiment: Config, name: str, seconds: float, metrics: dict[str, float]) -> dict[str, Any]:
    """Metadata of a weights file about its training."""
    command = shlex.join(["sana-lab", *sys.argv[1:]]) if Path(sys.argv[0]).stem in ("sana-lab", "__main__") else None
    return {
        "experiment": name,
        "hash": hashing.experiment_hash(experiment),
        "config": experiment,
        "command": command,
        "seed": experiment["seed"],
        "steps": experiment["trainer"]["max_steps"],
        "seconds": round(seconds, 1),
        "date": time.strftime("%Y-%m-%d"),
        "measured": metrics,
        "environment": environment.environment(),
    }


def _progress(options: Config, progress: Progress | None) -> list[Callback]:
    return [callbacks.ProgressBar(options["log_every"]) if progress is None else callbacks.ProgressReporter(progress)]


def _trainer(
    experiment: Config, system: System, home: Path, logger: Logger | None, reporters: list[Callback]
) -> L.Trainer:
    options = experiment["trainer"]
    checkpoints = ModelCheckpoint(
        home, filename="{step}", every_n_train_steps=options["checkpoint_every"], enable_version_counter=False
    )
    grid = [callbacks.SampleGrid(experiment)] if experiment["prompts"] else []
    guard = callbacks.DivergenceGuard(home, options["log_every"])
    bar = any(isinstance(r, callbacks.ProgressBar) for r in reporters)
    return L.Trainer(
        max_steps=options["max_steps"],
        max_epochs=-1,
        precision=options["precision"],
        gradient_clip_val=options["gradient_clip"] if system.automatic_optimization else None,
        accumulate_grad_batches=options["accumulate"],
        accelerator=options["accelerator"],
        devices=options["devices"],
        log_every_n_steps=options["log_every"],
        val_check_interval=options["validate_every"],
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=logger or False,
        callbacks=[checkpoints, guard, *grid, *reporters],
        enable_progress_bar=bar,
        enable_model_summary=False,
        default_root_dir=home,
    )


def main(name: str, overrides: Sequence[str], dry_run: bool) -> None:
    """`sana-lab train`: train an experiment and those it takes weights from under MLflow runs, or print it."""
    experiment = experiments.load(name, overrides)
    check(experiment)
    if dry_run:
        specs.build("data", experiment["data"]).check_content()
        print(OmegaConf.to_yaml(OmegaConf.create(experiment)), end="")
        trained = "yes" if weights.trained(experiment) else "no"
        print(f"# hash {hashing.experiment_hash(experiment)}; trained: {trained}")
        return
    for prerequisite in experiments.prerequisites(experiment):
        if weights.ready(experiments.load(prerequisite)) is None:
            main(prerequisite, [], False)
    if (path := weights.trained(experiment)) is not None:
        print(f"{name} is trained already: {path}\n{_further(name, overrides, path)}")
        return
    if (path := _with_other_steps(name, overrides)) is not None:
        print(f"{name} is trained with other steps: {path}; this trains it anew\n{_further(name, overrides, path)}")
    print(f"trained: {_tracked(experiment, name)}")


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


def _tracked(experiment: Config, name: str) -> Path:
    """Train under an MLflow run, which ends as FINISHED, KILLED or FAILED."""
    check_folder(folder(experiment))
    store = Store(weights.HOME)
    run = store.start_run(
        "training", name, {"sana.model": hashing.experiment_hash(experiment), **environment.environment()}
    )
    store.log_params(run, experiment)
    tracker = RunLogger(store, run)
    try:
        path = train(experiment, name=name, logger=tracker)
    except BaseException as error:
        tracker.finalize("failed")
        store.set_tags(run, {"sana.error": f"{type(error).__name__}: {error}"})
        store.finish(run, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    tracker.finalize("success")
    store.finish(run)
    print(json.dumps(weights.card(path)["measured"]))
    return path
