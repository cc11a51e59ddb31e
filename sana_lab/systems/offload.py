"""Where the networks of a system are while it draws: all on one device, or each there only while it works."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Offload:
    """Networks that stay where they are, and visit `device` one at a time.

    What visits is a copy, so that going home costs nothing; whatever the device's memory, it needs to hold the largest
    network and not all of them. On the device itself there is nothing to move.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    @contextmanager
    def visit(self, network: nn.Module) -> Iterator[None]:
        """Parameters and buffers on the device meanwhile; changes made to them there are lost."""
        places: list[dict[str, Any]] = [d for m in network.modules() for d in (m._parameters, m._buffers)]
        homes = [(place, dict(place)) for place in places]
        moved: dict[int, torch.Tensor] = {}
        try:
            for place, tensors in homes:
                place.update({name: self._moved(t, moved) for name, t in tensors.items()})
            yield
        finally:
            for place, tensors in homes:
                place.update(tensors)

    def _moved(self, tensor: torch.Tensor | None, moved: dict[int, torch.Tensor]) -> torch.Tensor | None:
        """On the device; a shared tensor once, and one that is there already as it is."""
        if tensor is None or tensor.device == self.device:
            return tensor
        if id(tensor) not in moved:
            there = tensor.detach().to(self.device)
            moved[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there
        return moved[id(tensor)]
