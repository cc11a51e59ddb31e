"""Optimisers from specs, and the learning rate as a function of the step, so that only the step has to be restored."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sana_lab.config import specs
from sana_lab.config.specs import Spec, SpecError, nearest


def optimizer(
    spec: Spec, pairs: Iterable[tuple[str, nn.Parameter]], system: L.LightningModule
) -> torch.optim.Optimizer:
    """Build the optimiser of a spec over named parameters.

    A class with `takes_names` gets (name, parameter) pairs, others the parameters. An option `fused` that is null
    becomes True on CUDA, equal up to rounding; not with the loss scaling of 16-mixed, as a fused step unscales the
    gradients itself, after they should be clipped. On the CPU null stays null, since the fused kernel rounds
    differently.
    """
    pairs = list(pairs)
    parameters = [p for _, p in pairs]
    resolved = specs.resolve("optimizer", spec)
    if resolved.get("fused", False) is None:
        resolved["fused"] = fused(parameters, system)
    takes_names = getattr(specs.find("optimizer", resolved["name"]), "takes_names", False)
    return specs.build("optimizer", resolved, params=pairs if takes_names else parameters)


def fused(parameters: Sequence[nn.Parameter], system: L.LightningModule) -> bool | None:
    """True if a fused kernel should step all parameters (CUDA, no loss scaling); None for torch's default."""
    trainer: Any = system._trainer
    scaled = trainer is not None and getattr(trainer.precision_plugin, "scaler", None) is not None
    return True if all(p.is_cuda for p in parameters) and not scaled else None


Groups = dict[str, dict[str, float]]
"""Pattern of parameter names, as in `fnmatch`, -> options of the optimiser for them."""


def split_groups(optimizer: torch.optim.Optimizer, groups: Groups, pairs: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Give the parameters whose names match a pattern options of their own; of several patterns the first counts.

    SpecError for a pattern that no parameter matches, and for an option that the optimiser does not have.
    """
    names = {p: name for name, p in pairs}
    for pattern, options in groups.items():
        for option in options:
            if option not in optimizer.defaults:
                raise SpecError(
                    f"system.groups {pattern!r} sets {option!r}; {nearest(option, optimizer.defaults)}: options of "
                    f"{type(optimizer).__name__}"
                )
    rest = dict(names)
    for pattern, options in groups.items():
        matching = {p for p, name in rest.items() if fnmatchcase(name, pattern)}
        if not matching:
            others = ", ".join(list(rest.values())[:3])
            raise SpecError(
                f"system.groups {pattern!r} matches no parameter; expected a pattern of names such as {others}"
            )
        rest = {p: name for p, name in rest.items() if p not in matching}
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if p in matching]
            if own:
                group["params"] = [p for p in group["params"] if p not in matching]
                optimizer.param_groups.append({**group, **options, "params": own})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


@torch.no_grad()
def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """The norm over all gradients of an optimiser's parameters, a scalar in float32; 0 without gradients."""
    gradients = [p.grad.float() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def set_learning_rate(trainer: L.Trainer, warmup: int, decay: float, elapsed: float = 0.0) -> None:
    """Set every parameter group to its initial rate times the factor of the trainer's step, or of the share of its time
    that has elapsed."""
    factor = learning_rate_factor(trainer.global_step, trainer.max_steps, warmup, decay, elapsed)
    for group in (g for optimizer in trainer.optimizers for g in optimizer.param_groups):
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * factor


def learning_rate_factor(step: int, steps: int, warmup: int, decay: float, elapsed: float = 0.0) -> float:
    """Linear warm-up over `warmup` steps, then constant 1, then linear to 0 over the last share `decay` of `steps`, or
    of a time of which the share `elapsed` has passed, whichever is farther."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    last = decay * steps
    fall = min(1.0, (steps - step) / last) if last > 0 and steps > 0 else 1.0
    fall = min(fall, (1 - elapsed) / decay) if elapsed and decay else fall
    return rise * max(fall, 0.0)
