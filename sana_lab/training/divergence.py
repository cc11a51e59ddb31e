"""Guard against divergence: loss and weights are watched, and training may return to its last good checkpoint.

A return skips the batches since that checkpoint, as in PaLM's training (arXiv 2204.02311, section 5.1): their data and
noise are not seen again, and learning rate, optimiser and steps stay as they are in the checkpoint.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from sana_lab.checkpoints import files
from sana_lab.config.atomic_write import replacing
from sana_lab.config.schema import Config
from sana_lab.training import ranks
from sana_lab.training.callbacks import Timer
from sana_lab.training.resume import latest

DECAY = 0.98
"""Of the running mean of the loss that a spike is compared with."""

SETTLED = 50
"""Batches before the first loss that can be a spike."""


class Diverged(RuntimeError):
    """The loss or a weight is NaN or infinite, or the loss is a spike."""


class Limits(NamedTuple):
    """What the guard reacts to, and how (`trainer.spike`, `trainer.returns`)."""

    spike: float | None = None  # a loss above so many times its running mean; None is any finite loss
    returns: int = 0  # most returns to a checkpoint
    checkpoint_every: int = 0  # optimiser steps between checkpoints, before which the loss is looked at too

    @classmethod
    def of(cls, trainer: Config) -> "Limits":
        """Those of an experiment's `trainer:`."""
        return cls(trainer["spike"], trainer["returns"], trainer["checkpoint_every"])


NONE = Limits()


class DivergenceGuard(Callback):
    """Raise `Diverged`, with the step and the last good checkpoint, if loss or weights are NaN or infinite, or the loss
    is a spike.

    The loss is looked at every `every` batches, because that synchronises host and device; spikes between are noted on
    the device. The weights are checked before each checkpoint and at the end, so that written weights are finite.
    """

    state_key = "DivergenceGuard"

    def __init__(self, home: Path, every: int, limits: Limits = NONE) -> None:
        self.home, self.every, self.limits = home, every, limits
        self.mean: Tensor | None = None  # of the loss
        self.batches = 0  # that the mean is over
        self.spiked: Tensor | None = None  # the largest ratio of a loss to its mean that was a spike
        self.events: list[dict[str, Any]] = []  # returns to a checkpoint so far
        self.event: dict[str, Any] = {}  # the divergence that ended the training

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Log the returns so far; write a checkpoint to return to, where there is none."""
        if self.events:
            for logger in trainer.loggers:
                logger.log_metrics({"train/returns": len(self.events)}, trainer.global_step)
        if self.limits.returns and not trainer.global_step:
            trainer.save_checkpoint(self.home / "step=0.ckpt", weights_only=False)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        loss = trainer.callback_metrics.get("train/loss") if loss is None else loss  # of steps by hand
        if self.limits.spike and isinstance(loss, Tensor):
            self._watch(loss.detach().float(), self.limits.spike)
        if not self._is_due(trainer, index):
            return
        finite = not isinstance(loss, Tensor) or bool(loss.isfinite().all())
        ratio = 0.0 if self.spiked is None else float(self.spiked)
        if trainer.strategy.reduce_boolean_decision(finite and not ratio):  # all ranks stop, where one must
            return
        spike = f"the loss was {ratio:.1f} times its running mean"
        raise self._diverged(spike if finite and ratio else f"the loss is {_number(loss)}", trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check_weights(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._check_weights(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        mean = None if self.mean is None else self.mean.item()
        return {"mean": mean, "batches": self.batches, "events": self.events}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        mean = state_dict["mean"]
        self.mean = None if mean is None else torch.tensor(mean)
        self.batches, self.events = state_dict["batches"], state_dict["events"]

    def card(self) -> dict[str, Any]:
        """What a weights file says of the returns; nothing without one."""
        return {"returns": self.events} if self.events else {}

    def _watch(self, loss: Tensor, limit: float) -> None:
        """Compare a loss with the mean of those before it, on the device."""
        mean = loss.clone() if self.mean is None else self.mean.to(loss.device)
        if self.batches >= SETTLED:
            ratio = loss / mean
            spike = torch.where(ratio > limit, ratio, 0.0)
            self.spiked = spike if self.spiked is None else torch.maximum(self.spiked, spike)
        self.batches += 1
        self.mean = mean.lerp(loss, max(1 - DECAY, 1 / self.batches))

    def _is_due(self, trainer: L.Trainer, index: int) -> bool:
        step, before_checkpoint = trainer.global_step, self.limits.checkpoint_every
        saves = self.limits.spike is not None and before_checkpoint and step % before_checkpoint == 0
        return not index % self.every or step >= trainer.max_steps or bool(saves)

    def _check_weights(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        name = next((name for name, p in module.named_parameters() if not p.isfinite().all()), None)
        if name is not None:
            raise self._diverged(f"{name} is not finite", trainer)

    def _diverged(self, cause: str, trainer: L.Trainer) -> Diverged:
        after = f" after {len(self.events)} returns to a checkpoint" if self.events else ""
        batch = trainer.fit_loop.epoch_loop.total_batch_idx
        self.event = {"cause": cause, "step": trainer.global_step, "batch": batch}
        return Diverged(
            f"{cause} at step {trainer.global_step}{after}; last good checkpoint: {latest(self.home) or 'none yet'}; "
            "try a lower learning rate or gradient clip"
        )


def return_to_checkpoint(guard: DivergenceGuard, error: Diverged, options: Config, timer: Timer) -> bool:
    """Prepare the last checkpoint for a training that goes on behind the batches that diverged; whether it may.

    The checkpoint is rewritten, so that a return counts although the process may be killed before the next one. A
    multiple of `trainer.validate_every` steps' batches is skipped, so that validations stay where they are.
    """
    path = latest(guard.home)
    if path is None or len(guard.events) >= guard.limits.returns:
        return False
    checkpoint = files.read_torch(Path(path))
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    period = options["validate_every"] * options["accumulate"]
    behind = guard.event["batch"] + 1 - progress["total"]["processed"]
    skipped = -(-max(behind, 1) // period) * period
    for counts in (progress["total"], progress["current"]):
        counts.update({name: counts[name] + skipped for name in ("ready", "started", "processed", "completed")})
    event = {**guard.event, "from": checkpoint["global_step"], "skipped": skipped}
    guard_state, timer_state = (checkpoint["callbacks"][c.state_key] for c in (guard, timer))
    guard_state["events"] = [*guard.events, event]
    timer_state.update(timer.state_dict())
    with replacing(Path(path)) as partial:
        torch.save(checkpoint, partial)
    if ranks.is_first():
        print(
            f"sana-lab: {error}\nreturn {len(guard_state['events'])} of at most {guard.limits.returns}: training goes "
            f"on from step {event['from']}, and {skipped} batches are skipped",
            file=sys.stderr,
        )
    return True


def _number(loss: Any) -> float:
    """This rank's loss; NaN where it is that of another rank that stops the training."""
    return float("nan") if loss is None else float(loss)
