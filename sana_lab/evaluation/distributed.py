"""Measuring on several devices: each process draws its share, and all see every image, in order.

Noise belongs to the image's index, so the images, and with them all numbers, are those of one process. Every process
counts all of them: what is shared is the drawing, which takes nearly all of the time.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Of this process; 0 where there is one alone."""
    return dist.get_rank() if _several() else 0


def size() -> int:
    """How many processes measure together."""
    return dist.get_world_size() if _several() else 1


def gather(images: Tensor | None) -> Tensor:
    """The images (B, 3, H, W) of all processes in the order of their ranks; None where a process has none."""
    if not _several():
        assert images is not None
        return images
    parts: list[Tensor | None] = [None] * size()
    dist.all_gather_object(parts, None if images is None else images.cpu())
    return torch.cat([part for part in parts if part is not None])


@contextmanager
def joined() -> Iterator[bool]:
    """Join the processes that torchrun started, one GPU each where there are any; whether this one is to report."""
    if not dist.is_torchelastic_launched():
        yield True
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # torchrun's own way to say it
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield rank() == 0
    finally:
        dist.destroy_process_group()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
