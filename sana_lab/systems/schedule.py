"""Learning rates as functions of the step, so that nothing but the step has to be restored."""

import lightning as L


def set_rate(trainer: L.Trainer, warmup: int, decay: float) -> None:
    """Give every parameter group the rate of this step."""
    for own in trainer.optimizers:
        for group in own.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * factor(trainer.global_step, trainer.max_steps, warmup, decay)


def factor(step: int, steps: int, warmup: int, decay: float) -> float:
    """Linear warm-up over `warmup` steps, then constant, then linear to zero over the last share `decay`."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    last = decay * steps
    fall = min(1.0, (steps - step) / last) if last > 0 and steps > 0 else 1.0
    return rise * max(fall, 0.0)
