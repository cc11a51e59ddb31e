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
    outputs: tuple[Tensor, ...] = torch.func.jvp(function, primals, tangents)
    return outputs[0], outputs[1]


@cache
def _load_decompositions() -> None:
    """Have torch load what jvp needs, which warns of a deprecation of its own (torch 2.14)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))
