"""Memory that the C library keeps after torch has freed it."""

import ctypes
import sys

LEAST = 2**20
"""Bytes of the smallest block that is returned."""

M_MMAP_THRESHOLD = -3
"""Parameter of glibc's `mallopt`: blocks from this size on are mapped one by one, and unmapped when they are freed."""


def return_freed_memory(least: int = LEAST) -> bool:
    """Have blocks of at least `least` bytes returned to the system when they are freed; False without glibc.

    By default glibc's limit grows to 32 MiB with the blocks that are freed, and the heap below it is not returned: a
    training whose activations have such sizes takes up to twice the memory of its tensors. Fresh blocks cost time, as
    the system fills them with zeros.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and mallopt(M_MMAP_THRESHOLD, least) == 1
