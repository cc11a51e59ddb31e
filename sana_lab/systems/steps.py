"""The step of an optimiser, group by group."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class GroupSteps(torch.optim.Optimizer):
    """An optimiser that steps the parameters of each group that have a gradient."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all groups; the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.step_group([p for p in group["params"] if p.grad is not None], group)
        return loss

    def step_group(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Step parameters, all of which have a gradient, with the options of their group."""
        raise NotImplementedError
