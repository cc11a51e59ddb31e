"""The optimiser of a system: the part that its spec names, fused into one kernel a step where that changes nothing."""

from collections.abc import Iterable, Sequence
from typing import Any

import lightning as L
import torch
from torch import nn

from sana_lab.config import specs
from sana_lab.config.specs import Spec


def optimizer(spec: Spec, parameters: Iterable[nn.Parameter], system: L.LightningModule) -> torch.optim.Optimizer:
    """An optimiser that has the option `fused` and leaves it open (null) is fused on CUDA, up to rounding the same.

    Not so with the loss scaling of 16-mixed: a fused step unscales gradients itself, after they were to be clipped. On
    the CPU it stays as it is written, since the fused kernel rounds differently.
    """
    trained = list(parameters)
    resolved = specs.resolve("optimizer", spec)
    if resolved.get("fused", False) is None:
        resolved["fused"] = fused(trained, system)
    return specs.build("optimizer", resolved, params=trained)


def fused(parameters: Sequence[nn.Parameter], system: L.LightningModule) -> bool | None:
    """True where one kernel shall step all parameters; None leaves it to torch."""
    trainer: Any = system._trainer
    scaled = trainer is not None and getattr(trainer.precision_plugin, "scaler", None) is not None
    return True if all(p.is_cuda for p in parameters) and not scaled else None
