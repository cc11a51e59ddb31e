"""How an operator is computed: by its definition in plain torch, or by the Triton kernel beside it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch

Backend = Literal["auto", "torch", "triton"]


def choose(
    backend: Backend, device: torch.device, unsupported: str | None = None
) -> tuple[Literal["torch", "triton"], str]:
    """The backend for tensors on `device`, and the reason in words.

    `unsupported` says what the kernel needs that the tensors are not ("float32 tensors, not float64"). `auto` is triton
    on CUDA, where triton is installed and the kernel takes the tensors, and torch elsewhere. ValueError for an unknown
    name, and for an explicit `triton` that cannot be: it never falls back. (The kernel itself refuses a device that it
    cannot launch on, so that shapes can be inferred on the meta device.)
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r} is unknown; expected one of {', '.join(get_args(Backend))}")
    if backend == "torch":
        return "torch", "it was asked for"
    if backend == "auto" and device.type != "cuda":
        return "torch", f"triton is for CUDA tensors; these are on {device.type}"
    missing = unsupported or missing_triton()
    if missing and backend == "triton":
        raise ValueError(f"backend 'triton' needs {missing}; backend 'torch' does not")
    return ("torch", f"triton needs {missing}") if missing else ("triton", "it is installed and takes these tensors")


def check_launchable(device: torch.device, interpreted: bool) -> None:
    """ValueError for a kernel that was asked for where Triton launches none; the meta device infers shapes."""
    if device.type not in ("cuda", "meta") and not (device.type == "cpu" and interpreted):
        raise ValueError(
            "backend 'triton' needs CUDA tensors, or TRITON_INTERPRET=1 in the environment before triton is imported; "
            f"these tensors are on {device.type}, which backend 'torch' takes"
        )


def missing_for(device: torch.device) -> str | None:
    """What kernels on `device` need that is not there, in words; None where they can run."""
    if missing := missing_triton():
        return missing
    import triton

    there = device.type == "cuda" or (device.type == "cpu" and triton.knobs.runtime.interpret)
    return None if there else f"a CUDA device, not {device.type}"


def missing_triton() -> str | None:
    """What to install for Triton, in words; None where it is there."""
    try:
        import triton  # noqa: F401  (tried, as torch.compile traces an import and not importlib)
    except ImportError:
        return "the package triton (torch for CUDA brings it)"
    return None


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast off, where the device has one (meta has none)."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()
