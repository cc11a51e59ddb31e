"""Exponential moving average (EMA) of the parameters that train."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sana_lab.systems.sharding import full, like, local


class Average:
    """EMA in float32 of a module's trainable parameters; frozen ones, such as a text encoder, are not copied.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that short runs average over their own length. Of
    sharded parameters each rank averages its slices; `state` and `load` are of whole tensors.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the average's decay is {decay}, expected 0 <= decay < 1")
        self.decay, self.updates = decay, 0
        self.values = {name: p.detach().float().clone() for name, p in trainable(module)}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the parameters; to be called after each optimiser step."""
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = self._followed(module)
        self.values = {k: v.to(parameters[k].device) for k, v in self.values.items()}
        present = [local(parameters[k].detach()).float() for k in self.values]
        torch._foreach_lerp_([local(v) for v in self.values.values()], present, weight)

    def shard(self, module: nn.Module) -> None:
        """Slice the averages as the parameters are sliced now."""
        self.values = {name: like(value, self._followed(module)[name]) for name, value in self.values.items()}

    def restart(self, module: nn.Module) -> None:
        """Begin again at the parameters as they are, such as those of a model that training begins from."""
        self.updates, self.values = 0, {k: p.detach().float().clone() for k, p in self._followed(module).items()}

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """Context with the averages in place of the parameters."""
        raw = {name: p.detach().clone() for name, p in self._followed(module).items()}
        self.write(module)
        try:
            yield
        finally:
            _write(module, raw)

    def write(self, module: nn.Module) -> None:
        """Replace the parameters by their averages permanently."""
        _write(module, self.values)

    def _followed(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The module's parameters that are averaged: those it had at the beginning, none of training methods."""
        return {name: p for name, p in trainable(module) if name in self.values}

    def state(self) -> dict[str, int | dict[str, Tensor]]:
        """State for a checkpoint; to be called by all ranks."""
        return {"updates": self.updates, "values": {name: full(value) for name, value in self.values.items()}}

    def load(self, state: Mapping[str, int | dict[str, Tensor]]) -> None:
        """Restore the result of `state`. ValueError if it is of other parameters."""
        values, updates = state["values"], state["updates"]
        assert isinstance(values, dict)
        assert isinstance(updates, int)
        if values.keys() != self.values.keys():
            mismatches = sorted(values.keys() ^ self.values.keys())
            raise ValueError(f"the checkpoint's average is of other parameters: {', '.join(mismatches[:5])}")
        shapes = {k: (tuple(values[k].shape), tuple(v.shape)) for k, v in self.values.items()}
        if mismatches := [f"{k} {got}, expected {own}" for k, (got, own) in shapes.items() if got != own]:
            raise ValueError(f"the checkpoint's average is of other shapes: {'; '.join(mismatches[:5])}")
        self.values = {k: like(v.float().clone(), self.values[k]) for k, v in values.items()}
        self.updates = updates


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of all that require a gradient."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


@torch.no_grad()
def _write(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    parameters = dict(trainable(module))
    for name, value in values.items():
        parameters[name].copy_(value)
