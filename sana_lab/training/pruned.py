"""The end of a training that a judge prunes, by its validation loss or its points."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import Callback

from sana_lab.training import VALIDATION

if TYPE_CHECKING:
    from sana_lab.training.points import Points


class Pruned(RuntimeError):
    """A training was ended by its judge, at a step and a value."""

    def __init__(self, step: int, value: float) -> None:
        super().__init__(step, value)
        self.step, self.value = step, value

    def __str__(self) -> str:
        return f"pruned at step {self.step}, with {self.value:.4g}"


class Judge(NamedTuple):
    """What ends a training early."""

    metric: str  # VALIDATION, or a column of points
    stops: Callable[[int, float], bool]  # of step and value; called by the first rank alone


class Judgement(Callback):
    """Raise `Pruned`, on every rank, where the judge stops the training at a validation, or at a point of `points`."""

    def __init__(self, judge: Judge, points: "Sequence[Points]") -> None:
        self.judge, self.points = judge, points
        self.point = 0  # step of the newest point that was judged

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.judge.metric != VALIDATION or trainer.sanity_checking:
            return
        values = trainer.callback_metrics
        if "val/loss" not in values:
            raise ValueError(
                f"the search prunes by {VALIDATION}, and {type(module).__name__} logs no val/loss; it logs "
                f"{', '.join(name for name in values if name.startswith('val')) or 'nothing at validations'}"
            )
        self._judge(trainer, float(values["val/loss"]))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.judge.metric == VALIDATION:
            return
        for points in (each.points for each in self.points):
            if points and points[-1].step == trainer.global_step != self.point:
                self.point = trainer.global_step
                self._judge(trainer, self._value(points[-1].values))

    def _value(self, values: dict[str, Any]) -> float:
        if self.judge.metric not in values:
            raise ValueError(
                f"the search prunes by {self.judge.metric!r}, which points do not have; they have {', '.join(values)}"
            )
        return float(values[self.judge.metric]["value"])

    def _judge(self, trainer: L.Trainer, value: float) -> None:
        step = trainer.global_step
        stops = trainer.is_global_zero and self.judge.stops(step, value)
        if trainer.strategy.broadcast(stops):
            raise Pruned(step, value)
