"""Gated residual, LayerNorm and modulation (adaLN) between the layers of a transformer block."""

import torch
from torch import Tensor

from sana_lab.ops.backend import Backend, check_launchable, choose, is_direct
from sana_lab.ops.modulate.closed_form import definition

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KERNEL_WIDTH = 8192


def modulate(x: Tensor, shift: Tensor, scale: Tensor, *, backend: Backend = "auto") -> Tensor:
    """LayerNorm without parameters, then x * (1 + scale) + shift: x (B, h, w, C), shift and scale (B, C) or (1, C)."""
    return _either(x, None, None, shift, scale, backend)[1]


def add(x: Tensor, y: Tensor, gate: Tensor, *, backend: Backend = "auto") -> Tensor:
    """x + gate * y for x and y (B, h, w, C), gate (B, C) or (1, C)."""
    return _either(x, y, gate, None, None, backend)[0]


def add_modulate(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """(x + gate * y, or x + y without a gate; that sum modulated), with shapes as in `modulate` and `add`.

    Statistics are in float32 (float64 for float64 inputs), of the sum after rounding to its dtype. The kernel computes
    in float32 and rounds each result once; under autocast its modulated result has autocast's dtype, to which the
    following linear layer would round it. ValueError for invalid shapes or dtypes, or an unsupported backend.
    """
    return _either(x, y, gate, shift, scale, backend)


def _either(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, backend: Backend
) -> tuple[Tensor, Tensor]:
    check(x, y, gate, shift, scale)
    if choose(backend, x.device, unsupported(x, y, gate, shift, scale)) == "torch":
        return definition(x, y, gate, shift, scale)
    from sana_lab.ops.modulate import kernels as kernel

    check_launchable(x.device, kernel.interpreted())
    gate, shift, scale = (None if t is None else t.expand(x.shape[0], -1) for t in (gate, shift, scale))
    run = kernel.forward if is_direct(x) else kernel.modulate
    total, out = run(x, y, gate, shift, scale, narrow(x.device))
    return x if y is None else total, out


def narrow(device: torch.device) -> torch.dtype | None:
    """Autocast's dtype if autocast is enabled, else None."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.get_autocast_dtype(device.type) if available and torch.is_autocast_enabled(device.type) else None


def unsupported(x: Tensor, *others: Tensor | None) -> str | None:
    """Requirement of the kernel that the tensors do not meet, for an error message; None if supported."""
    wrong = [t.dtype for t in (x, *others) if t is not None and t.dtype not in KERNEL_DTYPES]
    if wrong:
        return f"float16, bfloat16 or float32 tensors, not {wrong[0]}"
    if x.shape[-1] > KERNEL_WIDTH:
        return f"a width of at most {KERNEL_WIDTH}, not {x.shape[-1]}"
    return None if x.numel() else "at least one token"


def check(x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None) -> None:
    """ValueError unless x and y are (B, h, w, C) and each vector (B, C) or (1, C), floating and on one device."""
    both = [tuple(t.shape) for t in (x, y) if t is not None]
    if x.ndim != 4 or len(set(both)) > 1:
        raise ValueError(f"x and y must be (B, h, w, C) of one shape; got {', '.join(map(str, both))}")
    vectors, size = [t for t in (gate, shift, scale) if t is not None], (x.shape[0], x.shape[-1])
    if any(tuple(t.shape) not in (size, (1, size[1])) for t in vectors):
        shapes = [tuple(t.shape) for t in vectors]
        raise ValueError(f"gate, shift and scale must be (B, C) = {size} or (1, C), as x is {both[0]}; got {shapes}")
    every = [x, *vectors] if y is None else [x, y, *vectors]
    if not all(t.dtype.is_floating_point for t in every):
        raise ValueError(f"x, y, gate, shift and scale must be floating; got {[str(t.dtype) for t in every]}")
    if shift is not None and scale is not None and shift.dtype != scale.dtype:
        raise ValueError(f"shift and scale must have one dtype; got {shift.dtype}, {scale.dtype}")
    if len({t.device for t in every}) > 1:
        raise ValueError(f"x, y, gate, shift and scale must be on one device; got {[str(t.device) for t in every]}")
