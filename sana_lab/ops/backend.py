"""Choice of an operator's implementation: its definition in plain torch, or the Triton kernel beside it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch

Backend = Literal["auto", "torch", "triton"]


def choose(backend: Backend, device: torch.device, unsupported: str | None = None) -> Literal["torch", "triton"]:
    """The implementation for tensors on `device`.

    `auto` is triton on CUDA, where triton is installed and the kernel takes the tensors, and torch elsewhere.
    `unsupported` names what the kernel requires of the tensors and they lack ("float32 tensors, not float64").
    ValueError for an unknown name, and for an explicit `triton` that is not possible: it never falls back. (The kernel
    itself refuses devices that it cannot launch on, so that shapes can be inferred on the meta device.)
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
    """ValueError for a device on which Triton launches no kernels; the meta device infers shapes."""
    if device.type not in ("cuda", "meta") and not (device.type == "cpu" and interpreted):
        raise ValueError(
            "backend 'triton' needs CUDA tensors, or TRITON_INTERPRET=1 in the environment before triton is imported; "
            f"these tensors are on {device.type}, which backend 'torch' takes"
        )


def missing_for(device: torch.device) -> str | None:
    """What kernels need to run on `device` and lack, in words; None where they run."""
    if missing := missing_triton():
        return missing
    import triton

    runs = device.type == "cuda" or (device.type == "cpu" and triton.knobs.runtime.interpret)
    return None if runs else f"a CUDA device, not {device.type}"


def missing_triton() -> str | None:
    """What to install for Triton, in words; None where it is installed."""
    try:
        import triton  # noqa: F401  (torch.compile traces an import, and not importlib)
    except ImportError:
        return "the package triton (torch for CUDA brings it)"
    return None


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast disabled, where the device has it (meta has none)."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
