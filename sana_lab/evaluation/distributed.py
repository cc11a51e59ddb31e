"""Evaluation on several devices: each process generates its share, and all processes receive every image, in order.

Noise depends on the image's index, so the images and all numbers are those of one process. Every process computes all
measures; only the generation, which takes nearly all of the time, is divided.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Rank of this process; 0 for a single one."""
    return dist.get_rank() if _initialized() else 0


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _initialized() else 1


def gather(images: Tensor | None) -> Tensor:
    """Images (B, 3, H, W) of all processes in the order of ranks; None from a process without images."""
    if not _initialized():
        assert images is not None
        return images
    parts: list[Tensor | None] = [None] * size()
    dist.all_gather_object(parts, None if images is None else images.cpu())
    return torch.cat([part for part in parts if part is not None])


@contextmanager
def process_group() -> Iterator[bool]:
    """Join the processes that torchrun started, one GPU each if available; yields whether this is rank 0."""
    if not dist.is_torchelastic_launched():
        yield True
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # set by torchrun
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield rank() == 0
    finally:
        dist.destroy_process_group()


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
