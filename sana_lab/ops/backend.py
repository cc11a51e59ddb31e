"""Selection of an operator's backend: the reference in plain torch or the Triton kernel."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

Backend = Literal["auto", "torch", "triton"]


def choose(backend: Backend, device: torch.device, unsupported: str | None = None) -> Literal["torch", "triton"]:
    """Select the backend for tensors on `device`.

    `auto` is triton on CUDA if triton is installed and the kernel supports the tensors, and torch otherwise.
    `unsupported` is an unmet requirement of the kernel ("float32 tensors, not float64"), or None. Under torch.func.jvp
    it is torch, as the kernels have no forward-mode derivative.
    ValueError for an unknown name and for an explicit `triton` that cannot run: it never falls back. The device is
    checked at launch (`check_launchable`), so that shapes can be inferred on the meta device.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r} is unknown; expected one of {', '.join(get_args(Backend))}")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return "torch"
    missing = unsupported or missing_triton() or ("reverse mode, not torch.func.jvp" if forward_mode() else None)
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


def forward_mode() -> bool:
    """Whether the innermost transform at work is torch.func.jvp; not asked while torch.compile traces, which cannot."""
    if torch.compiler.is_compiling():
        return False
    top = torch._C._functorch.peek_interpreter_stack()
    return top is not None and top.key() == torch._C._functorch.TransformType.Jvp


def is_direct(x: Tensor) -> bool:
    """Whether a kernel on x may be launched without its custom operator, whose wrapper costs the host tens of
    microseconds: nothing records a gradient, traces, or watches operators (FLOP counters, fake tensors)."""
    return (
        type(x) is Tensor
        and x.device.type != "meta"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def on_device(x: Tensor) -> AbstractContextManager[None]:
    """Context with x's CUDA device as the current one; a null context where it is already, or x is on the CPU."""
    is_current = not x.is_cuda or x.get_device() == torch.cuda.current_device()
    return nullcontext() if is_current else torch.cuda.device(x.device)


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
