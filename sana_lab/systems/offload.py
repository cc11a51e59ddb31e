"""Sampling with one network at a time on the device, for systems larger than its memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Offload:
    """Copy a network to `device` only while it runs, so that at most the largest network is in device memory.

    The originals are kept, so nothing is copied back. Tensors already on the device are not copied.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    @contextmanager
    def visit(self, network: nn.Module) -> Iterator[None]:
        """Context with parameters and buffers on the device; changes to the copies are lost."""
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
        """The tensor on the device; a shared one is copied once."""
        if tensor is None or tensor.device == self.device:
            return tensor
        if id(tensor) not in moved:
            copy = tensor.detach().to(self.device)
            moved[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
        return moved[id(tensor)]
