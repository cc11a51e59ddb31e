"""Training within a time, before the user's eyes: its end, its progress, and a picture that changes on the way.

The number of steps depends on the machine and on what else runs there, so such a training does not repeat to the bit.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from sana_lab.config.schema import Config
from sana_lab.systems import System
from sana_lab.systems.sharding import is_sharded
from sana_lab.training import PICTURE, ranks, tenths
from sana_lab.training.callbacks import Progress, Timer, image_row

INTERVAL = 15.0
"""Seconds between two rows of the picture."""

Announce = Callable[[str], None]
"""Takes a line that the user reads while training."""


class TimeBudget(Callback):
    """End training after `seconds`; the system's learning rate decays over the last share of them.

    They begin with the preparation of the data, go on after a resume, and count sample grids, but no points of curves:
    they are those of the card. Of several ranks the clock of the first one counts, which the others get before the
    first batch and after each: all have the same learning rate, and end after the same batch.
    """

    def __init__(self, timer: Timer, seconds: float) -> None:
        self.timer, self.seconds = timer, seconds
        self.agreed: float | None = None  # seconds by the first of several ranks

    @property
    def passed(self) -> float:
        """Seconds that have passed, of several ranks at the end of the last batch."""
        return self.timer.seconds if self.agreed is None else self.agreed

    @property
    def share(self) -> float:
        """Share of the time that has passed, at most 1."""
        return min(1.0, self.passed / self.seconds)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """RuntimeError where the preparation of the data has taken all the time."""
        assert isinstance(module, System)
        module.elapsed = self.elapsed
        self._agree()
        if self.share >= 1 and not trainer.global_step:
            raise RuntimeError(
                f"trainer.max_seconds is {self.seconds:g}, and preparing the data took {self.passed:.0f} s: no "
                "step is left; expected more, or data that are prepared: run it again"
            )
        self._stop_in_time(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._agree()
        self._stop_in_time(trainer)

    def elapsed(self) -> float:
        """The share that has passed, as the system asks for it."""
        return self.share

    def _agree(self) -> None:
        if ranks.launched():
            self.agreed = ranks.first(lambda: self.timer.seconds)

    def _stop_in_time(self, trainer: L.Trainer) -> None:
        if self.share >= 1:
            trainer.should_stop = True

    def line(self, trainer: L.Trainer) -> str:
        """Where training is: time, time left, step and loss."""
        seconds, loss = min(self.passed, self.seconds), trainer.callback_metrics.get("train/loss")
        text = f"{seconds:.0f} of {self.seconds:g} s, {self.seconds - seconds:.0f} s left, step {trainer.global_step}"
        return text if loss is None else f"{text}, loss {float(loss):.3f}"


class BudgetReporter(Callback):
    """Call `progress` with tenths of seconds and a line, every ten steps and after the last."""

    def __init__(self, budget: TimeBudget, progress: Progress) -> None:
        self.budget, self.progress = budget, progress

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_global_zero and (trainer.global_step % 10 == 0 or trainer.should_stop):
            total = tenths(self.budget.seconds)
            self.progress(round(self.budget.share * total), total, self.budget.line(trainer))


class ChangingPicture(Callback):
    """Announce where training is and write samples of the averaged weights every `INTERVAL` seconds.

    The samples are of the experiment's prompts, in one picture with a row for each time, from the same noise. The first
    row is before the first step, the last after training. The newest row goes to MLflow too.
    """

    def __init__(self, experiment: Config, home: Path, budget: TimeBudget, announce: Announce) -> None:
        self.experiment, self.path, self.budget, self.announce = experiment, home / PICTURE, budget, announce
        self.rows: dict[str, Tensor] = {}
        self.due = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._add_row(trainer, module)
        if self.rows:
            self.announce(f"a picture that changes every {INTERVAL:.0f} s: {self.path}")

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self.budget.passed >= self.due and not trainer.should_stop:
            self._add_row(trainer, module)
            self.announce(self.budget.line(trainer))

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._add_row(trainer, module)

    def _add_row(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        from sana_lab.report import grids
        from sana_lab.training.points import undisturbed

        assert isinstance(module, System)
        seconds = self.budget.passed
        self.due = (seconds // INTERVAL + 1) * INTERVAL
        if not self.experiment["prompts"] or not (trainer.is_global_zero or is_sharded(module)):
            return  # the ranks of a sharded system sample together
        with undisturbed(module, self.experiment):
            images = module.preview(self.experiment)
        if images is None or not trainer.is_global_zero:
            return
        self.rows[f"{seconds:.0f} s, step {trainer.global_step}"] = images.cpu()
        grids.grid(self.rows, self.experiment["prompts"], self.path)
        if (log := getattr(trainer.logger, "log_image", None)) is not None:  # other loggers of Lightning have none
            log("samples", image_row(images, self.experiment["prompts"]), trainer.global_step)
