"""Guard against divergence: loss and weights are watched, and training may return to its last good checkpoint.

A return skips the batches since that checkpoint, as in PaLM's training (arXiv 2204.02311, section 5.1): their data and
noise are not seen again, and learning rate, optimiser and steps stay as they are in the checkpoint.
"""

import math
import sys
from collections.abc import Mapping
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
        due = self._is_due(trainer, index)
        if isinstance(loss, Tensor) and (due or self.limits.spike):
            loss = mean_over_ranks(loss.detach().float(), trainer)  # one decision, and one cause
            if self.limits.spike:
                self._watch(loss, self.limits.spike)
        if not due:
            return
        if isinstance(loss, Tensor) and not loss.isfinite().all():
            raise self._diverged(f"the loss is {float(loss)}", trainer)
        self._check_spikes(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check_spikes(trainer)
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
        """Compare a loss with the mean of the finite losses before it, on the device. One that is not finite is an
        infinite spike from the first batch on."""
        finite = loss.isfinite()
        mean = loss.nan_to_num(posinf=0.0, neginf=0.0) if self.mean is None else self.mean.to(loss.device)
        ratio = loss / mean if self.batches >= SETTLED else torch.zeros_like(loss)
        spike = torch.where(finite & ~(ratio > limit), 0.0, torch.where(finite, ratio, math.inf))
        self.spiked = spike if self.spiked is None else torch.maximum(self.spiked, spike)
        self.batches += 1
        self.mean = torch.where(finite, mean.lerp(loss, max(1 - DECAY, 1 / self.batches)), mean)

    def _is_due(self, trainer: L.Trainer, index: int) -> bool:
        step, before_checkpoint = trainer.global_step, self.limits.checkpoint_every
        saves = self.limits.spike is not None and before_checkpoint and step % before_checkpoint == 0
        return not index % self.every or step >= trainer.max_steps or bool(saves)

    def _check_spikes(self, trainer: L.Trainer) -> None:
        """`Diverged` if a loss since the training began was a spike; the same on every rank."""
        ratio = 0.0 if self.spiked is None else float(self.spiked)
        if ratio:
            times = f"the loss was {ratio:.1f} times its running mean"
            raise self._diverged(times if math.isfinite(ratio) else "the loss was not finite", trainer)

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


def return_to_checkpoint(guard: DivergenceGuard, error: Diverged, options: Config, clocks: Mapping[str, Timer]) -> bool:
    """Prepare the last checkpoint for a training that goes on behind the batches that diverged; whether it may.

    `clocks`, by their keys in the checkpoint, go on: the time of what diverged counts.

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
    states = checkpoint["callbacks"]  # those of a parent's checkpoint are without the guard's and the clocks'
    guard_state = states.setdefault(guard.state_key, {"mean": None, "batches": 0})
    guard_state["events"] = [*guard.events, event]
    states.update({key: clock.state_dict() for key, clock in clocks.items()})
    with replacing(Path(path)) as partial:
        torch.save(checkpoint, partial)
    if ranks.is_first():
        print(
            f"sana-lab: {error}\nreturn {len(guard_state['events'])} of at most {guard.limits.returns}: training goes "
            f"on from step {event['from']}, and {skipped} batches are skipped",
            file=sys.stderr,
        )
    return True


def mean_over_ranks(loss: Tensor, trainer: L.Trainer) -> Tensor:
    """The mean of a scalar over the ranks of a training, on its device."""
    if trainer.world_size == 1:
        return loss
    mean: Tensor = trainer.strategy.reduce(loss.clone(), reduce_op="mean")  # in place
    return mean
