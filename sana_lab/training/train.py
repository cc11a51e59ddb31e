"""The verb `train`: one experiment to a model folder that its hash names, resumed where it stopped."""

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
from sana_lab.checkpoints import weights
from sana_lab.config import experiments, hashing, schema, specs
from sana_lab.config.paths import check_folder
from sana_lab.costs.out_of_memory import advise_on_out_of_memory
from sana_lab.systems import System
from sana_lab.systems.compile import compile_blocks
from sana_lab.tracking.logger import RunLogger
from sana_lab.tracking.store import Store
from sana_lab.training.callbacks import Bar, Clock, Guard, Progress, Report, SampleGrid, quiet
from sana_lab.training.checks import check
from sana_lab.training.resume import resumable


def folder(experiment: schema.Config) -> Path:
    return weights.HOME / "models" / hashing.experiment_hash(experiment)


def train(
    experiment: schema.Config,
    *,
    name: str = "experiment",
    logger: Logger | None = None,
    progress: Progress | None = None,
) -> Path:
    """Train (or finish training) an experiment; its weights file. One that is trained already returns at once.

    A second process that asks for the same model says so and waits for the first.
    """
    home = folder(experiment)
    check_folder(home)
    with _alone(home, name):
        done = weights.trained(experiment)
        with advise_on_out_of_memory(lambda: memory_advice(experiment)):
            return done or _fit(experiment, home, name, logger, progress)


def memory_advice(experiment: schema.Config) -> list[str]:
    """Options that lower the memory of training."""
    from sana_lab.bench.memory_advice import training_advice

    return training_advice(experiment)


def _alone(home: Path, name: str) -> AcquireReturnProxy:
    """The folder's lock, once it is free."""
    lock = FileLock(home / "lock")
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        print(f"another process trains {name} in {home.absolute()}; waiting for it", file=sys.stderr, flush=True)
        return lock.acquire()


def _fit(experiment: schema.Config, home: Path, name: str, logger: Logger | None, progress: Progress | None) -> Path:
    options = experiment["trainer"]
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    L.seed_everything(experiment["seed"], verbose=False)
    (home / "experiment.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(experiment)))
    data = specs.build("data", experiment["data"])
    system: System = specs.build("system", experiment["system"])
    if options["compile"]:
        compile_blocks(system.dit)
    clock = Clock()
    if options["max_steps"] > 0:
        start = resumable(home)
        trainer = _trainer(experiment, system, home, logger, progress, clock)
        with warnings.catch_warnings():
            quiet()
            try:
                trainer.fit(system, datamodule=data, ckpt_path=start, weights_only=True)
            except SystemExit as error:  # what Lightning makes of Ctrl-C, which it then switches off
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt from error
    path = home / "weights.safetensors"
    weights.write(path, system.trained(), card(experiment, name, clock.seconds, metrics(system)))
    return path


def metrics(system: System) -> dict[str, float]:
    found = system._trainer.callback_metrics if system._trainer else {}
    return {k: float(v) for k, v in found.items()}


def card(experiment: schema.Config, name: str, seconds: float, measured: dict[str, float]) -> dict[str, Any]:
    """What a weights file says of itself."""
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
        "measured": measured,
        "environment": environment.environment(),
    }


def _trainer(
    experiment: schema.Config,
    system: System,
    home: Path,
    logger: Logger | None,
    progress: Progress | None,
    clock: Clock,
) -> L.Trainer:
    options = experiment["trainer"]
    keep = ModelCheckpoint(
        home, filename="{step}", every_n_train_steps=options["checkpoint_every"], enable_version_counter=False
    )
    callbacks: list[Callback] = [keep, Guard(home, options["log_every"]), clock]
    if experiment["prompts"]:
        callbacks.append(SampleGrid(experiment))
    callbacks.append(Report(progress) if progress is not None else Bar(options["log_every"]))
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
        callbacks=callbacks,
        enable_progress_bar=progress is None,
        enable_model_summary=False,
        default_root_dir=home,
    )


def main(name: str, overrides: Sequence[str], dry_run: bool) -> None:
    """`sana-lab train`: print the resolved experiment, or train it under an MLflow run."""
    experiment = experiments.load(name, overrides)
    check(experiment)
    if dry_run:
        print(OmegaConf.to_yaml(OmegaConf.create(experiment)), end="")
        print(
            f"# hash {hashing.experiment_hash(experiment)}; trained: {'yes' if weights.trained(experiment) else 'no'}"
        )
        return
    for needed in experiments.needed(experiment):
        required = experiments.load(needed)
        if weights.ready(required) is None:
            main(needed, [], False)
    if (done := weights.trained(experiment)) is not None:
        print(f"{name} is trained already: {done}")
        return
    print(f"trained: {_tracked(experiment, name)}")


def _tracked(experiment: schema.Config, name: str) -> Path:
    """Train under a run of its own, which ends as FINISHED, KILLED or FAILED."""
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
