"""Products of Jacobian and vector in forward mode, for which operators use plain torch."""

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def jvp(
    function: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """(function(*primals), its derivative along the tangents), by torch.func.jvp."""
    _load_decompositions()
    value, derivative = torch.func.jvp(function, primals, tangents)
    return value, derivative


def forward_mode() -> bool:
    """Whether the innermost transform at work is torch.func.jvp."""
    top = torch._C._functorch.peek_interpreter_stack()
    return top is not None and top.key() == torch._C._functorch.TransformType.Jvp


@cache
def _load_decompositions() -> None:
    """Have torch load what jvp needs, which warns of a deprecation of its own (torch 2.14)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))
