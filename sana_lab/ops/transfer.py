"""Asynchronous copies from the CPU to a device."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """x on a device (and in a dtype), copied asynchronously where that is safe.

    Copies to the CPU are synchronous, as are copies to MPS, where an asynchronous copy may be read too early
    (pytorch#83015).
    """
    return x.to(device, dtype, non_blocking=device.type not in ("cpu", "mps"))
