"""Selection between an operator's reference and its fast form for inference."""

from typing import Literal, get_args

import torch
from torch import Tensor

Fast = Literal["auto", "torch", "fast"]
"""`torch` is the reference, `fast` the inference form where it exists, `auto` the one expected to be faster."""


def uses_fast(backend: Fast, *tensors: Tensor | None, pays: bool = True) -> bool:
    """Whether to use the fast form, which supports neither autograd nor autocast.

    `auto` is fast if `pays` and neither gradients nor autocast are enabled. ValueError for an unknown name, and for an
    explicit `fast` while gradients or autocast are enabled.
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
    """Reason why the fast form cannot run, for an error message; None if it can."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "records no gradient, which is needed outside torch.no_grad()"
    kind = tensors[0].device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return "does not apply autocast"
    return None
