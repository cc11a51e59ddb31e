"""Whether an operator that has a faster form for inference takes it."""

from typing import Literal, get_args

import torch
from torch import Tensor

Fast = Literal["auto", "torch", "fast"]
"""`torch` is the definition, `fast` the other form wherever it exists, `auto` whichever is expected to be faster."""


def uses_fast(backend: Fast, *tensors: Tensor | None, pays: bool = True) -> bool:
    """Whether to take the fast form, which records no gradient and knows no autocast.

    `auto` takes it where it pays and neither is asked for. ValueError for an unknown name, and for an explicit `fast`
    where it cannot be.
    """
    if backend not in get_args(Fast):
        raise ValueError(f"backend {backend!r} is unknown; expected one of {', '.join(get_args(Fast))}")
    if backend == "torch":
        return False
    hindrance = _hindrance(*[t for t in tensors if t is not None])
    if hindrance and backend == "fast":
        raise ValueError(f"backend 'fast' {hindrance}; 'auto' and 'torch' do")
    return backend == "fast" or (pays and not hindrance)


def _hindrance(*tensors: Tensor) -> str | None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "records no gradient, as is asked for outside torch.no_grad()"
    kind = tensors[0].device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return "takes tensors as they are and knows no autocast"
    return None
