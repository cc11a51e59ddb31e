"""An exponential moving average of what trains, and nothing else."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """float32 averages of a module's trainable parameters; frozen ones are left alone.

    The decay warms up, min(decay, (1 + n) / (10 + n)) after n updates, so short runs are averaged sensibly too.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the average's decay is {decay}, expected 0 <= decay < 1")
        self.decay, self.updates = decay, 0
        self.values = {name: p.detach().float().clone() for name, p in trainable(module)}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's parameters; call after each optimiser step."""
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        named = dict(trainable(module))
        self.values = {k: v.to(named[k].device) for k, v in self.values.items()}
        torch._foreach_lerp_(list(self.values.values()), [named[k].detach().float() for k in self.values], weight)

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """The module with averaged parameters, for as long as the block lasts."""
        raw = {name: p.detach().clone() for name, p in trainable(module)}
        self.write(module)
        try:
            yield
        finally:
            _write(module, raw)

    def write(self, module: nn.Module) -> None:
        """Give the module the averaged parameters for good."""
        _write(module, self.values)

    def state(self) -> dict[str, int | dict[str, Tensor]]:
        return {"updates": self.updates, "values": self.values}

    def load(self, state: Mapping[str, int | dict[str, Tensor]]) -> None:
        values, updates = state["values"], state["updates"]
        assert isinstance(values, dict)
        assert isinstance(updates, int)
        if values.keys() != self.values.keys():
            odd = sorted(values.keys() ^ self.values.keys())
            raise ValueError(f"the checkpoint's average is of other parameters: {', '.join(odd[:5])}")
        shapes = {k: (tuple(values[k].shape), tuple(v.shape)) for k, v in self.values.items()}
        if odd := [f"{k} {given}, expected {own}" for k, (given, own) in shapes.items() if given != own]:
            raise ValueError(f"the checkpoint's average is of other shapes: {'; '.join(odd[:5])}")
        self.values, self.updates = {k: v.float().clone() for k, v in values.items()}, updates


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


@torch.no_grad()
def _write(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, p in trainable(module):
        p.copy_(values[name])
