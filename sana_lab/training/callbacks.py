"""Lightning callbacks: progress, divergence guard, timing, sample grids."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from torch import Tensor

from sana_lab.config import schema
from sana_lab.systems import System
from sana_lab.training.resume import latest

Progress = Callable[[int, int], None]


class Diverged(RuntimeError):
    """The loss is no longer a number."""


def quiet() -> None:
    """Silence what Lightning says of choices made here on purpose."""
    for message in (
        ".*does not have many workers.*",
        ".*IterableDataset.*__len__.*",
        ".*Checkpoint directory.*exists.*",
        ".*GPU available but not used.*",
        ".*LeafSpec.*",
        ".*max_epochs.*",
        ".*litlogger.*",
        ".*isinstance.treespec.*",
        ".*in eval mode at the start of training.*",
        ".*have no `validation_step`.*",
        ".*no pre-optimization state was saved.*",
    ):
        warnings.filterwarnings("ignore", message=message)


class Guard(Callback):
    """Stops when loss or weights are NaN or infinite, naming the step and the last good checkpoint.

    The loss is looked at `every` so many steps, the weights before each checkpoint: what is written is good.
    """

    def __init__(self, home: Path, every: int) -> None:
        self.home, self.every = home, every

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if index % self.every and trainer.global_step < trainer.max_steps:
            return
        loss = outputs["loss"] if isinstance(outputs, dict) else trainer.callback_metrics.get("train/loss")
        if isinstance(loss, Tensor) and not loss.isfinite().all():
            raise self._diverged(f"the loss is {float(loss)}", trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check_weights(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._check_weights(trainer, module)

    def _check_weights(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        odd = next((name for name, p in module.named_parameters() if not p.isfinite().all()), None)
        if odd is not None:
            raise self._diverged(f"{odd} is not finite", trainer)

    def _diverged(self, what: str, trainer: L.Trainer) -> Diverged:
        return Diverged(
            f"{what} at step {trainer.global_step}; last good checkpoint: {latest(self.home) or 'none yet'}; "
            "try a lower learning rate or gradient clip"
        )


class Clock(Callback):
    """Counts the seconds of training, those before a resume too, as far as the checkpoint knows of them."""

    def __init__(self) -> None:
        self.before, self.began = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.began

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["seconds"]


class Report(Callback):
    """Tells `progress` how far training is."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step % 10 == 0 or trainer.global_step == trainer.max_steps:
            self.progress(trainer.global_step, trainer.max_steps)


class Bar(RichProgressBar):
    """Lightning's bar with the loss of every so many steps: for that of each the host would wait for the device."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self.shown = every, {"loss": float("nan")}

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None and trainer.global_step % self.every == 0:
            self.shown = {"loss": float(loss)}
        return {**super().get_metrics(trainer, pl_module), **self.shown}


class SampleGrid(Callback):
    """Draws the experiment's prompts with averaged weights at every validation; same noise each time."""

    def __init__(self, experiment: schema.Config) -> None:
        self.experiment = experiment

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        log = getattr(trainer.logger, "log_image", None)
        if log is None or not trainer.is_global_zero:
            return
        assert isinstance(module, System)
        images = module.preview(self.experiment)
        if images is not None:
            log("samples", side_by_side(images), trainer.global_step)


def side_by_side(images: Tensor, gap: int = 2) -> Tensor:
    """(B, 3, H, W) uint8 -> one row (3, H, B (W + gap))."""
    padded = torch.nn.functional.pad(images, (0, gap), value=255)
    return torch.cat(list(padded), -1)
