"""Evaluation on several devices: each process generates its share of the images and extracts features or verdicts from
them; all processes receive these, in order, and end with the same numbers.

Noise depends on the image's index, so the images and all numbers are those of one process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from sana_lab.environment import join_processes

T = TypeVar("T")


def rank() -> int:
    """Rank of this process; 0 for a single one."""
    return dist.get_rank() if _initialized() else 0


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _initialized() else 1


def gather(own: T | None) -> list[T]:
    """What each process gives, in the order of ranks, without the Nones; plain data and tensors on the CPU."""
    parts: list[T | None] = [own]
    if _initialized():
        parts = [None] * size()
        dist.all_gather_object(parts, own)
    return [part for part in parts if part is not None]


@contextmanager
def process_group() -> Iterator[bool]:
    """Join the processes that torchrun started, one GPU each if available; yields whether this is rank 0."""
    joined = join_processes(torch.cuda.is_available())
    try:
        yield rank() == 0
    finally:
        if joined:
            dist.destroy_process_group()


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
