"""Asynchronous copies from the CPU to a device."""

import torch
from torch import Tensor

STAGED = 2**16  # bytes up to which CUDA stages a copy from pageable memory, so that the host need not wait for it


def to_device(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """x on a device (and in a dtype), copied asynchronously where that is safe.

    A larger tensor on its way from the CPU to CUDA is put in pinned memory first, as the copy would block the host.
    Copies to the CPU are synchronous, as are copies to MPS, where an asynchronous copy may be read too early
    (pytorch#83015).
    """
    if device.type == "cuda" and x.device.type == "cpu" and x.nbytes > STAGED and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, dtype, non_blocking=device.type not in ("cpu", "mps"))
