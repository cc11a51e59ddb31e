"""Copies from the CPU to a device that the CPU does not wait for."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """x on a device (and in a dtype); the copy is queued where that is safe.

    Not to the CPU, whose result is read at once, nor to MPS, where a queued copy may be read too early (pytorch#83015).
    """
    return x.to(device, dtype, non_blocking=device.type not in ("cpu", "mps"))
