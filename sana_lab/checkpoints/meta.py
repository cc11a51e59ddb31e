"""Building of networks without memory."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

RANDOM = ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_")
"""Initialisers that are left out: on the meta device they only import the compiler, which takes a second."""


class _SkipRandom(TorchFunctionMode):
    """Leaves tensors on the meta device as they are in place of drawing numbers that they cannot hold."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = {**(kwargs or {})}
        first = args[0] if args else options.get("tensor")
        if getattr(func, "__name__", "") in RANDOM and isinstance(first, Tensor) and first.is_meta:
            return first
        return func(*args, **options)


@contextmanager
def on_meta() -> Iterator[None]:
    """Within the block tensors are made on the meta device, without random initialisation."""
    with torch.device("meta"), _SkipRandom():
        yield
