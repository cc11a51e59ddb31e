"""Report of a state dict that does not fit: missing, unexpected and wrongly shaped tensors, with the nearest names."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatch

import torch
from torch import Tensor

from sana_lab.config.validation import SpecError

Shapes = Mapping[str, tuple[int, ...]]

LIMIT = 12
"""Tensors named in one report."""


def check_state(
    expected: Shapes, state: Mapping[str, Tensor], source: str, model: str = "", ignored: Iterable[str] = ()
) -> None:
    """SpecError "SOURCE does not fit MODEL: ..." unless `state` has exactly the expected names and shapes.

    Tensors that match one of the `ignored` patterns (as in `fnmatch`) may be present or not.
    """
    if problems := mismatches(expected, state, ignored):
        raise SpecError(f"{source} does not fit{f' {model}' if model else ''}: {'; '.join(problems)}")


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """SpecError that names the tensors with NaN or infinite values."""
    if broken := [name for name, tensor in state.items() if not is_finite(tensor)]:
        more = f" and {len(broken) - LIMIT} more" if len(broken) > LIMIT else ""
        raise SpecError(
            f"{source} holds NaN or infinite weights, in {', '.join(broken[:LIMIT])}{more}; expected a checkpoint from "
            "before the training diverged"
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; one pass without a copy. True on the meta device."""
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:  # float8 has no minimum
        return all(bool(part.float().isfinite().all()) for part in tensor.flatten().split(2**22))
    low, high = torch.aminmax(tensor)  # NaN where any value is
    return bool(torch.isfinite(low) and torch.isfinite(high))


def mismatches(expected: Shapes, state: Mapping[str, Tensor], ignored: Iterable[str] = ()) -> list[str]:
    """A phrase for each missing, unexpected or wrongly shaped tensor: the first `LIMIT`, then how many more."""
    patterns = tuple(ignored)
    missing = [name for name in expected if name not in state]
    unexpected = [k for k in state if k not in expected and not any(fnmatch(k, pattern) for pattern in patterns)]
    shapes = {name: tuple(state[name].shape) for name in expected if name in state}
    misshapen = [name for name, shape in shapes.items() if shape != expected[name]]
    phrases = [
        *(f"{name} is missing{_nearest(name, unexpected)}" for name in missing[:LIMIT]),
        *(f"{name} is not expected{_nearest(name, missing)}" for name in unexpected[:LIMIT]),
        *(f"{name} is {shapes[name]}, expected {expected[name]}" for name in misshapen[:LIMIT]),
    ]
    more = len(missing) + len(unexpected) + len(misshapen) - LIMIT
    return [*phrases[:LIMIT], *([f"and {more} more"] if more > 0 else [])]


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _nearest(name: str, names: list[str]) -> str:
    close = get_close_matches(name, names, 1, cutoff=0.7)
    return f" (did you mean {close[0]!r}?)" if close else ""
