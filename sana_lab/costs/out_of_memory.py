"""Out-of-memory errors of every backend, recognised and reported alike."""

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SIGNS = ("out of memory", "not enough memory", "ALLOC_FAILED", "can't allocate memory")
"""What PyTorch, its CPU allocator, cuDNN and cuBLAS say in a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory is full, and not that something is wrong."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


class OutOfMemory(RuntimeError):
    """Memory is full, in one line that says what was being done."""


@contextmanager
def doing(what: str) -> Iterator[None]:
    """OutOfMemory, with what was being done, for an error that says that memory is full; all others as they are."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # what they hold is what memory is full of
        release()
        raise OutOfMemory(f"out of memory while {what}: {first_line(error)}") from None


def release() -> None:
    """Give back what a call that failed has left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    """What an error says first, or its name."""
    return next(iter(str(error).splitlines()), "").strip() or type(error).__name__
