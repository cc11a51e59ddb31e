"""Checkpoints of a training run: when they are written, how, and what they hold beside Lightning's state."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from sana_lab.config import atomic_write, interpolation
from sana_lab.config.schema import Config
from sana_lab.tracking.logger import RunLogger
from sana_lab.training.callbacks import validates_now

OPTIONS = "hyper_parameters"
"""Lightning's key of a system's options in a checkpoint."""


class CheckpointFiles(TorchCheckpointIO):
    """Write a checkpoint beside its place and rename it; Lightning's own goes through the folder of temporary files,
    where a full disk leaves an empty checkpoint.

    The system's options are stored as written: what came from the environment is in no checkpoint. Training resumes
    from it; such a checkpoint alone is no model.
    """

    def __init__(self, experiment: Config) -> None:
        super().__init__()
        self.experiment = experiment

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        with atomic_write.replacing(Path(path)) as partial:
            torch.save({**checkpoint, **self._options(checkpoint)}, partial)

    def _options(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """The system's options as they were written; empty where a checkpoint has none."""
        options = checkpoint.get(OPTIONS)
        if options is None:
            return {}
        texts = self.experiment.get(interpolation.WRITTEN, [])
        return {OPTIONS: interpolation.as_written({"system": dict(options), interpolation.WRITTEN: texts})["system"]}


class Checkpoints(Checkpoint):
    """Write `step=N.ckpt` every `every` optimiser steps, after the step's validation, and when training ends.

    A checkpoint holds the measures so far. The curves up to it are flushed before it is written, so that a killed run
    that goes on from it has lost no measure and no point. The checkpoints before it are removed.
    """

    def __init__(self, home: Path, every: int, log_every: int) -> None:
        self.home, self.every, self.log_every = home, every, log_every
        self.step = 0  # of the newest checkpoint
        self.measures: dict[str, float] = {}  # of the checkpoint that training goes on from

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Log the losses of the checkpoint's step, which Lightning logs after its checkpoint."""
        points = {name: value for name, value in self.measures.items() if not name.startswith("val")}
        if points and self.step % self.log_every == 0:
            for logger in trainer.loggers:
                logger.log_metrics(points, self.step - 1)  # as Lightning counts, from 0

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self._is_due(trainer) and not validates_now(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._is_due(trainer):
            self.save(trainer)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save what is finished, so that nothing is trained again where the weights cannot be written."""
        finished = trainer.global_step >= trainer.max_steps or trainer.should_stop  # within a time
        if finished and trainer.global_step != self.step:
            self.save(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["measures"] = self.final(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.try_flush()

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.step, self.measures = checkpoint["global_step"], checkpoint.get("measures", {})

    def final(self, trainer: L.Trainer) -> dict[str, float]:
        """The newest value of every measure, of this process or of the one that was killed."""
        return {**self.measures, **{name: float(value) for name, value in trainer.callback_metrics.items()}}

    def _is_due(self, trainer: L.Trainer) -> bool:
        """At the last step training is not finished before its end, where a system may still change its weights."""
        step = trainer.global_step
        return not trainer.sanity_checking and step % self.every == 0 and step not in (self.step, trainer.max_steps)

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint of this step, and remove those before it."""
        path = self.home / f"step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        self.step = trainer.global_step
        if trainer.is_global_zero:
            for old in (*self.home.glob("*.ckpt"), *self.home.glob(".*.partial")):
                if old != path:
                    old.unlink(missing_ok=True)
