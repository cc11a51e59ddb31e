"""Selection of an operator's backend: the reference in plain torch or the Triton kernel."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch

Backend = Literal["auto", "torch", "triton"]


def choose(backend: Backend, device: torch.device, unsupported: str | None = None) -> Literal["torch", "triton"]:
    """Select the backend for tensors on `device`.

    `auto` is triton on CUDA if triton is installed and the kernel supports the tensors, and torch otherwise.
    `unsupported` is an unmet requirement of the kernel ("float32 tensors, not float64"), or None.
    ValueError for an unknown name and for an explicit `triton` that cannot run: it never falls back. The device is
    checked at launch (`check_launchable`), so that shapes can be inferred on the meta device.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r} is unknown; expected one of {', '.join(get_args(Backend))}")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return "torch"
    missing = unsupported or missing_triton()
    if missing and backend == "triton":
        raise ValueError(f"backend 'triton' needs {missing}; backend 'torch' does not")
    return "torch" if missing else "triton"


def check_launchable(device: torch.device, interpreted: bool) -> None:
    """ValueError for a device on which Triton cannot launch kernels; the meta device is allowed (shape inference)."""
    if device.type not in ("cuda", "meta") and not (device.type == "cpu" and interpreted):
        raise ValueError(
            "backend 'triton' needs CUDA tensors, or TRITON_INTERPRET=1 in the environment before triton is imported; "
            f"these tensors are on {device.type}, which backend 'torch' takes"
        )


def missing_for(device: torch.device) -> str | None:
    """Missing requirement of Triton kernels on `device`, for an error message; None if they can run."""
    if missing := missing_triton():
        return missing
    import triton

    runs = device.type == "cuda" or (device.type == "cpu" and triton.knobs.runtime.interpret)
    return None if runs else f"a CUDA device, not {device.type}"


def missing_triton() -> str | None:
    """Package to install for Triton, for an error message; None if it is installed."""
    try:
        import triton  # noqa: F401  (torch.compile can trace an import statement but not importlib)
    except ImportError:
        return "the package triton (torch for CUDA brings it)"
    return None


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Context that disables autocast; a null context on devices without autocast (meta)."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
