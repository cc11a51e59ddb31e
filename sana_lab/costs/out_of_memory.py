"""Detection and uniform reporting of out-of-memory errors of every backend."""

import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

MESSAGES = ("out of memory", "not enough memory", "ALLOC_FAILED", "can't allocate memory")
"""Phrases in plain RuntimeErrors of PyTorch, its CPU allocator, cuDNN and cuBLAS."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error, of the host or a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


class OutOfMemory(RuntimeError):
    """Out of memory. The message is one line: the action, the original error, and advice."""


@contextmanager
def describe_out_of_memory(action: str) -> Iterator[None]:
    """Convert out-of-memory errors to OutOfMemory("out of memory while {action}: ..."); other errors pass."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # their locals hold the tensors that fill the memory
        release_memory()
        raise OutOfMemory(f"out of memory while {action}: {first_line(error)}") from None


@contextmanager
def advise_on_out_of_memory(advice: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Convert out-of-memory errors to OutOfMemory with `advice` at the end of its message; other errors pass.

    `advice` is called after memory is released, so that it may import modules and allocate.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = first_line(error) if isinstance(error, OutOfMemory) else f"out of memory: {first_line(error)}"
        traceback.clear_frames(error.__traceback__)
        release_memory()
        raise OutOfMemory(f"{message.rstrip('.')}. {'; '.join(advice())}") from None


def release_memory() -> None:
    """Collect garbage and empty the CUDA allocator's cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if the message is empty."""
    return next(iter(str(error).splitlines()), "").strip() or type(error).__name__
