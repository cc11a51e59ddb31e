"""The machine and software of a run: device, versions, CPU model, commit."""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "lightning", "transformers", "mlflow", "triton", "sana-lab")


def environment() -> dict[str, Any]:
    """Software, device and commit that a number may depend on beside its configuration, as a flat mapping."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    system = {"python": platform.python_version(), "platform": platform.platform(), "cpu": cpu_model()}
    return system | {"cores": cores(), "device": device} | versions() | commit()


def cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str | None]:
    """Versions of the packages that affect results or records; None if not installed."""
    return {name.replace("-", "_"): _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name, from the kernel or the platform."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def commit(root: Path | None = None) -> dict[str, str | bool | None]:
    """The git commit of the checkout at `root` and whether its code differs from it; None if there is no checkout.

    `root` defaults to the folder that holds this package: an installed wheel has no commit, even inside a repository.
    """
    root = root or Path(__file__).resolve().parents[1]
    head = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    dirty = None if head is None else bool(_git(root, "status", "--porcelain", "--", "sana_lab", "pyproject.toml"))
    return {"commit": head, "dirty": dirty}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git here, or not our repository
        return None
    return done.stdout.strip()


def join_processes(cuda: bool, device: int | None = None) -> bool:
    """Join the processes that torchrun, or the lab itself, started, with NCCL and a CUDA device (the one of the
    process's place if None), or with gloo. False where there are none, or they have joined already."""
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_torchelastic_launched() or dist.is_initialized():
        return False
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) if device is None else device)
    dist.init_process_group("nccl" if cuda else "gloo")
    return True


def place(device: str) -> "torch.device":
    """The torch device of a name; `auto` is CUDA where there is one, else the CPU. ValueError for an unknown name."""
    import torch

    try:
        return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}; expected auto, cpu, cuda, cuda:1 ...") from error
