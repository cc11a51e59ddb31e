"""Lightning callbacks: training time, progress, sample grids."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import Callback, RichProgressBar
from torch import Tensor

from sana_lab.config.schema import Config
from sana_lab.systems import System
from sana_lab.systems.sharding import is_sharded
from sana_lab.training.terminated import Terminated

if TYPE_CHECKING:
    from PIL.Image import Image

Progress = Callable[..., None]
"""Called with the number of finished optimiser steps, the total and a line of text; of a training within a time, with
tenths of seconds instead of steps."""


class Termination(Callback):
    """Save a checkpoint and raise `Terminated` after the step in which SIGTERM comes, or after its validation.

    Only where the process handles SIGTERM itself, as the verb does; else it keeps what the signal does, where Lightning
    would end the batch first. Several ranks ask each other every `every` steps.
    """

    def __init__(self, save: Callable[[L.Trainer], None], every: int) -> None:
        self.save, self.every = save, every
        self.handler = signal.getsignal(signal.SIGTERM)
        self.requested = False
        self.step = 0  # of the last batch

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.step = trainer.global_step
        if callable(self.handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._request)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        stepped, self.step = trainer.global_step != self.step, trainer.global_step
        if stepped and not validates_now(trainer):
            self._end_if_requested(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._end_if_requested(trainer)

    def _request(self, *_: object) -> None:
        self.requested = True

    def _end_if_requested(self, trainer: L.Trainer) -> None:
        if trainer.world_size > 1:
            if trainer.global_step % self.every:
                return
            self.requested = trainer.strategy.reduce_boolean_decision(self.requested, all=False)
        if self.requested and trainer.global_step < trainer.max_steps:
            self.save(trainer)
            raise Terminated


def validates_now(trainer: L.Trainer) -> bool:
    """Whether Lightning validates after this batch."""
    loop: Any = trainer.fit_loop.epoch_loop
    return (
        trainer.enable_validation
        and sum(trainer.num_val_batches) > 0
        and (loop.total_batch_idx + 1) % int(trainer.val_check_batch or 1) == 0
    )


class Pause:
    """A stretch of time that is no training."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since its beginning."""
        return time.perf_counter() - self.start


class Timer(Callback):
    """Seconds of training, including those before a resume (stored in the checkpoint), without pauses."""

    state_key = "Clock"  # the key of earlier checkpoints

    def __init__(self) -> None:
        self.before, self.start = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.start

    @contextmanager
    def paused(self) -> Iterator[Pause]:
        """Context whose time does not count."""
        pause = Pause()
        try:
            yield pause
        finally:
            self.start += pause.seconds

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["seconds"]


class ProgressReporter(Callback):
    """Call `progress` every ten steps and after the last, with the loss and the time that is left of this training.

    The loss is read every `every` steps, because reading it synchronises host and device.
    """

    def __init__(self, progress: Progress, every: int = 10, now: Callable[[], float] = time.monotonic) -> None:
        self.progress, self.every, self.now = progress, every, now
        self.loss: float | None = None
        self.began: tuple[int, float] | None = None  # the first step of this process, and when it ended

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        step, steps = trainer.global_step, trainer.max_steps
        self.began = self.began or (step, self.now())
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None and step % self.every == 0:
            self.loss = float(loss)
        if (step % 10 == 0 or step == steps) and trainer.is_global_zero:
            self.progress(step, steps, self.line(step, steps))

    def line(self, step: int, steps: int) -> str:
        """Step, loss, and the time left at the mean rate since the first step of this process."""
        loss = "" if self.loss is None else f", loss {self.loss:.3f}"
        done, seconds = (0, 0.0) if self.began is None else (step - self.began[0], self.now() - self.began[1])
        left = f", {seconds / done * (steps - step):.0f} s left" if done > 0 else ""
        return f"step {step} of {steps}{loss}{left}"


class ProgressBar(RichProgressBar):
    """Lightning's bar over the optimiser steps of the whole training, with the loss every `every` steps, because
    reading it synchronises host and device.

    Lightning's own counts batches of an epoch against the steps that are left: wrong after a resume, where batches are
    skipped, and where a step is of several batches.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self.loss = every, float("nan")

    @property
    def total_train_batches(self) -> int:
        """The length of the bar."""
        return self.trainer.max_steps

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None and trainer.global_step % self.every == 0:
            self.loss = float(loss)
        return {**super().get_metrics(trainer, pl_module), "loss": self.loss}


class SampleGrid(Callback):
    """Log the system's preview of the experiment's prompts at every validation."""

    def __init__(self, experiment: Config) -> None:
        self.experiment = experiment

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, System)
        log = getattr(trainer.logger, "log_image", None)  # other loggers of Lightning have none
        logs = trainer.is_global_zero and log is not None
        if is_sharded(module):  # all ranks sample, as each needs the shards of the others
            logs = trainer.strategy.broadcast(logs)
        images = module.preview(self.experiment) if logs else None
        if images is not None and log is not None and trainer.is_global_zero:
            log("samples", image_row(images, self.experiment["prompts"]), trainer.global_step)


def image_row(images: Tensor, prompts: Sequence[str] = ()) -> "Tensor | Image":
    """One row of (B, 3, H, W) uint8, with a prompt above each image where there are as many; else (3, H + 4, B (W + 2)
    + 2) with white gaps."""
    from torchvision.utils import make_grid

    if len(prompts) == len(images):
        from sana_lab.report.grids import captioned

        return captioned(images, prompts)
    return make_grid(images, nrow=len(images), padding=2, pad_value=255)
