"""Host synchronisations of a training step, counted on the meta device without a GPU.

Meta tensors have no values, so every operation that reads one is intercepted. On a GPU, such an operation blocks the
host until all queued work is done.
"""

import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sana_lab.types import Batch

READS = ("_local_scalar_dense", "equal", "is_nonzero")
"""Operators that return a value to the host: `.item()`, `float()`, `bool()`, `torch.equal`."""

DATA_DEPENDENT = ("nonzero", "masked_select", "unique_dim", "_unique2", "unique_consecutive", "bincount")
"""Operators whose output shape depends on values."""

PACKAGE = f"{Path(__file__).parents[1]}/"


class SyncCounter(TorchDispatchMode):
    """Counts, by operator and source line, reads of tensors that are not on the CPU, and blocking copies.

    On the meta device a read returns one, so that the program continues.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if reason := _sync_reason(name, args, kwargs):
            self.counts[f"{reason} at {_source_line()}"] += 1
            if any(t.is_meta for t in _tensors((args, kwargs))):
                return _substitute(name, func, args, kwargs)
        return func(*args, **kwargs)

    @property
    def total(self) -> int:
        return self.counts.total()


def _tensors(values: Any) -> list[Tensor]:
    return [v for v in tree_leaves(values) if isinstance(v, Tensor)]


def _sync_reason(name: str, args: Any, kwargs: Any) -> str | None:
    """Reason why the host waits in this call; None if it does not."""
    remote = [t for t in _tensors((args, kwargs)) if t.device.type != "cpu"]
    if name in (*READS, *DATA_DEPENDENT) and remote:
        return name
    if name == "index" and remote and any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1])):
        return "index by a mask"
    if name in ("_to_copy", "copy_"):
        return _copy_reason(name, args, kwargs)
    return None


def _copy_reason(name: str, args: Any, kwargs: Any) -> str | None:
    """The direction of a blocking copy between host and device; None for `non_blocking` ones and others."""
    source, target = (args[1], args[0].device) if name == "copy_" else (args[0], kwargs.get("device"))
    non_blocking = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
    if target is None or non_blocking:
        return None
    from_cpu, to_cpu = source.device.type == "cpu", torch.device(target).type == "cpu"
    if from_cpu == to_cpu:
        return None
    return "copy to the device" if from_cpu else "copy to the host"


def _substitute(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    """The result of a read of meta tensors: ones on the host."""
    if name in READS:
        dtype = args[0].dtype if name == "_local_scalar_dense" else torch.bool
        return torch.ones((), dtype=dtype, device="cpu").tolist()
    if name == "_to_copy" and torch.device(kwargs["device"]).type == "cpu":
        return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="cpu")
    return func(*args, **kwargs)


def _source_line() -> str:
    """FILE:LINE of the innermost frame in this package, or of the caller if there is none."""
    frames = [f for f, _ in traceback.walk_stack(None) if f.f_code.co_filename != __file__]
    ours = [f for f in frames if f.f_code.co_filename.startswith(PACKAGE)]
    others = [f for f in frames if "/torch/" not in f.f_code.co_filename]
    first = (ours or others or frames)[0]
    path = first.f_code.co_filename
    return f"{path.removeprefix(PACKAGE) if first in ours else Path(path).name}:{first.f_lineno}"


class _MetaAccelerator(CPUAccelerator):
    """Accelerator with which a strategy can place a module on the meta device."""

    def setup_device(self, device: torch.device) -> None:
        """The meta device needs no setup."""


class _Batches(L.LightningDataModule):
    """Batches without a length; Lightning would reduce the length on the meta device."""

    def __init__(self, batches: list[Batch]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> "_Batches":
        return self

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class _StepCounter(Callback):
    """Cumulative counts at the end of each batch."""

    def __init__(self) -> None:
        self.mode = SyncCounter()
        self.steps: list[Counter[str]] = []

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Disable fused optimisers, which do not run on the meta device and do not synchronise."""
        for group in (g for optimizer in trainer.optimizers for g in optimizer.param_groups):
            if group.get("fused"):
                group["fused"] = False

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(self.mode.counts.copy())


def count_syncs(
    system: L.LightningModule, batches: Iterable[Batch], clip: float = 1.0, callbacks: Sequence[Callback] = ()
) -> list[Counter[str]]:
    """Synchronisations by operator and source line, of each training step after the first: n - 1 for n batches.

    Setup in the first step, logging points and validation are not counted. `batches` are on the CPU. The system is
    moved to the meta device and cannot be used afterwards.
    """
    batches = list(batches)
    counter = _StepCounter()
    trainer = L.Trainer(
        strategy=SingleDeviceStrategy(torch.device("meta"), accelerator=_MetaAccelerator()),
        max_steps=len(batches) + 1,  # the last step of a training logs
        max_epochs=1,
        gradient_clip_val=clip if system.automatic_optimization else None,
        log_every_n_steps=sys.maxsize,
        callbacks=[*callbacks, counter],
        enable_progress_bar=any(isinstance(c, ProgressBar) for c in callbacks),
        logger=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with counter.mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about missing validation and workers
        trainer.fit(system, datamodule=_Batches(batches))
    return [after - before for before, after in zip(counter.steps, counter.steps[1:], strict=False)]
