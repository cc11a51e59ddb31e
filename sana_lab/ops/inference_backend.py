"""Choice between an operator's definition and its faster form for inference."""

from typing import Literal, get_args

import torch
from torch import Tensor

Fast = Literal["auto", "torch", "fast"]
"""`torch` is the definition, `fast` the other form wherever it exists, `auto` whichever is expected to be faster."""


def uses_fast(backend: Fast, *tensors: Tensor | None, pays: bool = True) -> bool:
    """Whether the fast form runs, which records no gradient and ignores autocast.

    `auto` is fast where `pays` and neither is on. ValueError for an unknown name, and for an explicit `fast` where
    gradients or autocast are on.
    """
    if backend not in get_args(Fast):
        raise ValueError(f"backend {backend!r} is unknown; expected one of {', '.join(get_args(Fast))}")
    if backend == "torch":
        return False
    obstacle = _obstacle(*[t for t in tensors if t is not None])
    if obstacle and backend == "fast":
        raise ValueError(f"backend 'fast' {obstacle}; 'auto' and 'torch' do")
    return backend == "fast" or (pays and not obstacle)


def _obstacle(*tensors: Tensor) -> str | None:
    """What keeps the fast form from running, in words."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "records no gradient, which is needed outside torch.no_grad()"
    kind = tensors[0].device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return "does not apply autocast"
    return None
